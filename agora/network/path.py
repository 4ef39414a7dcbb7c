"""Links, and paths made of links."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from agora.errors import InvalidRequest


class Technology(StrEnum):
    """Kinds of links."""

    NR = "5g"
    LTE = "4g"
    WIFI = "wifi"
    V2V = "v2v"
    ETHERNET = "ethernet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link from one machine to another.

    Attributes:
        name: Unique in its topology.
        source: The machine that requests come from.
        target: The machine that they go to.
        technology: What it is.
        up_mbps: Megabits per second from source to target; 0 for a link that is dead, None where nobody knows.
        down_mbps: Megabits per second back.
        rtt_s: Round-trip time of a small packet, in seconds.
        price_per_mb: Money per megabyte (10⁶ bytes), either way.
        availability: Share of the time that it works.

    Raises:
        InvalidRequest: If a number is negative, NaN or infinite, or the link goes from a machine to itself.
    """

    name: str
    source: str
    target: str
    technology: Technology
    up_mbps: float | None = None
    down_mbps: float | None = None
    rtt_s: float | None = None
    price_per_mb: float = 0.0
    availability: float | None = None

    def __post_init__(self) -> None:
        if self.source == self.target:
            raise InvalidRequest(f"link {self.name!r} goes from {self.source!r} to itself")
        for name in ("up_mbps", "down_mbps", "rtt_s", "price_per_mb", "availability"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name} of link {self.name!r} is {value}; it must be a number ≥ 0")
        if self.availability is not None and self.availability > 1:
            raise InvalidRequest(f"availability of link {self.name!r} is {self.availability}; it must be at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A way to a machine that answers: one link, or several with relays between them.

    Attributes:
        name: Unique among the paths to the same help, like `wifi` or `v2v+5g`.
        links: In the order that a request passes them; empty for this very machine.
        target: The machine that answers.
    """

    name: str
    links: tuple[Link, ...]
    target: str

    @property
    def relays(self) -> tuple[str, ...]:
        """The machines between, in order."""
        return tuple(link.target for link in self.links[:-1])

    @property
    def price_per_mb(self) -> float:
        """Money per megabyte: every link is paid."""
        return sum(link.price_per_mb for link in self.links)
