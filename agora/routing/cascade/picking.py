"""Which kind of policy to keep: what each came to in validation, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.frontier import hull, under_curve
from agora.routing.cascade.rules import Cascade, Rule, Single

Floats = NDArray[np.float64]

HALVINGS: Final = 6
"""Times that the questions are halved to judge the kinds: twice as many judgements of each, from whose spread a
standard error is told. It costs no fits, but choosing anew on each half. Not tuned."""

ERRORS: Final = 2.0
"""Standard errors of a comparison by which a kind must be better than a simpler one: 95 % sure."""

SIMPLER_FIRST: Final = ("single", "routing", "cascade", "cascade_routing", "stopping")
"""Kinds by how much they have to learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Rules, and what each of k came to on each of n questions.

    Attributes:
        rules: The rules.
        cost: Money, shape (k, n).
        quality: How right, shape (k, n).
    """

    rules: tuple[Rule, ...]
    cost: Floats
    quality: Floats

    def kept(self, rows: NDArray[np.int_] | slice = slice(None)) -> list[int]:
        """Rules that make the curve, judged by some questions, rising in cost.

        A cascade or single model is kept if it is on the upper concave hull. Of the other kinds, which have one rule
        for each worth of an answer, all are: to pick the luckiest of neighbours on 400 questions loses on others.
        """
        cost, quality = self.cost[:, rows].mean(axis=1), self.quality[:, rows].mean(axis=1)
        if isinstance(self.rules[0], Single | Cascade):
            return hull(cost, quality)
        order = np.argsort(cost, kind="stable")
        return [int(i) for k, i in enumerate(order) if k == 0 or cost[i] > cost[order[k - 1]]]


def judgements(tried: Mapping[str, Tried], rng: np.random.Generator) -> dict[str, Floats]:
    """Quality under each kind's curve beyond that of mixing single models, rules being kept on one half of the
    questions and judged on the other; of all kinds on the same halves, shape (2 · `HALVINGS`,) each.

    Without the halves a kind would look the better the more rules it has to pick from.
    """
    singles = tried["single"]
    n = singles.cost.shape[1]
    gains: dict[str, list[float]] = {kind: [] for kind in tried}
    for _ in range(HALVINGS):
        order = rng.permutation(n)
        for chosen, judged in ((order[: n // 2], order[n // 2 :]), (order[n // 2 :], order[: n // 2])):
            means = singles.cost[:, judged].mean(axis=1)
            low, high = float(means.min()), float(means.max())
            areas = {kind: _area(table, chosen, judged, low, high) for kind, table in tried.items()}
            for kind, area in areas.items():
                gains[kind].append(area - areas["single"])
    return {kind: np.array(values) for kind, values in gains.items()}


def _area(table: Tried, chosen: NDArray[np.int_], judged: NDArray[np.int_], low: float, high: float) -> float:
    if high <= low:
        return 0.0
    kept = table.kept(chosen)
    cost, quality = table.cost[kept][:, judged].mean(axis=1), table.quality[kept][:, judged].mean(axis=1)
    order = np.argsort(cost, kind="stable")
    return under_curve(cost[order], quality[order], low, high)


def pick(judged: Mapping[str, Floats]) -> str:
    """The simplest kind that none beats by more than `ERRORS` errors of the comparison.

    Source: the standard-error rule of Breiman et al. (1984), "Classification and Regression Trees". The deviation among
    halves is the standard error of the whole (McCarthy 1969, half-sample replication). Mixing single models is
    what is fallen back on where the kind picked does not gain; routing, whose forecasts shrink to the usual where
    nothing can be told, counts as no less simple, and stands unless it loses by more than those errors.

    Why routing is not dropped as soon as its validated gain is not above 0: on 20 random splits of MATH (430 questions
    to validate on, errors of 0.01) that was so in 6. On the rest of their questions routing gained 0.008 over the hull,
    where the mix that would have been fallen back on lost 0.007.
    """
    picked = "routing"
    for kind in SIMPLER_FIRST[2:]:
        over = judged[kind] - judged[picked]
        if over.mean() > ERRORS * over.std():
            picked = kind
    if picked == "routing" and judged[picked].mean() <= 0:
        # who loses to mixing at random does not stand against one that gains by more than the error
        for kind in SIMPLER_FIRST[2:]:
            gain = judged[kind]
            if gain.mean() > max(gain.std(), judged[picked].mean()):
                picked = kind
    loss = -judged[picked]
    fallen = loss.mean() > ERRORS * loss.std() if picked == "routing" else loss.mean() >= 0
    return "single" if fallen else picked


def why(picked: str, gains: Mapping[str, float]) -> str:
    """Says in a line why a kind was picked; `gains` are over mixing single models."""
    told = ", ".join(f"{kind} {gain:+.4f}" for kind, gain in gains.items() if kind != "single")
    if picked == "single":
        return f"no kind gains over the best random mix of single models in validation: {told}"
    return f"{picked}: no simpler kind does as well, by more than chance, in gain over mixing single models: {told}"
