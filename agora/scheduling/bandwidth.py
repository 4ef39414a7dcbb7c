"""Splits a cell's band among concurrent transfers.

User i with spectral efficiency e_i (bits per second per hertz) and a share b_i of the band (hertz) gets the rate
r_i = b_i·e_i, and its transfer of s_i bits takes s_i/(b_i·e_i) = q_i/b_i seconds, with q_i = s_i/e_i in hertz-seconds.
Both questions are convex in b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest

Array = NDArray[np.float64]

PRECISION: Final = 1e-12
"""Relative difference that counts as none: some thousand times the rounding of a float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What one user moves.

    Attributes:
        size_bits: Bits to move.
        efficiency: Bits per second per hertz, as the link's quality allows; 0 for a user out of reach.
        weight: What a second of its time counts for in a weighted sum.
        least_hz: Least band it must get.
        most_hz: Most band it can use.
    """

    size_bits: float
    efficiency: float
    weight: float = 1.0
    least_hz: float = 0.0
    most_hz: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the band is split.

    Attributes:
        hz: Band of each transfer, in the order given.
        seconds: Time of each; 0 for one with nothing to move, infinite for one that was left out.
        left_out: Positions of the transfers that can never end, since their user is out of reach.
    """

    hz: tuple[float, ...]
    seconds: tuple[float, ...]
    left_out: tuple[int, ...] = ()

    @property
    def slowest_s(self) -> float:
        """The longest time of those that were not left out."""
        return max((s for n, s in enumerate(self.seconds) if n not in self.left_out), default=0.0)


def least_slowest(transfers: Sequence[Transfer], band_hz: float, *, leave_out: bool = False) -> Split:
    """Minimises the time of the slowest transfer.

    For a time T each needs max(least, q/T), which falls with T: the least T is the one for which these use up the band,
    or with which somebody gets the most it can use. (Without limits T = Σq/band.) Band that nobody needs for that T is
    shared out in proportion to q among those who can use it: nobody is slower for it.

    Args:
        transfers: What is moved.
        band_hz: The band.
        leave_out: Whether users out of reach are left out, and told; otherwise they are an error.

    Raises:
        InvalidRequest: If a number is out of range, the least shares do not fit into the band, or a user is out of
            reach.
    """
    cell = _Cell(transfers, band_hz, leave_out)
    q = cell.need
    if not q.any():
        return cell.split(cell.least)
    busy = q > 0
    # 1/T: as far as the band reaches, and nobody can be faster than with the most it can use.
    fastest = float((cell.most[busy] / q[busy]).min())
    level = min(_level(q, cell.least, np.full_like(q, math.inf), band_hz), fastest)
    at_least = np.clip(q * level, cell.least, cell.most)
    return cell.split(np.clip(q * _level(q, at_least, cell.most, band_hz), at_least, cell.most))


def least_weighted_sum(transfers: Sequence[Transfer], band_hz: float, *, leave_out: bool = False) -> Split:
    """Minimises the weighted sum of the transfers' times.

    Minimise Σ w_i·q_i/b_i subject to Σ b_i ≤ band and least_i ≤ b_i ≤ most_i. By the Karush-Kuhn-Tucker conditions
    b_i = clip(√(w_i·q_i/λ), least_i, most_i) for one price λ of band, at which the band is used up. Σ b_i is piecewise
    linear in 1/√λ, so the optimum is exact. (Without limits b_i ∝ √(w_i·q_i).)

    Args:
        transfers: What is moved.
        band_hz: The band.
        leave_out: Whether users out of reach are left out, and told; otherwise they are an error.

    Raises:
        InvalidRequest: If a number is out of range, the least shares do not fit into the band, or a user is out of
            reach.
    """
    cell = _Cell(transfers, band_hz, leave_out)
    root = np.sqrt(cell.need * cell.weight)
    if not root.any():
        return cell.split(cell.least)
    return cell.split(np.clip(root * _level(root, cell.least, cell.most, band_hz), cell.least, cell.most))


