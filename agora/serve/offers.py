"""Which of the experts that neighbours tell of join the square, and by which way each is reached."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from agora.serve.node_card import Node, ToldExpert, Way
from agora.types import ID, ExpertCard, Tier, highest, lowest


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """An expert as one neighbour tells of it: a way to it.

    Attributes:
        neighbour: The neighbour's name in the configuration.
        name: What the expert is called here, `NEIGHBOUR.NAME`.
        told: What the card says.
        card: Its card here. Its tier is the highest that a request to it passes, as far as that is known: what may not
            go as far as a relay may not be asked through it.
    """

    neighbour: str
    name: str
    told: ToldExpert
    card: ExpertCard

    @property
    def expert(self) -> tuple[str, str]:
        """Whom it leads to: the machine it is on, and its name there. Two offers of the same are two ways to it."""
        return self.told.origin, self.told.name_there

    @property
    def way(self) -> Way:
        """Where it really is."""
        return Way(path=self.told.path, origin_name=self.told.origin_name, name_there=self.told.name_there)

    @property
    def node(self) -> str:
        """What to call its machine here: by the neighbour's name, and for one behind it by that one's own name too."""
        return f"{self.neighbour}.{self.told.origin_name}" if self.told.hops else self.neighbour


def offers_of(
    neighbour: str,
    told: Sequence[ToldExpert],
    *,
    node: str,
    max_hops: int,
    wanted: Collection[str] | None,
    tier: Tier | None = None,
) -> tuple[tuple[Offer, ...], tuple[str, ...]]:
    """What a neighbour's card offers to this node.

    Args:
        neighbour: The neighbour's name in the configuration.
        told: The experts on its card.
        node: The id of this node.
        max_hops: Machines that a request which begins here may pass.
        wanted: Names there that may be asked; None for all.
        tier: Where the neighbour's machine stands, as seen from here: every request to its experts gets there, and what
            is the end tier to it is another machine to this one. `standing` of what it tells, if None.

    Returns:
        The offers; and what is left out for a reason that its owner can mend.
    """
    tier = standing(told) if tier is None else tier
    offers, refused = [], []
    tiers = _tiers(told)
    for entry in told:
        if node in entry.path or len(entry.path) > max_hops or (wanted is not None and entry.name not in wanted):
            continue  # our own expert, told back to us, or one that is too far away: as it should be
        name = f"{neighbour}.{entry.name}"
        if ID.fullmatch(name) is None:
            refused.append(f"{entry.name}: its name here, {name!r}, would be longer than 64 characters")
            continue
        passed = [tiers[relay] for relay in entry.path[:-1] if relay in tiers]
        card = replace(entry.card(name), tier=highest(tier, entry.tier, *passed))
        offers.append(Offer(neighbour=neighbour, name=name, told=entry, card=card))
    return tuple(offers), tuple(refused)


def standing(told: Sequence[ToldExpert], node: Node | None = None, *, configured: Tier | None = None) -> Tier:
    """Where a neighbour's machine stands, as seen from here.

    What is configured here counts. Else what its card says of it, or else the tier of its own experts, which are on it
    or on servers behind it, further up; but it is no machine of one's own because it says so. Where it tells nothing,
    as one that only passes requests on, it is as far up as can be.

    Args:
        told: The experts on its card.
        node: Who it says it is.
        configured: What this node's configuration says of it.
    """
    if configured is not None:
        return configured
    if node is not None and node.tier is not None:
        return highest(Tier.EDGE, node.tier)
    own = [entry.tier for entry in told if entry.hops == 0]
    return highest(Tier.EDGE, lowest(*own)) if own else Tier.CLOUD


def _tiers(told: Sequence[ToldExpert]) -> Mapping[str, Tier]:
    """The tier of each machine that has experts of its own: the lowest of theirs.

    Those experts are on the machine itself, or on servers behind it, which stand no lower. A machine further on that
    has none is in the tier that the neighbour tells of what lies behind it, since it counts every machine on the way
    as this node does.
    """
    tiers: dict[str, Tier] = {}
    for entry in told:
        tiers[entry.origin] = lowest(entry.tier, tiers.get(entry.origin, Tier.CLOUD))
    return tiers


def chosen(offers: Iterable[Offer], taken: Collection[str]) -> Mapping[str, Offer]:
    """Who should be in the square: of several ways to one expert only the shortest, of equal ones the first.

    Args:
        offers: Of all neighbours that are up, in the order of the configuration.
        taken: Names that others in the square have.

    Returns:
        By their names here.
    """
    best: dict[tuple[str, str], Offer] = {}
    for offer in offers:
        known = best.get(offer.expert)
        if offer.name not in taken and (known is None or offer.told.hops < known.told.hops):
            best[offer.expert] = offer
    named: dict[str, Offer] = {}
    for offer in best.values():
        named.setdefault(offer.name, offer)
    return named
