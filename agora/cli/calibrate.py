"""`agora calibrate`: learns from questions with known answers how far each expert can be trusted, and when to climb."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from agora.cli.invocation import Invocation, of, run_async
from agora.cli.options import ConfigOption, JsonOption, NoPullOption
from agora.cli.tables import print_table
from agora.cli.text import clean, first_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from agora.config import Config
    from agora.types import Tier
    from graphs import calibrate as calibration
    from graphs.calibration_fit import ExpertResult, PolicyResult, Result
    from graphs.calibration_journal import Journal
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
            help='Questions with known answers: JSONL (or .jsonl.gz) of {"question", "answer"}, with "choices", '
            '"grader" (exact, number, choice, contains) and "label" (local, edge, cloud) where wanted.',
        ),
    ],
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts", metavar="A,B,…", help="Who is asked, the cheapest first; by default those of \\[vertical]."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask only the first so many questions.")] = None,
    reach: Annotated[
        str | None,
        typer.Option("--reach", metavar="LABEL", help="How far the questions may go: local, edge or cloud."),
    ] = None,
    at_once: Annotated[
        int,
        typer.Option(
            "--at-once",
            min=1,
            help="Questions one machine is asked at once. More is quicker, but the seconds then include waiting, and a "
            "policy that is to keep a deadline takes the experts for slower than they are.",
        ),
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with what was answered before, or ask everything again.")
    ] = True,
    config: ConfigOption = None,
    no_pull: NoPullOption = False,
    json: JsonOption = False,
) -> None:
    """Learn how far each expert can be trusted, and when to ask a dearer one.

    Asks every expert all questions, grades the answers, and writes calibrators, the policy and its guarantee into the
    policy folder; a running `agora serve` takes them into use. Stopped with Ctrl-C, the same command goes on where it
    was.
    """
    from agora.cli.settings import read_config
    from agora.types import Tier, reach_of
    from graphs.calibrate import check_enough
    from graphs.calibrating import JOURNAL, policy_folder
    from graphs.calibration_journal import Journal
    from graphs.calibration_questions import read_questions

    invocation = of(context)
    invocation.json = json
    # Everything that can be wrong is told before anybody is asked, which may take hours and cost money.
    may_see = Tier.CLOUD if reach is None else reach_of(reach, what="--reach")
    questions = read_questions(data, limit=limit)
    check_enough(questions, data)
    settings = read_config(config)
    folder = policy_folder(settings)
    order = _Order(
        config=settings,
        questions=questions,
        named=_names(experts) if experts is not None else None,
        reach=may_see,
        at_once=at_once,
        pull=not no_pull,
    )
    with Journal(folder / JOURNAL, fresh=not resume) as journal:
        if journal.damaged:
            invocation.note(f"{journal.damaged} damaged lines of {journal.path} are passed over", keep=True)
        result = run_async(_calibrate(invocation, order, journal))
    if json:
        invocation.print_json({"folder": str(folder), "questions": len(questions), **result.to_dict()})
    else:
        _tell(invocation, result, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What to do.

    Attributes:
        config: The configuration.
        questions: What is asked.
        named: Who is asked; None for those of the configuration.
        reach: The highest tier whose machines may see the questions.
        at_once: Questions one machine is asked at once.
        pull: Whether missing models may be fetched.
    """

    config: Config
    questions: Sequence[Labelled]
    named: tuple[str, ...] | None
    reach: Tier
    at_once: int
    pull: bool


def _names(given: str) -> tuple[str, ...]:
    return tuple(n for n in (part.strip() for part in given.split(",")) if n)


async def _calibrate(invocation: Invocation, order: _Order, journal: Journal) -> Result:
    from agora.cli.progress import pulls
    from agora.cli.running import joined_neighbours
    from experts.build import expert_cards, open_square
    from graphs.build import open_router
    from graphs.calibrate import calibrate, who
    from graphs.calibration_fit import too_many
    from graphs.signals.gathering import checked_signals

    config = order.config
    checked_signals(config.vertical.signals)
    _check_names(config, order.named, [c.name for c in expert_cards(config)])
    async with AsyncExitStack() as stack:
        with pulls(invocation) as view:
            view.doing("opening the experts")
            square = await open_square(config, pull=order.pull, progress=view)
            stack.push_async_callback(square.aclose)
            routing = await stack.enter_async_context(open_router(config, pull=order.pull, progress=view))
            if config.neighbours:
                await stack.enter_async_context(joined_neighbours(config, square))
        for note in routing.notes:
            invocation.note(note)
        names = who(square, config, order.named, reach=order.reach)
        if why := too_many(len(names)):
            invocation.note(f"confidences can be learned, but no policy: {why}", keep=True)
        shown = stack.enter_context(_Shown(invocation))
        try:
            return await calibrate(
                square,
                order.questions,
                config=config,
                experts=names,
                embedder=routing.embedder,
                reach=order.reach,
                at_once=order.at_once,
                journal=journal,
                tell=shown,
            )
        except BaseException:
            if shown.began:
                invocation.note(f"stopped; what was answered is in {journal.path}: the same command goes on", keep=True)
            raise


def _check_names(config: Config, named: Sequence[str] | None, known: Sequence[str]) -> None:
    """Looks before any model is loaded.

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


class _Shown:
    """Shows how many questions each expert has answered: bars in a terminal, now and then a line elsewhere."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self.began = False
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Shown:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if not self._invocation.json and self._invocation.err.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._invocation.err,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, *how: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, told: calibration.Progress) -> None:
        self.began = True
        name, done, total = told.expert, told.done, told.total
        if name is None:
            self.__exit__()
            self._invocation.note("fitting")
        elif self._bars is not None:
            if told.outcome is None:
                self._tasks[name] = self._bars.add_task(clean(name), total=total, completed=done)
            else:
                self._bars.update(self._tasks[name], completed=done)
        elif told.outcome is None:
            if done:
                self._invocation.note(f"{name}: {done} of {total} answered before")
        elif done % max(1, total // QUARTERS) == 0 or done == total:
            self._invocation.note(f"{name}: {done} of {total}")


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