def _level(slope: Array, least: Array, most: Array, band: float) -> float:
    """The x at which Σ clip(slope·x, least, most) is the band; the x past which nothing grows if it never is.

    The sum is piecewise linear in x with a corner wherever somebody leaves its least or reaches its most, so the corner
    before the solution is found by looking at each, and from there on it is one division.
    """
    grows = slope > 0
    c, lo, hi = slope[grows], least[grows], most[grows]
    fixed = float(least[~grows].sum())
    corners = np.unique(np.concatenate([[0.0], lo / c, (hi / c)[np.isfinite(hi)]]))
    before = 0.0
    for corner in corners:
        if fixed + float(np.clip(c * corner, lo, hi).sum()) >= band:
            break
        before = float(corner)
    # Between two corners those grow that have left their least and not reached their most.
    growing = (c * before >= lo * (1 - PRECISION)) & (c * before < hi * (1 - PRECISION))
    if not growing.any():
        return before
    rest = fixed + float(np.clip(c * before, lo, hi)[~growing].sum())
    return max((band - rest) / float(c[growing].sum()), before)


class _Cell:
    """The numbers as arrays, checked."""

    def __init__(self, transfers: Sequence[Transfer], band_hz: float, leave_out: bool) -> None:
        if not (band_hz > 0 and math.isfinite(band_hz)):
            raise InvalidRequest(f"the band is {band_hz} Hz; it must be a number > 0")
        if not transfers:
            raise InvalidRequest("there is no transfer to split the band among")
        for n, t in enumerate(transfers):
            for name in ("size_bits", "efficiency", "weight", "least_hz"):
                value = getattr(t, name)
                if not (value >= 0 and math.isfinite(value)):
                    raise InvalidRequest(f"{name} of transfer {n} is {value}; it must be a number ≥ 0")
            if not (t.most_hz > 0 and t.most_hz >= t.least_hz):
                raise InvalidRequest(
                    f"most_hz of transfer {n} is {t.most_hz}; it must be above 0, and at least its least_hz, which is"
                    f" {t.least_hz:g}"
                )
        out = tuple(n for n, t in enumerate(transfers) if t.efficiency == 0 and t.size_bits > 0)
        if out and not leave_out:
            raise InvalidRequest(
                f"transfers {list(out)} have efficiency 0: their users are out of reach and would never end",
                hint="leave them out (leave_out=True), or send them another way",
            )
        self.band_hz = band_hz
        self.out = out
        self.weight = np.array([t.weight for t in transfers])
        self.need = np.array([t.size_bits / t.efficiency if t.efficiency > 0 else 0.0 for t in transfers])
        self.least = np.array([0.0 if n in out else t.least_hz for n, t in enumerate(transfers)])
        self.most = np.array([0.0 if n in out else min(t.most_hz, band_hz) for n, t in enumerate(transfers)])
        if self.least.sum() > band_hz * (1.0 + PRECISION):
            raise InvalidRequest(
                f"the least shares are {self.least.sum():g} Hz together; the band has {band_hz:g} Hz",
                hint="lower some of them, or let fewer transfers run at once",
            )
        if not np.isfinite(self.need).all():
            raise InvalidRequest("a transfer needs more band and time than a number can tell: its efficiency is ~0")

    def split(self, hz: Array) -> Split:
        """The result, with rounding taken off so that the band is never exceeded."""
        if (total := float(hz.sum())) > self.band_hz:
            spare = hz - self.least
            if spare.sum() > 0:
                hz = hz - spare * min(1.0, (total - self.band_hz) / float(spare.sum()))
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = np.where(self.need > 0, self.need / hz, 0.0)
        told = [math.inf if n in self.out else float(s) for n, s in enumerate(seconds)]
        return Split(hz=tuple(map(float, hz)), seconds=tuple(told), left_out=self.out)
