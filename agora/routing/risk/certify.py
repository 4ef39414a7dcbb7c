"""The cheapest policy of a family that provably loses little: Learn-then-Test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest
from agora.routing.risk.betting import MOST_OF_LIMIT, betting_p_values, checked_losses, checked_share

ROUNDING: Final = 1e-9
"""Relative error of a p-value that must not undo a bet which reached its target exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was promised, and for which policy.

    Attributes:
        max_risk: Most mean loss that is allowed.
        confidence: Probability, over the draw of the rows, with which every certified policy keeps to it.
        n: Rows it was judged on.
        chosen: Position in the family of the cheapest certified policy; None if none is certified, so that only always
            asking the top tier, which loses nothing by definition, keeps the promise.
        certified: Positions of all certified policies, the cheapest first.
        mean_loss: Mean loss of the chosen policy on these rows; 0 for none.
        p_values: Of all policies of the family, 1 for those not tested because a dearer one had failed.
    """

    max_risk: float
    confidence: float
    n: int
    chosen: int | None
    certified: tuple[int, ...]
    mean_loss: float
    p_values: tuple[float, ...]

    @property
    def why(self) -> str:
        """What is promised, in words."""
        sure = f"with confidence {self.confidence:g} on {self.n} questions"
        if self.chosen is None:
            return (
                f"nothing certified: no policy cheaper than always the top tier loses at most {self.max_risk:g} {sure};"
                " the top tier is always asked"
            )
        return (
            f"certified: it loses at most {self.max_risk:g} against always the top tier {sure}"
            f" (lost on these: {self.mean_loss:.3f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {
            "max_risk": self.max_risk,
            "confidence": self.confidence,
            "n": self.n,
            "chosen": self.chosen,
            "certified": list(self.certified),
            "mean_loss": self.mean_loss,
            "p_values": list(self.p_values),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Certificate:
        """Reads what `to_dict` wrote."""
        return cls(
            max_risk=float(plain["max_risk"]),
            confidence=float(plain["confidence"]),
            n=int(plain["n"]),
            chosen=None if plain["chosen"] is None else int(plain["chosen"]),
            certified=tuple(int(i) for i in plain["certified"]),
            mean_loss=float(plain["mean_loss"]),
            p_values=tuple(float(p) for p in plain["p_values"]),
        )


def certify(losses: NDArray[np.float64], *, max_risk: float, confidence: float, seed: int = 0) -> Certificate:
    """Certifies the cheapest policies of a family that lose at most `max_risk` on average.

    Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052): each policy's hypothesis "mean loss > max_risk" is
    tested with a betting p-value, in a fixed sequence from the dearest (safest) to the cheapest, each at the full level
    1 − confidence, until the first that cannot be rejected. The probability that any certified policy breaks the
    promise is then at most 1 − confidence, however many policies there are. No split of the level is needed, because
    neighbours' losses are alike: who passes one mostly passes all before it. (On four recorded populations and samples
    of 500 to 3000 rows it kept 2 to 5 points more of the possible saving than three starts that share the level, and as
    much or more than beginning in the middle, by itself or with a fifth of the level for the safe end.)

    For the promise to hold, the policies and their order must come from other rows than these, and these rows must be
    drawn like the questions to come. Calling it again with other seeds until something is certified voids it.

    Args:
        losses: Shape (n, k): for each row, quality of the top tier's answer minus that of each policy's, in [−1, 1];
            policies from the cheapest to the dearest. Always asking the top tier is not among them (k may be 0).
        max_risk: In (0, 1).
        confidence: In (0, 1).
        seed: Of the order in which rows are bet on, which must not depend on what is in them, as that of a file that is
            sorted might.

    Returns:
        What is certified. Nothing certified is a normal outcome, and says so.

    Raises:
        InvalidRequest: If an argument is out of range, or there is no row.
    """
    alpha, sure = checked_share("max_risk", max_risk), checked_share("confidence", confidence)
    table = np.asarray(losses, dtype=np.float64)
    if table.ndim != 2 or not len(table):
        raise InvalidRequest(
            f"losses have shape {table.shape}; a table of rows × policies with at least one row needed"
        )
    n, k = table.shape
    p_values = np.ones(k)
    if k:
        table = checked_losses(table)
        shuffled = table[np.random.default_rng(seed).permutation(n)]
        p_values = betting_p_values(shuffled, alpha, level=1 - sure)
    first = first_certified(p_values, 1 - sure)
    return Certificate(
        max_risk=alpha,
        confidence=sure,
        n=n,
        chosen=first if first < k else None,
        certified=tuple(range(first, k)),
        mean_loss=float(table[:, first].mean()) if first < k else 0.0,
        p_values=tuple(float(p) if i >= first - 1 else 1.0 for i, p in enumerate(p_values)),
    )


def rows_needed(max_risk: float, confidence: float) -> int:
    """Rows below which not even a policy that never loses could be certified: bets can only grow so fast.

    Raises:
        InvalidRequest: If an argument is out of range.
    """
    alpha, sure = checked_share("max_risk", max_risk), checked_share("confidence", confidence)
    rows = max(1, math.ceil(-math.log(1 - sure) / math.log1p(MOST_OF_LIMIT * alpha / (1 - alpha))))
    # Bets begin small, on a variance that is guessed too high: a few more rows than at the largest bet.
    while betting_p_values(np.zeros((rows, 1)), alpha, level=1 - sure)[0] > (1 - sure) * (1 + ROUNDING):
        rows += max(1, rows // 50)
    return rows


def first_certified(p_values: NDArray[np.float64], level: float) -> int:
    """Fixed-sequence testing from the last policy down.

    Returns:
        Position of the cheapest policy of the unbroken run of rejections that ends with the last; their number if the
        last one is not rejected.
    """
    failed = np.flatnonzero(p_values > level * (1 + ROUNDING))
    return int(failed[-1]) + 1 if len(failed) else 0
