"""Which path to take: time + β·money, subject to being on time; tried out now and then, without flapping."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agora.errors import Unavailable
from agora.network import availability
from agora.network.estimates import Expectation
from agora.network.jobs import Job
from agora.network.path import Path

MARGIN: Final = 0.15
"""Share by which another path's score must be lower before it replaces the one in use: what estimates wander by while
nothing has changed."""

HOLD_S: Final = 1.0
"""Seconds for which it must have been so: more than one burst of answers, less than a moving client needs from cell to
cell. With `MARGIN` it keeps paths from flapping; the smallest round figure, not tuned."""

NEAR: Final = 0.25
"""Share by which a score may be above the leader's and still count as equal when the leader is busy. Above `MARGIN`, by
which scores wander with nothing behind it; not so far that queueing on the leader would have been quicker. Not
tuned."""

ALIKE: Final = 0.02
"""Difference in the probability to be on time below which the score decides, where no path is likely enough: the
probabilities come of some 200 entries, which know one near 0.95 to 0.015."""

SURELY: Final = 0.05
"""A path that works less often is counted as if it did so often: it stays comparable with others that fail. Dividing by
it makes the worst look twenty times as slow; a smaller one would tell chance from chance."""

MAX_KEYS: Final = 10_000
"""Kinds of help whose path in use is remembered; the oldest make room. One is kept for each backend of several paths:
far above what one process has, so it bounds only callers that make up keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A path among its alternatives.

    Attributes:
        path: The path.
        expectation: What the job would take on it.
        money: What the job would cost on it.
        score: Expected seconds, failures counted in, + β·money: what is minimised.
        meets: Whether it is likely enough to meet the deadline; True without a deadline.
    """

    path: Path
    expectation: Expectation
    money: float
    score: float
    meets: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The path to take.

    Attributes:
        path: It.
        why: In words a person can check.
        ranked: All paths, the best first (not always the one taken: hysteresis, load, exploration).
        exploring: Whether it was taken to learn about it.
    """

    path: Path
    why: str
    ranked: tuple[Ranked, ...]
    exploring: bool = False


@dataclass(slots=True)
class _Kept:
    """The path in use for one kind of help, and which one has been better since when."""

    current: str
    rival: str | None = None
    since: float = 0.0


