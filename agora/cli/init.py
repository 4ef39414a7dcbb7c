"""`agora init`: a commented configuration to start from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from agora.cli.invocation import of
from agora.errors import AgoraError, InvalidRequest


def init(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="[PATH]", help="File to write, or a folder (end it with /) for agora.toml.")
    ] = "agora.toml",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented agora.toml that behaves as agora does without one."""
    from agora.config import load_config, template

    if not path.strip() or "\x00" in path:
        raise InvalidRequest("the path is empty", hint="name a file or a folder, or leave it out for ./agora.toml")
    # A Path forgets the slash at its end, which says that a folder is meant.
    is_folder = path.endswith(("/", os.sep))
    file = Path(path) / "agora.toml" if is_folder or Path(path).is_dir() else Path(path)
    if is_folder and file.parent.is_file():
        raise InvalidRequest(f"{file.parent} is a file, not a folder", hint="name another place")
    try:
        if is_folder:
            file.parent.mkdir(exist_ok=True)
        _write(file, template(), overwrite=force)
    except FileExistsError:
        raise InvalidRequest(f"{file} is already there", hint="--force overwrites it") from None
    except OSError as e:
        raise AgoraError(f"{file} cannot be written: {e.strerror or e}", hint="name another place") from None
    load_config(file)
    of(context).say(f"wrote {file}; edit it, then check it with: agora doctor")


def _write(file: Path, text: str, *, overwrite: bool) -> None:
    """Writes the whole file or nothing."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
    ) as half:
        temporary = Path(half.name)
        try:
            half.write(text)
            half.flush()
            os.fsync(half.fileno())
            temporary.chmod(0o644)
            if overwrite:
                temporary.replace(file)
            else:
                # Unlike a rename, a link never replaces what is there, not even in a race.
                os.link(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
