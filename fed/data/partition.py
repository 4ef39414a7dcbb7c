"""Dividing rows among clients: every row goes to exactly one, and the same seed gives the same division."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest
from fed.data.example import Example, Subset

MAX_DRAWS: Final = 2_000
"""Draws of a Dirichlet partition until every client has enough rows; a tenth of a second or so. With 10 clients, two
labels and a least of 1 % of the rows, one draw in 8 does at alpha 0.3 and one in 400 at alpha 0.1."""

NO_GROUP: Final = "other"
"""Group of the rows that name none."""

Rows = NDArray[np.int64]
"""Row numbers, shape (rows of the client,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Which rows each client has.

    Attributes:
        rows: Row numbers by client, in rising order.
    """

    rows: Mapping[str, Rows]

    def of(self, examples: Sequence[Example]) -> dict[str, Subset]:
        """The clients' examples; nothing is copied."""
        return {client: Subset(examples, rows.tolist()) for client, rows in self.rows.items()}


class Split(Protocol):
    """A way to divide rows among clients."""

    def split(self, examples: Sequence[Example], clients: int | None, seed: int) -> Partition:
        """Divides the rows.

        Args:
            examples: The rows.
            clients: How many clients; None for as many as the data suggests, where it suggests a number.
            seed: Of everything random in it.

        Raises:
            InvalidRequest: If it cannot be done, as with more clients than rows.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Iid:
    """Rows at random, the same number for everybody, give or take one."""

    def split(self, examples: Sequence[Example], clients: int | None, seed: int) -> Partition:
        """See `Split`."""
        count = _checked(examples, clients)
        order = np.random.default_rng(seed).permutation(len(examples))
        return _partition(_names(count), np.array_split(order, count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dirichlet:
    """Label skew: each label's rows are shared out in proportions drawn from Dir(α) (Hsu, Qi and Brown 2019,
    arXiv 1909.06335; per label as in Yurochkin et al. 2019, arXiv 1905.12022).

    Drawn again until every client has enough rows, at most `MAX_DRAWS` times.

    Attributes:
        alpha: α: 0.1 is strong skew, 100 next to none.
        least: Rows every client must have.
    """

    alpha: float = 0.5
    least: int = 1

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InvalidRequest(f"alpha of a Dirichlet partition is {self.alpha}; allowed: numbers above 0")
        if self.least < 1:
            raise InvalidRequest(f"least of a Dirichlet partition is {self.least}; a client needs at least 1 row")

    def split(self, examples: Sequence[Example], clients: int | None, seed: int) -> Partition:
        """See `Split`.

        Raises:
            InvalidRequest: Also if there are fewer than two labels, or no draw gave every client enough rows.
        """
        count = _checked(examples, clients)
        by_label = _by(examples, "label")
        if len(by_label) < 2:
            raise InvalidRequest(
                f"label skew over {len(examples):,} rows that all have the label {next(iter(by_label))!r}; "
                "at least two labels are needed",
                hint="use another partition, or name the field that holds the label",
            )
        if self.least * count > len(examples):
            raise InvalidRequest(
                f"{count} clients of at least {self.least} rows need {self.least * count:,} rows; there are "
                f"{len(examples):,}"
            )
        rng = np.random.default_rng(seed)
        labels = list(by_label.values())
        for _ in range(MAX_DRAWS):
            sizes = [self._sizes(len(rows), count, rng) for rows in labels]
            if np.sum(sizes, axis=0).min() >= self.least:
                pieces = [
                    np.split(rng.permutation(rows), np.cumsum(own)[:-1])
                    for rows, own in zip(labels, sizes, strict=True)
                ]
                return _partition(_names(count), [np.concatenate(own) for own in zip(*pieces, strict=True)])
        raise InvalidRequest(
            f"{MAX_DRAWS:,} draws of a Dirichlet partition with alpha {self.alpha} left one of {count} clients with "
            f"fewer than {self.least} of {len(examples):,} rows",
            hint="take a larger alpha, fewer clients, or a smaller least",
        )

    def _sizes(self, total: int, count: int, rng: np.random.Generator) -> Rows:
        """How many of a label's rows each client gets, shape (count,)."""
        shares = rng.dirichlet(np.full(count, self.alpha))
        if not np.isfinite(shares).all() or shares.sum() <= 0:  # α so small that every gamma draw came to zero
            shares = np.eye(count)[rng.integers(count)]
        cuts = np.round(np.cumsum(shares)[:-1] * total).astype(np.int64)
        return np.diff(cuts, prepend=0, append=total)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByGroup:
    """By task, discipline or source: a client sees as few groups as can be.

    Without a number of clients, each group is a client of that name. With fewer clients than groups, whole groups are
    dealt out, the largest first and each to the client with the fewest rows; with more, every client has one group,
    and the groups get clients in proportion to their rows.
    """

    def split(self, examples: Sequence[Example], clients: int | None, seed: int) -> Partition:
        """See `Split`.

        Raises:
            InvalidRequest: Also if no row names a group.
        """
        groups = _by(examples, "group")
        if not groups or list(groups) == [""]:
            raise InvalidRequest(
                "a partition by group, but no row names one", hint="name the field that holds the group"
            )
        named = {name or NO_GROUP: rows for name, rows in groups.items() if name or NO_GROUP not in groups}
        if "" in groups and NO_GROUP in groups:
            named[NO_GROUP] = np.concatenate([groups[NO_GROUP], groups[""]])
        if clients is None:
            return _partition(list(named), list(named.values()))
        count = _checked(examples, clients)
        largest_first = sorted(named.values(), key=lambda rows: (-len(rows), int(rows[0])))
        if count <= len(named):
            dealt: list[list[Rows]] = [[] for _ in range(count)]
            for rows in largest_first:
                min(dealt, key=lambda held: sum(len(r) for r in held)).append(rows)
            return _partition(_names(count), [np.concatenate(held) for held in dealt])
        rng = np.random.default_rng(seed)
        counts = _apportioned(np.array([len(r) for r in largest_first], float), count, least=1)
        if any(n > len(rows) for n, rows in zip(counts, largest_first, strict=True)):
            raise InvalidRequest(f"{count} clients for groups of {[len(r) for r in largest_first][:10]} rows")
        parts = [
            piece
            for rows, n in zip(largest_first, counts, strict=True)
            for piece in np.array_split(rng.permutation(rows), n)
        ]
        return _partition(_names(count), parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByQuantity:
    """Rows at random, but some clients have more of them.

    Attributes:
        exponent: Of the power law: the i-th client's share goes as i^−exponent; 0 gives all the same.
        shares: Shares instead of a power law, one a client, in any unit.
        least: Rows every client must have.
    """

    exponent: float = 1.0
    shares: tuple[float, ...] | None = None
    least: int = 1

    def __post_init__(self) -> None:
        if not (self.exponent >= 0 and math.isfinite(self.exponent)):
            raise InvalidRequest(f"exponent of a partition by quantity is {self.exponent}; allowed: numbers from 0")
        if self.least < 1:
            raise InvalidRequest(f"least of a partition by quantity is {self.least}; a client needs at least 1 row")
        if self.shares is not None and not (self.shares and all(math.isfinite(s) and s > 0 for s in self.shares)):
            raise InvalidRequest(f"shares of a partition by quantity are {self.shares}; allowed: numbers above 0")

    def split(self, examples: Sequence[Example], clients: int | None, seed: int) -> Partition:
        """See `Split`."""
        if self.shares is not None and clients not in (None, len(self.shares)):
            raise InvalidRequest(f"{len(self.shares)} shares for {clients} clients", hint="give one share a client")
        count = _checked(examples, len(self.shares) if self.shares is not None else clients)
        if self.least * count > len(examples):
            raise InvalidRequest(
                f"{count} clients of at least {self.least} rows need {self.least * count:,} rows; there are "
                f"{len(examples):,}"
            )
        power = np.arange(1, count + 1, dtype=float) ** -self.exponent
        wanted = np.array(self.shares, float) if self.shares is not None else power
        sizes = _apportioned(wanted, len(examples), least=self.least)
        order = np.random.default_rng(seed).permutation(len(examples))
        return _partition(_names(count), np.split(order, np.cumsum(sizes)[:-1]))


PARTITIONS: Final[Mapping[str, type[Iid] | type[Dirichlet] | type[ByGroup] | type[ByQuantity]]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "group": ByGroup,
    "quantity": ByQuantity,
}
"""Ways to divide rows, by the name a configuration calls them."""


def _checked(examples: Sequence[Example], clients: int | None) -> int:
    if clients is None:
        raise InvalidRequest("this partition needs the number of clients")
    if clients < 1:
        raise InvalidRequest(f"a partition among {clients} clients; at least 1 is needed")
    if clients > len(examples):
        raise InvalidRequest(
            f"{len(examples):,} rows for {clients:,} clients; each needs at least one",
            hint="take fewer clients or more rows",
        )
    return clients


def _by(examples: Sequence[Example], what: str) -> dict[str, Rows]:
    """Row numbers by label or group, names in alphabetical order."""
    found: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        found.setdefault(getattr(example, what), []).append(i)
    return {name: np.array(found[name], np.int64) for name in sorted(found)}


def _apportioned(shares: NDArray[np.float64], total: int, *, least: int) -> list[int]:
    """Whole numbers in proportion to shares: largest remainders (Hamilton's method); who would have less than the least
    gets it from the largest."""
    exact = shares / shares.sum() * total
    # Rounded first, so that a share that is whole but for the last bit does not lose a row.
    whole = np.floor(np.round(exact, 9)).astype(np.int64)
    for i in np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]:
        whole[i] += 1
    for i in np.flatnonzero(whole < least):
        lacking = least - int(whole[i])
        whole[i] = least
        for _ in range(lacking):
            whole[np.argmax(whole)] -= 1
    return [int(n) for n in whole]


def _names(count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"client-{i:0{width}}" for i in range(count)]


def _partition(names: Sequence[str], parts: Sequence[Rows]) -> Partition:
    return Partition(rows={name: np.sort(rows) for name, rows in zip(names, parts, strict=True)})
