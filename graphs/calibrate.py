"""Calibrating the experts of an open square: asks, grades, learns, and puts what was learned into the policy folder.

    questions = read_questions(Path("train.jsonl"))
    result = await calibrate(square, questions, config=config)

It is what `agora calibrate` does. `graphs.vertical` and a running `agora serve` of the same configuration take what was
learned into use at their next question.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agora.config import Config
from agora.errors import OutOfReach
from agora.protocols import Embedder
from agora.routing.takers import beyond
from agora.routing.trust import CannotCalibrate
from agora.routing.trust.calibrator import MIN_LABELS
from agora.square import Expert, Square
from agora.types import Tier, lowest
from graphs.build import departure_of
from graphs.calibrating import policy_folder, version_of
from graphs.calibration_asking import AT_ONCE, Order, ask_all, ladder, machines_of
from graphs.calibration_fit import Result, Wishes, fit_all
from graphs.calibration_folder import JOURNAL
from graphs.calibration_journal import Graded, Journal
from graphs.calibration_questions import Labelled
from graphs.calibration_version import relays
from graphs.signals.gathering import checked_signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a calibration is.

    Attributes:
        expert: Whose questions this is about; None once all are asked, and what is left is to learn from the answers.
        done: Questions it has been asked, those of earlier calibrations included.
        total: Questions it is asked in all.
        outcome: What came of the last one; None at the beginning.
    """

    expert: str | None
    done: int = 0
    total: int = 0
    outcome: Graded | None = None


async def calibrate(
    square: Square | Sequence[Expert],
    questions: Sequence[Labelled],
    *,
    config: Config | None = None,
    experts: Sequence[str] | None = None,
    folder: Path | None = None,
    wishes: Wishes | None = None,
    embedder: Embedder | None = None,
    reach: Tier = Tier.CLOUD,
    at_once: int = AT_ONCE,
    fresh: bool = False,
    journal: Journal | None = None,
    tell: Callable[[Progress], None] | None = None,
) -> Result:
    """Learns how far each expert can be trusted, and when to ask a dearer one.

    Experts are asked as they are in use, `[vertical]` of the configuration included: its signals, and what it has
    condensed or redacted before a text leaves. Every outcome is in the journal as soon as it is there; a calibration
    that was interrupted goes on where it was.

    Args:
        square: Who is here.
        questions: At least 30; a few hundred are better. See `graphs.calibration_questions.read_questions`.
        config: What experts are asked with, and which model each node runs; give the one that answers are given with.
        experts: Who is asked, the cheapest first; those of `[vertical]` if None; see `who`.
        folder: The policy folder; that of the configuration if None.
        wishes: What is wanted of the policy; what the configuration says if None.
        embedder: Turns questions into vectors, where those who answer have it too.
        reach: The highest tier whose machines may see the questions; one with a label of its own may be bound further.
        at_once: Most questions in flight on one machine; with more than one the times of answers include waiting.
        fresh: Whether to ask everything again.
        journal: An open journal to write to, where the caller holds it already.
        tell: Told for every expert how many it has answered, at the beginning and with every outcome.

    Returns:
        What was learned; it is in the policy folder by then.

    Raises:
        CannotCalibrate: If there are too few questions.
        InvalidRequest: If nobody is here to be asked, or an argument is out of range.
        OutOfReach: If nobody may see the questions, or one of those named may not.
        ConfigError: If the folder cannot be written, or another calibration is writing to it.
        ModelError: If the policy cannot be written.
    """
    config = config or Config()
    check_enough(questions)
    square = square if isinstance(square, Square) else Square(square)
    folder = policy_folder(config) if folder is None else folder
    questions = [replace(q, reach=lowest(reach, q.reach)) for q in questions]
    names = who(square, config, experts, reach=reach)
    here = {e.name: e for e in square}
    versions = {n: version_of(here[n], config) for n in names}
    order = Order(
        questions=questions,
        experts={n: (here[n], versions[n]) for n in names},
        signals=checked_signals(config.vertical.signals),
        samples=config.vertical.samples,
        departure=departure_of(config, square),
        machines=machines_of([here[n] for n in names], config),
        at_once=at_once,
        max_parallel=config.graph.max_parallel,
    )
    with nullcontext(journal) if journal is not None else Journal(folder / JOURNAL, fresh=fresh) as book:
        await _ask(order, book, tell or (lambda progress: None))
        vectors = None if embedder is None else await _embedded(embedder, questions)
        graded = {
            # What was answered at another price would have cost another amount today.
            name: {k: o.priced(here[name].card.price_per_mtok) for k, o in _outcomes(order, name, book).items()}
            for name in names
        }
        fit = functools.partial(fit_all, folder, questions, graded, wishes or wishes_of(config), embeddings=vectors)
        return await _to_its_end(fit)


