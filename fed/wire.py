"""Messages of a federation: a safetensors file whose metadata is one JSON header, checked before it is believed.

A message is a length of 8 bytes, then safetensors' own header with the name, type and size of each tensor and, as its
metadata, `{"agora": HEADER}`, then the tensors. HEADER is a JSON text with the fields of `fed.headers`, `sha256` first.

The checksum covers every byte of the message but its own 64 digits, which are hashed as zeros. It finds damage, it
proves no origin: who sent a message is for the transport to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from agora.errors import AdapterError

Parts = Mapping[str, NDArray[Any]]
"""One-dimensional tensors by name."""

SIZE_BYTES: Final = 8
"""Before the header: its length, little-endian (the safetensors format)."""

KEY: Final = "agora"
"""The one entry of the metadata. More than one would be written in any order, and the bytes would differ."""

OPENING: Final = b'{"__metadata__":{"agora":"{\\"sha256\\":\\"'
"""How every header begins, so that the checksum is always in the same place."""

CHECKSUM_AT: Final = SIZE_BYTES + len(OPENING)

NO_CHECKSUM: Final = "0" * 64
"""Stands for the checksum while it is computed."""

WIDTHS: Final = {"F32": 4, "U32": 4, "U16": 2, "U8": 1, "I8": 1}
"""Bytes of a number, by safetensors' names; no other type travels."""

VALUE_CHARACTERS: Final = 80
"""Of a wrong value, how much an error repeats."""


class Reason(StrEnum):
    """Why a message is refused; stable, for programs."""

    TRUNCATED = "truncated"
    OVERSIZED = "oversized"
    DAMAGED = "damaged"
    CHECKSUM = "checksum"
    FORMAT = "wrong_format"
    HEADER = "bad_header"
    ABSURD = "absurd"
    FEDERATION = "wrong_federation"
    JOB = "unknown_job"
    DUPLICATE = "duplicate"
    CLIENT = "wrong_client"
    MODEL = "wrong_model"
    VERSION = "wrong_version"
    BASE = "wrong_base"
    SHAPE = "wrong_shape"
    CHAIN = "wrong_chain"
    TENSORS = "wrong_tensors"
    INDEXES = "bad_indexes"
    NOT_FINITE = "not_finite"