class Chooser:
    """Chooses among paths to the same help.

    1. Paths with a link without bandwidth are out. The others are scored: expected seconds over the probability that it
       works (a failure is paid in time, then tried again) + β·money.
    2. Only those likely enough to meet the deadline may be taken; if none is, those likeliest to.
    3. The path in use stays unless another's score has been lower by `margin` for `hold_s`, or it may not be taken.
    4. If it is busy, two of those nearly as good are drawn and the less busy one is taken (power of two choices,
       Mitzenmacher 2001).
    5. Thompson sampling (Thompson 1933): a path of which less is known is taken where a draw from what is believed of
    it
       beats a draw from what is believed of the leader.

    Args:
        clock: Tells the time in seconds.
        seconds_per_money: β: seconds of waiting that one unit of money is worth.
        on_time: Probability with which a path should meet a deadline.
        explore: Whether step 5 is taken.
        margin: Of step 3, a share.
        hold_s: Of step 3, in seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        seconds_per_money: float = 0.0,
        on_time: float = 0.95,
        explore: bool = True,
        margin: float = MARGIN,
        hold_s: float = HOLD_S,
    ) -> None:
        self._clock = clock
        self._seconds_per_money = seconds_per_money
        self._on_time = on_time
        self._explore = explore
        self._margin = margin
        self._hold_s = hold_s
        self._kept: dict[str, _Kept] = {}

    def choose(
        self,
        candidates: Sequence[tuple[Path, Expectation]],
        job: Job,
        *,
        running: Mapping[str, int] | None = None,
        fees: Mapping[str, float] | None = None,
        rng: random.Random,
        key: str = "",
    ) -> Choice:
        """Chooses.

        Args:
            candidates: The paths that may be taken now (those behind an open breaker left out), and what to expect.
            job: The job.
            running: Requests of this process under way, by path name.
            fees: Money that the job costs besides its bytes, by path name: what the server takes.
            rng: Where chance comes from.
            key: Which help it is: the path in use is remembered for each.

        Raises:
            Unavailable: If there is no candidate, or every one has a link without bandwidth.
        """
        everyone = [self._ranked(p, e, job, (fees or {}).get(p.name, 0.0)) for p, e in candidates]
        usable = [r for r in everyone if math.isfinite(r.expectation.seconds)]
        if not usable:
            raise _no_path(everyone)
        allowed = _likely_enough(usable)
        best = min(allowed, key=lambda r: r.score)
        taken, why = self._steady(best, {r.path.name: r for r in allowed}, key)
        exploring = False
        if (other := _less_busy(taken, allowed, running or {}, rng)) is not None:
            why = f"{taken.path.name!r} is busy and {other.path.name!r} nearly as good"
            taken = other
        elif self._explore and (other := self._tried(taken, allowed, rng)) is not None:
            why = f"to learn about {other.path.name!r}, which may be better than {taken.path.name!r}"
            taken, exploring = other, True
        order = sorted(everyone, key=lambda r: (r not in allowed, r.score))
        return Choice(path=taken.path, why=_said(taken, why, job), ranked=tuple(order), exploring=exploring)

    def forget(self, key: str = "") -> None:
        """Forgets the path in use: it failed, and the next choice is free."""
        self._kept.pop(key, None)

    def _ranked(self, path: Path, e: Expectation, job: Job, fee: float) -> Ranked:
        money = job.money(path) + fee
        score = e.seconds / max(e.works, SURELY) + self._seconds_per_money * money
        meets = e.on_time is None or e.on_time >= self._on_time
        return Ranked(path=path, expectation=e, money=money, score=score, meets=meets)

    def _steady(self, best: Ranked, allowed: Mapping[str, Ranked], key: str) -> tuple[Ranked, str]:
        """The path in use, or the better one that replaces it."""
        now, kept = self._clock(), self._kept.get(key)
        if kept is None:
            if len(self._kept) >= MAX_KEYS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = _Kept(current=best.path.name)
            return best, "the best"
        current = allowed.get(kept.current)
        if current is None:
            self._kept[key] = _Kept(current=best.path.name)
            return best, f"the best of those that may be taken, {kept.current!r} no longer among them"
        if best.score >= current.score * (1 - self._margin):
            kept.rival = None
            return current, "the best" if best is current else f"in use, and {best.path.name!r} not better by enough"
        if kept.rival != best.path.name or now < kept.since:
            kept.rival, kept.since = best.path.name, now
        if now - kept.since < self._hold_s:
            return current, f"in use, and {best.path.name!r} not better for long enough"
        self._kept[key] = _Kept(current=best.path.name)
        return best, f"better than {current.path.name!r} for a while"

    def _tried(self, leader: Ranked, allowed: Sequence[Ranked], rng: random.Random) -> Ranked | None:
        """The path that a draw from what is believed says is better, if less is known of it than of the leader."""
        bar = self._drawn(leader, rng) * (1 - self._margin)
        found: Ranked | None = None
        for r in allowed:
            if r is leader or r.expectation.seen >= leader.expectation.seen:
                continue
            drawn = self._drawn(r, rng)
            if drawn < bar:
                found, bar = r, drawn
        return found

    def _drawn(self, r: Ranked, rng: random.Random) -> float:
        """A score drawn from what is believed: availability from its Beta, time from a log-normal around its mean."""
        e = r.expectation
        works = max(availability.sample(*e.availability, rng), SURELY)
        seconds = e.seconds * math.exp(rng.gauss(0.0, 1.0) * e.spread / math.sqrt(1 + e.seen))
        return seconds / works + self._seconds_per_money * r.money


def _likely_enough(usable: Sequence[Ranked]) -> list[Ranked]:
    """Those that meet the deadline with the probability wanted; if none does, those likeliest to meet it."""
    if meeting := [r for r in usable if r.meets]:
        return meeting
    likeliest = max(r.expectation.on_time or 0.0 for r in usable)
    return [r for r in usable if (r.expectation.on_time or 0.0) >= likeliest - ALIKE]


def _less_busy(
    leader: Ranked, allowed: Sequence[Ranked], running: Mapping[str, int], rng: random.Random
) -> Ranked | None:
    """The less busy of two drawn from those nearly as good; None if that is the leader, or nobody is less busy."""
    if not running.get(leader.path.name, 0):
        return None
    near = [r for r in allowed if r.score <= leader.score * (1 + NEAR)]
    if len(near) < 2:
        return None
    drawn = min(rng.sample(near, 2), key=lambda r: (running.get(r.path.name, 0), r.score))
    return drawn if running.get(drawn.path.name, 0) < running[leader.path.name] else None


def _said(taken: Ranked, why: str, job: Job) -> str:
    e = taken.expectation
    facts = [f"{e.seconds:.3g} s expected"]
    if e.on_time is not None:
        facts.append(f"{e.on_time:.2f} likely within {job.deadline_s:g} s")
    if taken.money:
        facts.append(f"{taken.money:.3g} money")
    if not taken.meets:
        facts.append("no path is likely enough to meet the deadline")
    return f"{taken.path.name!r}: {why} ({', '.join(facts)})"


def _no_path(everyone: Sequence[Ranked]) -> Unavailable:
    if not everyone:
        return Unavailable("there is no path that may be taken now", hint="see whether links and breakers come back")
    names = ", ".join(repr(r.path.name) for r in everyone)
    return Unavailable(
        f"every path has a link without bandwidth: {names}", hint="see up_mbps and down_mbps of their links"
    )
