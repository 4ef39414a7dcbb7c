"""The other direction: a version of an adapter as it is sent to a client, four bytes a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from agora.errors import InvalidRequest
from fed.adapter import Adapter
from fed.chain.stage import VALUES
from fed.headers import SpecBody, VersionHeader
from fed.wire import Reason, Refused, check_finite, pack, read_head, read_header, read_parts

MAX_HEADER_BYTES: Final = 2**22
"""Of a version's header, which names every tensor: 300 bytes a layer, so 70 KB for 224 layers."""

MAX_NUMBERS: Final = 2**30
"""Most numbers in an adapter that a client takes by default: rank 256 on all layers of an 8B model is 0.7·10⁹."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Version:
    """A version of a model, as a client receives it.

    Attributes:
        federation: Which run of which federation.
        model: Which model: a cluster's name.
        number: Of the version.
        adapter: Its numbers and what they mean.
        encoded_bytes: Bytes of the message it was read from; 0 at the server.
    """

    federation: str
    model: str
    number: int
    adapter: Adapter
    encoded_bytes: int = 0


def encode_version(version: Version) -> bytes:
    """The message; same version, same bytes.

    Raises:
        InvalidRequest: If a name in it is one that no header can tell.
        Refused: If a number is not finite.
    """
    check_finite(version.adapter.flat, "numbers of the version")
    try:
        header = VersionHeader(
            federation=version.federation,
            model=version.model,
            version=version.number,
            spec=SpecBody.of(version.adapter.spec),
        )
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"this version cannot be sent: {where}: {first['msg']}, not {first['input']!r}") from e
    return pack({VALUES: version.adapter.flat}, header)


def decode_version(
    data: bytes, *, federation: str | None = None, base: str | None = None, max_numbers: int = MAX_NUMBERS
) -> Version:
    """Reads a version.

    Args:
        data: The message.
        federation: Which one the client takes part in; None for any.
        base: Fingerprint of the client's base model; None for any.
        max_numbers: Most numbers it may have.

    Raises:
        Refused: If it is damaged, oversized, of another federation or base model, or not finite.
    """
    head = read_head(data, most=8 + MAX_HEADER_BYTES + 4 * max_numbers, most_header=MAX_HEADER_BYTES)
    header = read_header(head, VersionHeader)
    if federation is not None and header.federation != federation:
        raise Refused(Reason.FEDERATION, f"the version is of federation {header.federation!r}; expected {federation!r}")
    if base is not None and header.spec.base != base:
        raise Refused(Reason.BASE, f"the version's base model is {header.spec.base!r}; this client's is {base!r}")
    spec = header.spec.spec()
    if spec.size > max_numbers:
        raise Refused(Reason.OVERSIZED, f"an adapter of {spec.size} numbers; at most {max_numbers} are allowed")
    if dict(head.counts) != {VALUES: spec.size}:
        raise Refused(Reason.TENSORS, f"tensors of {dict(head.counts)} numbers; expected {VALUES!r} of {spec.size}")
    values = read_parts(data)[VALUES]
    if values.dtype != "float32":
        raise Refused(Reason.TENSORS, f"the version's numbers are {values.dtype}; expected float32")
    check_finite(values, "numbers of the version")
    return Version(
        federation=header.federation,
        model=header.model,
        number=header.version,
        adapter=Adapter(spec, values),
        encoded_bytes=len(data),
    )
