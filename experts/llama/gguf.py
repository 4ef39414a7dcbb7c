"""A look at a GGUF file before llama.cpp gets it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from agora.errors import ModelError
from experts.convert import GGUF_MAGIC

VERSIONS: Final = frozenset({2, 3})
"""Versions of the format that llama.cpp reads; 1 is of 2023 and no longer read."""

HEADER: Final = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of metadata entries."""

LEAST_ENTRY_BYTES: Final = 13
"""Bytes of the smallest metadata entry or tensor description: the length of its name, a type, and one byte."""


def check_gguf(path: Path) -> None:
    """Checks what can be told from the first bytes and the size of a file.

    Raises:
        ModelError: If it is not there, or no GGUF file of a model.
    """
    try:
        with path.open("rb") as file:
            start = file.read(HEADER.size)
        size = path.stat().st_size
    except FileNotFoundError:
        raise ModelError(f"{path} is not there", hint="a GGUF model is one file that ends in .gguf") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder; a GGUF model is one file", hint="name the .gguf file in it") from None
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from e
    if start[: len(GGUF_MAGIC)] != GGUF_MAGIC:
        raise ModelError(f"{path} is no GGUF file: it starts with {start[:4]!r}, not {GGUF_MAGIC!r}")
    if len(start) < HEADER.size:
        raise ModelError(f"{path} is cut off after {size} bytes", hint="fetch it again")
    _, version, tensors, entries = HEADER.unpack(start)
    if version not in VERSIONS:
        raise ModelError(f"{path} is GGUF of version {version}; llama.cpp reads 2 and 3, little-endian")
    if tensors == 0:
        raise ModelError(f"{path} holds no weights", hint="fetch the file with the model, not its vocabulary only")
    if (tensors + entries) * LEAST_ENTRY_BYTES > size:
        raise ModelError(
            f"{path} says it holds {tensors:,} tensors, but has only {size:,} bytes", hint="fetch it again"
        )
