"""`agora runs`: what was asked, how it stands, and going on with what was interrupted."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text

from agora.cli.invocation import ExitCode, Invocation, of, run_async
from agora.cli.options import ConfigOption, JsonOption, NoPullOption
from agora.cli.tables import print_table
from agora.cli.text import clean, first_line, seconds
from agora.errors import InvalidRequest
from agora.events import Event, event_to_dict
from agora.types import Tier, label_of, to_plain

if TYPE_CHECKING:
    from agora.config import Config
    from graphs.store import RunRecord, RunStore

app = typer.Typer(help="Look at runs, and go on with interrupted ones.", invoke_without_command=True)

RunId = Annotated[str, typer.Argument(metavar="ID", help="The run's id, as 'agora runs list' shows it.")]

MAX_LISTED: Final = 10_000
"""Most runs listed at once: more than anyone reads, and few enough to hold in memory."""

STYLES = {
    "done": "green",
    "partial": "yellow",
    "failed": "red",
    "interrupted": "magenta",
    "cancelled": "red",
    "running": "cyan",
}

PAGE: Final = 128
"""Events read at once: a hundred answers, some hundred kilobytes."""


@app.callback()
def _runs(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_runs(context)


@app.command("list")
def list_runs(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", help=f"Most runs to list, up to {MAX_LISTED:,}.")] = 20,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """List the newest runs."""
    invocation = of(context)
    invocation.json = json
    records = run_async(_list(config, limit))
    if json:
        invocation.print_json({"runs": [_plain(r) for r in records]})
        return
    if not records:
        invocation.note("no runs yet; ask something with: agora ask QUESTION")
        return
    rows = [
        (
            r.id,
            Text(r.status, style=STYLES[r.status]),
            _when(r.created_at),
            seconds(r.finished_at - r.created_at) if r.finished_at else "",
            r.question,
        )
        for r in records
    ]
    print_table(invocation.out, ("id", "status", "began", "took", "question"), rows)


@app.command("show")
def show(
    context: typer.Context,
    run_id: RunId,
    events: Annotated[bool, typer.Option("--events", help="Show what happened, one event after the other.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Show a run: who was asked what, how often, and what came of it.

    What an interrupted run has answered so far is kept, and shown once it has been resumed and is done; with
    `--events` at once.
    """
    invocation = of(context)
    invocation.json = json
    record, happened = run_async(_get(config, run_id, events=events))
    if json:
        more = {"events": [{"seq": seq, **event_to_dict(event)} for seq, event in happened]} if events else {}
        invocation.print_json({**_plain(record), **more})
    elif events:
        _tell_events(invocation, record, happened)
    else:
        _tell_record(invocation, record)


@app.command("resume")
def resume(
    context: typer.Context,
    run_id: RunId,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Configuration; by default the one the run began with."),
    ] = None,
    no_pull: NoPullOption = False,
    json: JsonOption = False,
) -> None:
    """Go on with a run that was interrupted; what was answered is not asked again."""
    invocation = of(context)
    invocation.json = json
    raise typer.Exit(run_async(_resume(invocation, run_id, config, pull=not no_pull)))


def _open(config: Path | None) -> AbstractAsyncContextManager[RunStore]:
    from agora.cli.settings import read_config
    from graphs.store import RunStore

    return RunStore.open(read_config(config).store.where)


async def _list(config: Path | None, limit: int) -> list[RunRecord]:
    if not 1 <= limit <= MAX_LISTED:
        raise InvalidRequest(f"--limit is {limit}; it must be from 1 to {MAX_LISTED}")
    async with _open(config) as store:
        return await store.list(limit=limit)


async def _get(config: Path | None, run_id: str, *, events: bool) -> tuple[RunRecord, list[tuple[int, Event]]]:
    from graphs.run import checked_run_id

    checked_run_id(run_id)
    happened: list[tuple[int, Event]] = []
    async with _open(config) as store:
        record = await store.get(run_id)
        while events and (page := await store.events(run_id, after=happened[-1][0] if happened else 0, limit=PAGE)):
            happened += page
    return record, happened


