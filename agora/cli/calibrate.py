"""`agora calibrate`: learns from questions with known answers how far each expert can be trusted, and when to climb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from agora.cli.invocation import Invocation, of, run_async
from agora.cli.options import ConfigOption, JsonOption, NoPullOption
from agora.cli.tables import print_table
from agora.cli.text import clean, first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agora.config import Config
    from agora.routing.trust import Version
    from graphs.calibration_fit import ExpertResult, PolicyResult, Result
    from graphs.calibration_journal import Graded, Journal
    from graphs.calibration_questions import Labelled

QUARTERS = 4
"""How often a count is told where there is no terminal to draw a bar in."""


def calibrate(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            metavar="FILE",
            help='Questions with known answers: JSONL (or .jsonl.gz) of {"question", "answer"}, with "choices" and '
            '"grader" (exact, number, choice, contains) where wanted.',
        ),
    ],
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts", metavar="A,B,…", help="Who is asked, the cheapest first; by default those of \\[vertical]."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask only the first so many questions.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with what was answered before, or ask everything again.")
    ] = True,
    config: ConfigOption = None,
    no_pull: NoPullOption = False,
    json: JsonOption = False,
) -> None:
    """Learn how far each expert can be trusted, and when to ask a dearer one.

    Asks every expert all questions, grades the answers, and writes calibrators, the policy and its guarantee into the
    policy folder. Stopped with Ctrl-C, the same command goes on where it was.
    """
    from agora.cli.settings import read_config
    from graphs.calibrating import JOURNAL, policy_folder
    from graphs.calibration_fit import Wishes, fit_all
    from graphs.calibration_journal import Journal
    from graphs.calibration_questions import read_questions

    invocation = of(context)
    invocation.json = json
    # Everything that can be wrong is told before anybody is asked, which may take hours and cost money.
    questions = read_questions(data, limit=limit)
    _check_enough(questions, data)
    settings = read_config(config)
    folder = policy_folder(settings)
    named = _names(experts) if experts is not None else settings.vertical.experts
    with Journal(folder / JOURNAL, fresh=not resume) as journal:
        if journal.damaged:
            invocation.note(f"{journal.damaged} damaged lines of {journal.path} are passed over", keep=True)
        graded, vectors = run_async(_ask(invocation, settings, questions, named, journal, pull=not no_pull))
        wishes = Wishes(
            trade_off=settings.vertical.trade_off,
            max_risk=settings.vertical.max_risk,
            confidence=settings.vertical.confidence,
            deadline=settings.graph.deadline_s,
        )
        invocation.note("fitting")
        result = fit_all(folder, questions, graded, wishes, embeddings=vectors)
    if json:
        invocation.print_json({"folder": str(folder), "questions": len(questions), **result.to_dict()})
    else:
        _tell(invocation, result, folder)


def _check_enough(questions: Sequence[Labelled], data: Path) -> None:
    """Says so before asking if there are too few questions to learn anything from.

    Raises:
        CannotCalibrate: If there are.
    """
    from agora.routing.trust import CannotCalibrate
    from agora.routing.trust.calibrator import MIN_LABELS

    if len(questions) < MIN_LABELS:
        raise CannotCalibrate(
            f"{len(questions)} questions of {data}; at least {MIN_LABELS} are needed, a few hundred are better",
            hint="give a longer file, or a larger --limit",
        )


def _names(given: str) -> tuple[str, ...]:
    return tuple(n for n in (part.strip() for part in given.split(",")) if n)


async def _ask(
    invocation: Invocation,
    config: Config,
    questions: Sequence[Labelled],
    named: Sequence[str] | None,
    journal: Journal,
    *,
    pull: bool,
) -> tuple[dict[str, dict[str, Graded]], NDArray[np.float32] | None]:
    """Asks what has not been answered yet.

    Returns:
        All outcomes, by expert and question; and the questions' embeddings, where there is an embedding model.
    """
    from agora.cli.progress import pulls
    from agora.cli.running import joined_neighbours
    from experts.build import expert_cards, open_square
    from graphs.build import open_router
    from graphs.calibrating import version_of
    from graphs.calibration_asking import Order, ask_all, ladder
    from graphs.calibration_fit import too_many
    from graphs.signals.gathering import checked_signals

    signals = checked_signals(config.vertical.signals)
    _check_names(config, named, [c.name for c in expert_cards(config)])
    async with AsyncExitStack() as stack:
        with pulls(invocation) as view:
            view.doing("opening the experts")
            square = await open_square(config, pull=pull, progress=view)
            stack.push_async_callback(square.aclose)
            routing = await stack.enter_async_context(open_router(config, pull=pull, progress=view))
            if config.neighbours:
                await stack.enter_async_context(joined_neighbours(config, square))
        here = {e.name: e for e in square}
        # Neighbours' experts only where they are named: nobody's machine is asked hundreds of questions by the way.
        names = ladder(here if named is not None else {n: e for n, e in here.items() if n in config.experts}, named)
        if why := too_many(len(names)):
            invocation.note(f"confidences can be learned, but no policy: {why}", keep=True)
        experts = {n: (here[n], version_of(here[n], config)) for n in names}
        order = Order(
            questions=questions,
            experts=experts,
            signals=signals,
            samples=config.vertical.samples,
            max_parallel=config.graph.max_parallel,
        )
        # What failed before is asked again: whatever stood in the way may be gone.
        done = {key for key, outcome in journal.known.items() if not outcome.error}
        versions = {n: version for n, (_, version) in experts.items()}
        began = {n: sum((q.key, v, signals) in done for q in questions) for n, v in versions.items()}
        with _counting(invocation, {n: len(questions) for n in names}, began) as count:

            def tell(name: str, outcome: Graded) -> None:
                journal.put(outcome)
                count(name)

            try:
                await ask_all(order, done, tell)
            except BaseException:
                invocation.note(f"stopped; what was answered is in {journal.path}: the same command goes on", keep=True)
                raise
        for note in routing.notes:
            invocation.note(note)
        vectors = await routing.embedder.embed([q.text for q in questions]) if routing.embedder is not None else None
    found = _outcomes(questions, versions, signals, journal)
    # What was answered at another price would have cost another amount today.
    return {
        n: {k: o.priced(here[n].card.price_per_mtok) for k, o in told.items()} for n, told in found.items()
    }, vectors


def _check_names(config: Config, named: Sequence[str] | None, known: Sequence[str]) -> None:
    """Before any model is loaded.

    Raises:
        InvalidRequest: If one that is named does not exist.
    """
    from agora.config import may_join
    from agora.errors import InvalidRequest

    if named is None:
        return
    if not named:
        raise InvalidRequest(f"--experts names nobody; there are: {', '.join(known)}")
    if unknown := [n for n in named if n not in known and not may_join(config, n)]:
        raise InvalidRequest(f"no expert {unknown[0]!r} in the configuration; there are: {', '.join(known)}")


def _outcomes(
    questions: Sequence[Labelled], versions: Mapping[str, Version], signals: tuple[str, ...], journal: Journal
) -> dict[str, dict[str, Graded]]:
    return {
        name: {q.key: found for q in questions if (found := journal.known.get((q.key, version, signals))) is not None}
        for name, version in versions.items()
    }


@contextmanager
def _counting(
    invocation: Invocation, totals: Mapping[str, int], began: Mapping[str, int]
) -> Iterator[Callable[[str], None]]:
    """Shows how many questions each expert has answered."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = dict(began)
    if invocation.json or not invocation.err.is_terminal:
        for name, before in began.items():
            if before:
                invocation.note(f"{name}: {before} of {totals[name]} answered before")

        def say(name: str) -> None:
            done[name] += 1
            step = max(1, totals[name] // QUARTERS)
            if done[name] % step == 0 or done[name] == totals[name]:
                invocation.note(f"{name}: {done[name]} of {totals[name]}")

        yield say
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=invocation.err, transient=True) as bars:
        tasks = {n: bars.add_task(clean(n), total=total, completed=began[n]) for n, total in totals.items()}
        yield lambda name: bars.advance(tasks[name])


