"""What a backend must be able to do for a signal to be had of it, so that what never can be had is said beforehand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from agora.routing.signals import ENTROPY, P_TRUE
from agora.square import Expert

NEEDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({ENTROPY: ("logprobs",), P_TRUE: ("score", "logprobs")})
"""Names of `agora.protocols.Capabilities` one of which it takes; signals that are not here can be had of everybody."""


def out_of_reach(experts: Iterable[Expert], names: Collection[str]) -> tuple[str, ...]:
    """Says of whom which of these signals can never be had, and why: one note a signal."""
    notes = []
    for name in names:
        needs = NEEDS.get(name, ())
        unable = [e for e in experts if needs and not any(getattr(e.backend.capabilities, n) for n in needs)]
        if unable:
            notes.append(
                f"{name} cannot be had of {', '.join(e.name for e in unable)}: what answers there does not claim"
                f" {' or '.join(needs)} (if it can, say so in [nodes.{unable[0].node}.capabilities])"
            )
    return tuple(notes)
