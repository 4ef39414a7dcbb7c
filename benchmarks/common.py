"""What every benchmark shares: its options, where the data is, the machine's facts, and how results are shown."""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console, RenderableType

from agora.errors import AgoraError, InvalidRequest

DATA_VARIABLE: Final = "AGORA_DATA"
"""Environment variable that names the data folder when `--data` does not."""

VERSIONS_OF: Final = ("agora-llm", "torch", "transformers", "langgraph", "numpy")
"""Distributions whose versions belong to a result."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have: `--quick`, `--json`, `--data`, `--seed`. Add others to it."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    options.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options.add_argument("--data", type=Path, metavar="DIR", help=f"folder of the data sets (or ${DATA_VARIABLE})")
    options.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return options


def data_dir(args: argparse.Namespace) -> Path:
    """The data folder: `--data`, else the environment variable `AGORA_DATA`.

    Raises:
        InvalidRequest: If neither is given, or what is given is no folder.
    """
    given: Path | None = args.data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if given is None:
        raise InvalidRequest(
            "this benchmark reads data sets and was not told where they are",
            hint=f"give --data DIR, or set the environment variable {DATA_VARIABLE}",
        )
    if not given.is_dir():
        raise InvalidRequest(
            f"the data folder {str(given)!r} is not a folder", hint=f"check --data DIR or {DATA_VARIABLE}"
        )
    return given


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a gzipped file with one JSON object a line.

    Raises:
        InvalidRequest: If the file is missing or damaged.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except FileNotFoundError:
        raise InvalidRequest(
            f"{path.name} is not in {str(path.parent)!r}",
            hint=f"--data DIR (or {DATA_VARIABLE}) must name the folder that holds {path.parent.name!r}",
        ) from None
    except (OSError, EOFError, ValueError) as e:
        raise InvalidRequest(f"{path} cannot be read: {e}", hint="fetch the data set again") from None


def facts() -> dict[str, Any]:
    """What a figure depends on besides the code: versions, processor, commit, and when it was measured."""
    return {
        "python": platform.python_version(),
        "versions": {name: v for name in VERSIONS_OF if (v := _version(name)) is not None},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(result: Mapping[str, Any], as_json: bool, table: RenderableType | None = None) -> None:
    """Prints a result: one JSON object, or the table for people (the JSON, indented, where there is none)."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
    elif table is None:
        print(json.dumps(result, allow_nan=False, indent=2))
    else:
        Console().print(table)


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark's `main`; what the user got wrong is told in one line on stderr, with exit code 2."""
    try:
        main()
    except AgoraError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None
