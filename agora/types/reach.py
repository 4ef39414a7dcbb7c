"""Labels on data: how far up from the user's own machine a text, and whatever is derived from it, may go.

A label names the highest tier whose machines may see the text: `local` the user's own (tier end), `edge` those and the
ones nearby (tiers end and edge), `cloud` any. What uses labelled data has at most the label of that data.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from agora.errors import InvalidRequest
from agora.types.words import Tier

LABELS: Final[Mapping[str, Tier]] = MappingProxyType({"local": Tier.END, "edge": Tier.EDGE, "cloud": Tier.CLOUD})
"""The labels in the user's words, and the highest tier of each."""

_READ: Final[Mapping[str, Tier]] = MappingProxyType({**LABELS, **{str(t): t for t in Tier}})
_TOLD: Final[Mapping[Tier, str]] = MappingProxyType({tier: label for label, tier in LABELS.items()})


def reach_of(label: object, *, what: str = "reach") -> Tier:
    """The highest tier that a label allows; `end` is another word for `local`.

    Args:
        label: `local`, `edge` or `cloud`, or a `Tier`.
        what: What to call it in the error.

    Raises:
        InvalidRequest: If it is something else.
    """
    tier = _READ.get(label) if isinstance(label, str) else None
    if tier is None:
        seen = repr(label)
        raise InvalidRequest(
            f"{what} is {seen if len(seen) <= 80 else seen[:79] + '…'}; allowed: {', '.join(LABELS)}",
            hint="it says how far the data may go",
        )
    return tier


def label_of(reach: Tier) -> str:
    """The label that allows tiers up to `reach`."""
    return _TOLD[reach]


def lowest(*reaches: Tier) -> Tier:
    """What is allowed where all of these hold; anything for none."""
    return min(reaches, key=_height, default=Tier.CLOUD)


def highest(*tiers: Tier) -> Tier:
    """How far up something comes that passes machines of these tiers; the end tier for none."""
    return max(tiers, key=_height, default=Tier.END)


def _height(tier: Tier) -> int:
    return tier.height
