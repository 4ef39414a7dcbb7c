"""What is known of how far experts can be trusted, kept up with who is here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from agora.errors import AgoraError
from agora.routing.cascade.policy import Policy, Query
from agora.square import Expert, Square
from graphs.calibration_version import aliases_now
from graphs.ladder import Confidence, probability, rough

if TYPE_CHECKING:
    # What it reads with takes half a second to import, and most who start agora need none of it.
    from graphs.calibrating import Chosen

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
"""Shortest time between two looks at whether something new was learned: a look is one `stat`, some 50 µs in a thread,
and whoever has calibrated beside a running server asks it by hand no sooner."""

MAX_WEIGHING: Final = 8
"""Trade-offs that questions brought with them whose policies are kept: reading and choosing one takes some 0.1 s, and
whoever asks with another one every time shall not fill the memory."""


class Known(Protocol):
    """Calibrators and policy of the experts that are here: `graphs.calibrating.Trust`, or one's own."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know: whose calibration is missing or no longer valid, and why."""

    def confidence(self, expert: str, signals: Mapping[str, float]) -> float | None:
        """Probability in [0, 1] that an answer with these signals is right; None where nothing valid is known."""

    def policy(
        self, *, trade_off: float | None = None, max_risk: float | None = None, confidence: float = 0.95
    ) -> Chosen | None:
        """The policy to follow; None if there is none. See `graphs.calibrating.Trust.policy`."""