class Refused(AdapterError):
    """A message is not believed; nothing was changed by it.

    Args:
        reason: Which rule it breaks; `code` is the same word.
        message: What was wrong, the value seen, what is allowed.
        hint: What to do next.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.code = str(reason)


@dataclass(frozen=True, slots=True)
class Head:
    """What a message says of itself, its sizes checked, its words not yet.

    Attributes:
        meta: The header's JSON text.
        counts: Numbers in each tensor, by name.
    """

    meta: str
    counts: Mapping[str, int]


HeaderT = TypeVar("HeaderT", bound=BaseModel)


def pack(parts: Parts, header: BaseModel) -> bytes:
    """A message. Same parts and same header give the same bytes.

    Args:
        parts: Tensors to send, each C-contiguous.
        header: Its first field must be `sha256`, and hold `NO_CHECKSUM`.

    Raises:
        AdapterError: If safetensors writes headers in a way that this does not know.
    """
    plain = save(dict(parts), {KEY: header.model_dump_json()})
    end = CHECKSUM_AT + len(NO_CHECKSUM)
    if not plain.startswith(OPENING, SIZE_BYTES) or plain[CHECKSUM_AT:end] != NO_CHECKSUM.encode():
        raise AdapterError(
            f"safetensors began a header with {plain[SIZE_BYTES : SIZE_BYTES + 40]!r}; expected a checksum"
        )
    return b"".join((plain[:CHECKSUM_AT], hashlib.sha256(plain).hexdigest().encode(), memoryview(plain)[end:]))


def read_head(data: bytes, *, most: int, most_header: int) -> Head:
    """Checks a message's sizes before anything is made of it, then its checksum.

    Args:
        data: The message.
        most: Bytes it may have.
        most_header: Bytes its header may have.

    Raises:
        Refused: If it is too large, cut short, damaged, or no safetensors of plain number vectors.
    """
    if len(data) > most:
        raise Refused(Reason.OVERSIZED, f"a message of {len(data)} bytes; at most {most} are allowed")
    if len(data) < CHECKSUM_AT + len(NO_CHECKSUM):
        raise Refused(Reason.TRUNCATED, f"a message of {len(data)} bytes is too short to have a header")
    size = int.from_bytes(data[:SIZE_BYTES], "little")
    if size > most_header:
        raise Refused(Reason.OVERSIZED, f"the header says it has {size} bytes; at most {most_header} are allowed")
    begin = SIZE_BYTES + size
    if begin > len(data):
        raise Refused(Reason.TRUNCATED, f"the header says it has {size} bytes; the message has {len(data)} in all")
    try:
        header = orjson.loads(memoryview(data)[SIZE_BYTES:begin])
    except ValueError as e:
        raise Refused(Reason.DAMAGED, f"the header is not JSON: {e}") from e
    if not data.startswith(OPENING, SIZE_BYTES):
        raise Refused(Reason.HEADER, "the header does not begin with a checksum: this is no message of a federation")
    meta = header.pop("__metadata__")
    if not isinstance(meta, dict) or set(meta) != {KEY} or not isinstance(meta[KEY], str):
        raise Refused(Reason.HEADER, f"the metadata is {_short(meta)}; one text named {KEY!r} is allowed")
    counts = {name: _count(name, tensor) for name, tensor in header.items()}
    payload = sum(counts[name] * WIDTHS[tensor["dtype"]] for name, tensor in header.items())
    if payload > len(data) - begin:
        raise Refused(Reason.TRUNCATED, f"{payload} bytes of tensors are announced, {len(data) - begin} have come")
    if payload < len(data) - begin:
        raise Refused(Reason.DAMAGED, f"{len(data) - begin - payload} bytes belong to no tensor")
    _check_sum(data)
    return Head(meta[KEY], counts)


def read_header(head: Head, kind: type[HeaderT]) -> HeaderT:
    """A message's header, checked against its schema.

    Raises:
        Refused: If it is of another format, lacks a field, has one too many, or has a value that is not allowed.
    """
    try:
        return kind.model_validate_json(head.meta)
    except ValidationError as e:
        errors = e.errors(include_url=False, include_context=False)
        first = next((error for error in errors if error["loc"][:1] in (("format",), ("kind",))), errors[0])
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise Refused(
            Reason.FORMAT if where in ("format", "kind") else Reason.HEADER,
            f"{where}: {first['msg']}, not {_short(first['input'])}",
            hint="run the same version of agora on both sides" if where == "format" else None,
        ) from None


def read_parts(data: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a message whose head was read.

    Raises:
        Refused: If safetensors finds fault with it.
    """
    try:
        return dict(load(data))
    except SafetensorError as e:
        raise Refused(Reason.DAMAGED, f"safetensors cannot read the message: {e}") from e


def _count(name: str, tensor: Any) -> int:
    """Numbers in a tensor, from its description."""
    match tensor:
        case {"dtype": str(dtype), "shape": [int(count)], "data_offsets": [int(), int()]} if (
            dtype in WIDTHS and count >= 0 and len(tensor) == 3
        ):
            return count
        case _:
            raise Refused(
                Reason.TENSORS,
                f"tensor {_short(name)} is described as {_short(tensor)}; a vector of {', '.join(WIDTHS)} is allowed",
            )


def _check_sum(data: bytes) -> None:
    end = CHECKSUM_AT + len(NO_CHECKSUM)
    told = data[CHECKSUM_AT:end]
    digest = hashlib.sha256(data[:CHECKSUM_AT])
    digest.update(NO_CHECKSUM.encode())
    digest.update(memoryview(data)[end:])
    if digest.hexdigest().encode() != told:
        raise Refused(
            Reason.CHECKSUM,
            f"the message says its sha256 is {told[:12]!r}…, it is {digest.hexdigest()[:12]}…",
            hint="it was changed on its way; send it again",
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[:VALUE_CHARACTERS]}…"


def check_finite(values: NDArray[np.float32], what: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        Refused: If there is one; the text says how many.
    """
    finite = np.isfinite(values)
    if not finite.all():
        raise Refused(
            Reason.NOT_FINITE,
            f"{int(values.size - np.count_nonzero(finite))} of {values.size} {what} are NaN or infinite",
        )