def _tell(invocation: Invocation, result: Result, folder: Path) -> None:
    columns = ("expert", "n", "accuracy", "AUROC", "ECE", "AURC", "cost", "seconds", "calibrated by")
    right = columns[1:-1]
    print_table(invocation.out, columns, [_row(e) for e in result.experts], right=right)
    for e in result.experts:
        if e.why:
            invocation.say(Text(f"{e.version.expert}: not calibrated: {first_line(e.why)}", style="yellow"))
        if e.failed:
            failed = (
                f"{e.version.expert}: no answer to {e.failed} of {e.n + e.failed} questions: {first_line(e.failure)}"
            )
            invocation.say(Text(failed, style="yellow"))
    for note in result.notes:
        invocation.say(Text(f"note: {first_line(note)}", style="yellow"))
    if result.policy is not None:
        invocation.say()
        for label, value in _facts(result.policy).items():
            invocation.say(Text(f"{label:>10}  ", style="dim").append(first_line(value), style="default"))
    invocation.say(Text(f"written to {folder}", style="dim"))


def _row(e: ExpertResult) -> tuple[str, ...]:
    told: list[Any] = [e.accuracy, *((e.report.auroc, e.report.ece, e.report.aurc) if e.report else (None,) * 3)]
    shown = [f"{value:.3f}" if value is not None else "-" for value in told]
    method = e.report.method if e.report else "-"
    return (e.version.expert, str(e.n), *shown, f"{e.cost:.3g}", f"{e.seconds:.3g}", method)


def _facts(policy: PolicyResult) -> dict[str, str]:
    held = f", {policy.held_back} held back for the guarantee" if policy.held_back else ""
    facts = {
        "policy": f"{policy.kind} over {', '.join(policy.models)} (top tier: {policy.top})",
        "why": policy.why,
        "fitted to": f"{policy.rows} questions{held}",
    }
    # A certified policy's reason tells what is certified.
    return facts if policy.guarantee in policy.why else {**facts, "guarantee": policy.guarantee}