LoadTrust = Callable[[Sequence[Expert]], Known]
"""Gives what is known of these experts; may block. If it has a method `stamp() -> Hashable`, which may block too, it is
called again whenever that gives something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """What is known of those who are here.

    Attributes:
        policy: The policy to follow; None if there is none for them.
        trust: Their calibrators; None if there are none.
        only_top: Whether only the top tier may be asked, since a guarantee is wanted and nothing cheaper has one.
        certified: Whether the policy comes with the guarantee that is wanted.
        notes: What the reader of every result should know.
    """

    policy: Policy | None = None
    trust: Known | None = None
    only_top: bool = False
    certified: bool = False
    notes: tuple[str, ...] = ()

    @property
    def departed(self) -> bool:
        """Whether what is known was learned from texts that left as they leave now, redacted or condensed."""
        return bool(getattr(self.trust, "departed", False))

    def confidence(self, expert: str, signals: Mapping[str, float]) -> Confidence | None:
        """How far an answer is trusted: calibrated where that is known, else as its signals have it."""
        if self.trust is not None:
            try:
                known = probability(self.trust.confidence(expert, signals))
            except Exception:
                # Whatever a calibrator trips over, the answer is there and must not be lost.
                log.exception("the calibrator of %s failed", expert)
                known = None
            if known is not None:
                return Confidence(value=known)
        return rough(signals)


class Guide:
    """Gives the guidance for those who are here now; looks again when someone joins or leaves, when an adapter's alias
    stands for another one, and when something new was learned.

    Args:
        square: Who is here.
        experts: The ladder's names; None for all.
        policy: A policy to follow whatever is on disk.
        trust: What is known, or how to look for it; None if nothing is.
        trade_off: See `Trust.policy`.
        max_risk: See `Trust.policy`.
        confidence: See `Trust.policy`.
    """

    def __init__(
        self,
        square: Square,
        *,
        experts: Sequence[str] | None = None,
        policy: Policy | None = None,
        trust: Known | LoadTrust | None = None,
        trade_off: float | None = None,
        max_risk: float | None = None,
        confidence: float = 0.95,
    ) -> None:
        self._square = square
        self._experts = None if experts is None else frozenset(experts)
        self._policy = policy
        self._trust = trust
        self._trade_off = trade_off
        self._max_risk = max_risk
        self._confidence = confidence
        self._seen: Hashable = None
        self._stamp: Hashable = None
        self._looked_at = float("-inf")
        self._guidance = Guidance()
        self._looking = asyncio.Lock()
        self._weighing: dict[float, Guide] = {}

    @property
    def last(self) -> Guidance:
        """The guidance that was last given."""
        return self._guidance

    def look(self) -> Guidance:
        """Looks now; blocks.

        Raises:
            ConfigError: If what is on disk is damaged.
        """
        seen, here, self._stamp = self._who(), self._here(), self._stamped()
        self._guidance = self._made(self._found(here), here)
        self._seen = seen
        return self._guidance

    @property
    def chooses(self) -> bool:
        """Whether the policy is chosen from what is known, rather than given."""
        return self._policy is None

    def weighing(self, trade_off: float) -> Guide:
        """The guide for those who say that a right answer is worth so much money; those used last are kept."""
        guide = self._weighing.pop(trade_off, None) or Guide(
            self._square,
            experts=None if self._experts is None else tuple(self._experts),
            policy=self._policy,
            trust=self._trust,
            trade_off=trade_off,
            max_risk=self._max_risk,
            confidence=self._confidence,
        )
        self._weighing[trade_off] = guide
        if len(self._weighing) > MAX_WEIGHING:
            del self._weighing[next(iter(self._weighing))]
        return guide

    async def now(self) -> Guidance:
        """The guidance for those who are here. What cannot be read is as if it were not there, with a note."""
        if self._seen == self._who() and not self._due():
            return self._guidance
        async with self._looking:
            seen, here, stamp = self._who(), self._here(), self._stamp
            if self._due():
                stamp = await asyncio.to_thread(self._stamped)
                self._looked_at = asyncio.get_running_loop().time()
            if (self._seen, self._stamp) != (seen, stamp):
                try:
                    self._guidance = await asyncio.to_thread(lambda: self._made(self._found(here), here))
                except AgoraError as e:
                    self._guidance = self._unknown(e.message, here)
                except Exception as e:
                    log.exception("the policy folder cannot be read")
                    self._guidance = self._unknown(f"{type(e).__name__}: {e}", here)
                # As they were before it was read: what came meanwhile is read the next time.
                self._seen, self._stamp = seen, stamp
        return self._guidance

    def _who(self) -> Hashable:
        """Changes whenever those who are here do."""
        return self._square.version, aliases_now(self._square.experts)

    def _due(self) -> bool:
        """Whether it is time to look for something new."""
        watched = hasattr(self._trust, "stamp")
        return watched and asyncio.get_running_loop().time() - self._looked_at >= LOOK_S

    def _stamped(self) -> Hashable:
        trust: Any = self._trust
        return trust.stamp() if hasattr(trust, "stamp") else None

    def _here(self) -> list[Expert]:
        return [e for e in self._square if self._experts is None or e.name in self._experts]

    def _found(self, here: Sequence[Expert]) -> Known | None:
        return self._trust(here) if callable(self._trust) else self._trust

    def _unknown(self, why: str, here: Sequence[Expert]) -> Guidance:
        made = self._made(None, here)
        return Guidance(
            policy=made.policy,
            only_top=made.only_top,
            notes=(f"what was calibrated cannot be read: {why}", *made.notes),
        )

    def _made(self, trust: Known | None, here: Sequence[Expert]) -> Guidance:
        chosen = None if trust is None or self._policy is not None else self._chosen(trust)
        known = () if trust is None else trust.notes
        if self._max_risk is not None:
            return self._guaranteed(trust, chosen, known, here)
        if self._policy is not None:
            gone = [name for name in self._policy.models if self._square.get(name) is None]
            absent = (f"the policy is also for {', '.join(gone)}, not here now",) if gone else ()
            return Guidance(policy=self._policy, trust=trust, notes=(*known, *absent, *_new(self._policy, here)))
        if chosen is not None:
            notes = (*known, *chosen.notes, *_new(chosen.policy, here))
            return Guidance(policy=chosen.policy, trust=trust, notes=notes)
        plain = "no policy was fitted for those who are here: they are asked one tier after the other"
        return Guidance(trust=trust, notes=(*known, plain) if trust is not None else (plain,))

    def _guaranteed(
        self, trust: Known | None, chosen: Chosen | None, known: tuple[str, ...], here: Sequence[Expert]
    ) -> Guidance:
        promise = f"accuracy lost against always asking the top tier: at most {self._max_risk:g}"
        if chosen is not None and chosen.certified:
            held = f"{promise}, certified with a confidence of {self._confidence:g} ({chosen.kind})"
            notes = (*known, *chosen.notes, *_new(chosen.policy, here), held)
            return Guidance(policy=chosen.policy, trust=trust, certified=True, notes=notes)
        more = () if chosen is None else chosen.notes
        note = f"{promise}, but nothing cheaper than the top tier is certified for that: it alone is asked"
        return Guidance(trust=trust, only_top=True, notes=(*known, *more, note))

    def _chosen(self, trust: Known) -> Chosen | None:
        chosen = trust.policy(trade_off=self._trade_off, max_risk=self._max_risk, confidence=self._confidence)
        if chosen is not None:
            _warm(chosen.policy)
        return chosen


def _new(policy: Policy, here: Sequence[Expert]) -> tuple[str, ...]:
    """What to say of those whom the policy does not know."""
    new = [e.name for e in here if e.name not in policy.models]
    return (f"the policy does not know {', '.join(new)}, and does not ask there",) if new else ()


def _warm(policy: Policy) -> None:
    """Decides once for nothing: what a policy loads for that (half a second, the first time) is then not loaded on the
    event loop in the middle of a question."""
    try:
        policy.decide(Query(text="?"), (), allowed=range(len(policy.models)))
    except Exception:
        # It will be tried again with a question, and what goes wrong is then said in its answer.
        log.exception("the policy failed on a first try")