def check_enough(questions: Sequence[Labelled], source: object = "") -> None:
    """Says so before asking if there are too few questions to learn anything from.

    Args:
        questions: The questions.
        source: Where they come from, for the error.

    Raises:
        CannotCalibrate: If there are.
    """
    if len(questions) < MIN_LABELS:
        of = f" of {source}" if source else ""
        raise CannotCalibrate(
            f"{len(questions)} questions{of}; at least {MIN_LABELS} are needed, a few hundred are better",
            hint="give a longer file, or a larger --limit" if source else "give more questions",
        )


def who(
    square: Square, config: Config, named: Sequence[str] | None = None, *, reach: Tier = Tier.CLOUD
) -> tuple[str, ...]:
    """Who is calibrated, the cheapest first: those named, else those of `[vertical]`, else all who are here.

    Neighbours' experts are asked only where they are named: nobody's machine is asked hundreds of questions by the way.

    Args:
        square: Who is here.
        config: The configuration.
        named: Names; None for those of the configuration.
        reach: The highest tier whose machines may see the questions.

    Raises:
        InvalidRequest: If one of those named is not here, or nobody is.
        OutOfReach: If one of those named may not see the questions, or nobody may.
    """
    named = config.vertical.experts if named is None else named
    here = {e.name: e for e in square if named is not None or e.name in config.experts or not relays(e)}
    names = ladder(here, named)
    barred = {n: why for n in names if (why := beyond(here[n].card, reach)) is not None}
    if barred and (named is not None or len(barred) == len(names)):
        name, why = next(iter(barred.items()))
        raise OutOfReach(f"{name} cannot be calibrated: {why}", hint="name others, or let the questions go further")
    return tuple(n for n in names if n not in barred)


def wishes_of(config: Config) -> Wishes:
    """What a configuration wants of the policy."""
    table = config.vertical
    return Wishes(
        trade_off=table.trade_off,
        max_risk=table.max_risk,
        confidence=table.confidence,
        deadline=config.graph.deadline_s,
    )


async def _ask(order: Order, journal: Journal, tell: Callable[[Progress], None]) -> None:
    # What failed before is asked again: whatever stood in the way may be gone.
    done = {key for key, outcome in journal.known.items() if not outcome.error}
    told: dict[str, Progress] = {}
    for name, (_, version) in order.experts.items():
        asked = order.asked_of(name)
        before = sum(order.key(q, version) in done for q in asked)
        told[name] = Progress(expert=name, done=before, total=len(asked))
        tell(told[name])

    def keep(name: str, outcome: Graded) -> None:
        journal.put(outcome)
        told[name] = replace(told[name], done=told[name].done + 1, outcome=outcome)
        tell(told[name])

    await ask_all(order, done, keep)
    tell(Progress(expert=None))


async def _embedded(embedder: Embedder, questions: Sequence[Labelled]) -> NDArray[np.float32]:
    return await embedder.embed([q.text for q in questions])


def _outcomes(order: Order, name: str, journal: Journal) -> dict[str, Graded]:
    _, version = order.experts[name]
    found = {q.key: journal.known.get(order.key(q, version)) for q in order.asked_of(name)}
    return {key: outcome for key, outcome in found.items() if outcome is not None}


async def _to_its_end(fit: Callable[[], Result]) -> Result:
    """Does it beside the event loop. A thread cannot be stopped, so it is waited for even by whoever is cancelled: the
    journal is held until nobody writes any more."""
    work = asyncio.ensure_future(asyncio.to_thread(fit))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