async def _resume(invocation: Invocation, run_id: str, config: Path | None, *, pull: bool) -> ExitCode:
    from agora.cli.running import Order, execute, tell_result
    from agora.cli.settings import budget_of, override
    from graphs.run import checked_run_id

    checked_run_id(run_id)
    async with _open(config) as store:
        record = await store.get(run_id)
        if record.result is not None:
            raise InvalidRequest(
                f"run {run_id!r} already came to its end: {record.status}", hint=f"see: agora runs show {run_id}"
            )
        # What the run was started with counts, and not what the configuration says by now.
        settings = _config_of(record, config)
        planner = record.planner if record.planner != settings.graph.planner else None
        settings = override(settings, graph=record.graph, planner=planner)
        await store.take_over(run_id)
        order = Order(
            config=settings,
            question=record.question,
            run_id=run_id,
            budget=record.budget if record.budget is not None else budget_of(settings),
            reach=record.reach,
            pull=pull,
            go_on=True,
        )
        return tell_result(invocation, await execute(invocation, order, store))


def _config_of(record: RunRecord, given: Path | None) -> Config:
    """The configuration to go on with: the one named now, else the one the run began with."""
    from agora.cli.settings import read_config
    from agora.config import default_config

    if given is None and record.config is None:
        return default_config()
    return read_config(given if given is not None else record.config)


def _tell_record(invocation: Invocation, record: RunRecord) -> None:
    from agora.cli.view import answer_text, attempts_tree, signs_for, summary

    signs = signs_for(invocation.out.encoding)
    took = f", took {seconds(record.finished_at - record.created_at)}" if record.finished_at else ""
    reach = f", no further than {label_of(record.reach)}" if record.reach is not Tier.CLOUD else ""
    _tell_head(invocation, record)
    invocation.say(
        Text(f"began {_when(record.created_at)}{took}, graph {record.graph}{reach}, ", style="dim").append(
            clean(record.config or "built-in configuration")
        )
    )
    if record.result is None:
        invocation.say(Text(clean(record.question)))
        if record.error:
            invocation.say(Text(f"error: {clean(record.error)}", style="red"))
        if record.status not in ("running", "cancelled"):
            invocation.note("what was answered so far is kept; it is shown when the run is done")
            invocation.note(f"go on with: agora runs resume {record.id}")
        return
    invocation.out.print(attempts_tree(record.result, signs=signs))
    invocation.say()
    invocation.say(Text(answer_text(record.result)))
    invocation.say()
    for note in record.result.notes:
        invocation.say(Text(f"note: {first_line(note)}", style="yellow"))
    invocation.say(Text(summary(record.result, signs=signs), style="dim"))


def _tell_head(invocation: Invocation, record: RunRecord) -> None:
    invocation.say(Text(f"{record.id}  ", style="bold").append(record.status, style=STYLES[record.status]))


def _tell_events(invocation: Invocation, record: RunRecord, happened: list[tuple[int, Event]]) -> None:
    from agora.cli.view import told

    _tell_head(invocation, record)
    if not happened:
        invocation.note("no events of this run are in the store")
    width = len(str(happened[-1][0])) if happened else 0
    for seq, event in happened:
        first, *rest = told(event)
        head = f"{seq:>{width}}  {_when(event.at)}  "
        invocation.say(Text(head, style="dim").append(first, style=""))
        for line in rest:
            invocation.say(Text(f"{' ' * len(head)}{line}"))


def _plain(record: RunRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "question": record.question,
        "status": str(record.status),
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "graph": record.graph,
        "config": record.config,
        "planner": record.planner,
        "budget": to_plain(record.budget),
        "reach": label_of(record.reach),
        "metadata": dict(record.metadata),
        "result": record.result.to_dict() if record.result is not None else None,
        "error": record.error,
    }


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
