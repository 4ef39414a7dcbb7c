"""`agora fed`: adapters trained together, by clients that keep their data."""

from __future__ import annotations

import functools
import json as jsonlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from agora.cli.fed_view import FedView, judged, view
from agora.cli.invocation import ExitCode, Invocation, of
from agora.cli.options import JsonOption, NoPullOption
from agora.cli.tables import print_table
from agora.cli.text import counted, seconds, size
from agora.errors import AgoraError, InvalidRequest

if TYPE_CHECKING:
    from fed.report import Summary
    from fed.run import Outcome

EXAMPLE: Final = "example.jsonl"

app = typer.Typer(help="Train adapters together on data that stays where it is.", no_args_is_help=True)

Config = Annotated[Path, typer.Argument(metavar="[FILE]", help="Configuration; 'agora fed init' writes one.")]


@app.command("init")
def init(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Folder to write to; made if it is not there.")
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a commented fed.toml, and example rows that it runs on as it stands."""
    from fed.config import FILE_NAME, load_config, template
    from fed.example import rows

    lines = "".join(jsonlib.dumps(row) + "\n" for row in rows())
    texts = {FILE_NAME: template(), EXAMPLE: lines}
    if not force and (there := [name for name in texts if (folder / name).exists()]):
        raise InvalidRequest(f"{folder / there[0]} is already there", hint="--force overwrites it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _write(folder / name, text)
    except OSError as e:
        raise AgoraError(f"{folder} cannot be written to: {e.strerror or e}", hint="name another place") from None
    load_config(folder / FILE_NAME)
    invocation = of(context)
    invocation.say(f"wrote {folder / FILE_NAME} and {folder / EXAMPLE}: made-up sentences, an example and no data set")
    invocation.say(f"run it, in a minute or two:  agora fed run {folder / FILE_NAME}")
    invocation.say(f"then look at what came out:  agora fed report {folder / 'fed-run'} --html report.html")


@app.command("run")
def run(
    context: typer.Context,
    config: Config = Path("fed.toml"),
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the results.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Instead of the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, if there is one.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Take away the run in DIR and begin anew.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    no_pull: NoPullOption = False,
    json: JsonOption = False,
) -> None:
    """Run a federation: clients' machines and links are modelled, their training is real.

    Everything is checked before training starts. Ctrl-C saves the run and says how to go on with it; a run that was
    killed goes on from its last checkpoint, and ends with the same bytes.
    """
    invocation = of(context)
    invocation.json = json
    if resume and fresh:
        raise InvalidRequest("--resume goes on with a run and --fresh takes it away", hint="give one of them")
    from agora.cli.progress import pulls
    from experts.models import ModelStore
    from fed.config import load_config
    from fed.run import run as run_config

    settings = load_config(config)
    if seed is not None:
        settings = replace(settings, run=replace(settings.run, seed=seed))
    folder = settings.run.out if out is None else out
    with pulls(invocation) as bars:
        source = settings.model.source
        model = ModelStore().resolve(source, pull=not no_pull, progress=functools.partial(bars, source))
    with view(invocation, quiet=quiet) as shown, _stopper(shown) as stops:
        outcome = run_config(
            settings, folder, progress=shown, resume=resume, fresh=fresh, stop=lambda: stops.asked, model=model
        )
    if outcome.finished:
        _tell(invocation, outcome)
        return
    with_seed = f" --seed {seed}" if seed is not None else ""
    with_out = f" --out {out}" if out is not None else ""
    go_on = f"agora fed run {config}{with_out}{with_seed} --resume"
    if json:
        invocation.print_json({"error": {"code": "interrupted", "message": "stopped and saved", "hint": go_on}})
        # Told already: what tells of interruptions would print a second object.
        invocation.json = False
    invocation.err.print(f"stopped, and saved in {folder}", markup=False, soft_wrap=True)
    invocation.err.print(f"go on with: {go_on}", markup=False, soft_wrap=True)
    raise typer.Exit(ExitCode.INTERRUPTED)


@app.command("report")
def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write all of it as one page.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="DIR", help="Write the plots, as SVG.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what a run did; also one that is still going on, or was killed."""
    from fed.report import read_report, summarise

    invocation = of(context)
    invocation.json = json
    found = read_report(folder)
    summary = summarise(found)
    written: list[Path] = []
    if plots is not None:
        from fed.report.figures import figures

        written += [_written(plots / f"{f.name}.svg", f.svg) for f in figures(found, summary)]
    if html is not None:
        from fed.report.page import page

        written.append(_written(html, page(found, summary).encode()))
    if json:
        invocation.print_json(summary.to_json() | {"written": [str(path) for path in written]})
        return
    _show(invocation, folder, summary)
    for path in written:
        invocation.say(f"wrote {path}")


class _Stops:
    """Whether the user asked the run to stop."""

    asked = False


@contextmanager
def _stopper(shown: FedView) -> Iterator[_Stops]:
    """Ctrl-C and SIGTERM save the run; before it has begun, and a second time, they end the command at once."""
    stops = _Stops()

    def ask(number: int, frame: Any) -> None:
        if stops.asked or not shown.begun:
            raise KeyboardInterrupt
        stops.asked = shown.stopping = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(invocation: Invocation, outcome: Outcome) -> None:
    """What came out of a run."""
    adapters = {name: str(path) for name, path in outcome.adapters.items()}
    if invocation.json:
        invocation.print_json({"folder": str(outcome.folder), **outcome.result, "adapters": adapters})
        return
    result = outcome.result
    rows = []
    for name, m in result["models"].items():
        several = len(result["models"]) > 1
        loss, accuracy = judged(m.get("last", {}), several=several)
        first, right = judged(m.get("first", {}), several=several)
        rows.append(
            (
                name,
                str(m["version"]),
                f"{_plain(first)} → {_plain(loss)}" if loss is not None else "",
                f"{_percent(right)} → {_percent(accuracy)}" if accuracy is not None else "",
                adapters[name],
            )
        )
    print_table(invocation.out, ("model", "version", "loss", "accuracy", "adapter"), rows, right=("version",))
    invocation.say(
        f"{counted(result['versions'], 'version')} in {seconds(result['at'])} of the clients' time; "
        f"{result['absorbed']:,} updates used, {result['lost']:,} jobs lost, {result['refused']:,} refused; "
        f"{size(result['bytes_up'])} up, {size(result['bytes_down'])} down"
    )
    invocation.note(f"see: agora fed report {outcome.folder}")


def _show(invocation: Invocation, folder: Path, summary: Summary) -> None:
    why = f": {summary.why}" if summary.why else ""
    totals = summary.totals
    invocation.say(f"{folder}: {summary.standing}{why}")
    invocation.say(
        f"{counted(summary.versions, 'version')} in {seconds(summary.seconds)} of the clients' time; "
        f"{totals['assigned']:,} jobs: {totals['absorbed']:,} used, {totals['lost']:,} lost, "
        f"{totals['refused']:,} refused, {totals['cancelled']:,} stopped; "
        f"{size(totals['bytes_up'])} up, {size(totals['bytes_down'])} down"
    )
    invocation.say()
    rows = []
    for m in summary.models:
        several = len(summary.models) > 1
        loss, accuracy = judged(m.last, several=several)
        first, right = judged(m.first, several=several)
        rows.append(
            (
                m.name,
                str(m.version),
                "" if m.clients is None else str(m.clients),
                str(m.updates),
                f"{m.staleness:.2f}",
                _plain(m.train_loss),
                f"{_plain(first)} → {_plain(loss)}" if loss is not None else "",
                f"{_percent(right)} → {_percent(accuracy)}" if accuracy is not None else "",
            )
        )
    columns = ("model", "version", "clients", "updates", "staleness", "training loss", "loss", "accuracy")
    print_table(invocation.out, columns, rows, right=columns[1:6])
    invocation.say()
    clients = [
        (
            c.name,
            "" if c.rows is None else f"{c.rows:,}",
            c.model or "",
            str(c.updates),
            f"{100 * c.share:.1f} %",
            f"left out: {c.note}" if c.left_out else c.note or "",
        )
        for c in summary.clients
    ]
    heads = ("client", "rows", "model", "updates", "share", "note")
    print_table(invocation.out, heads, clients, right=("rows", "updates", "share"))
    if summary.staleness:
        invocation.say()
        late = [(str(tau), f"{count:,}") for tau, count in summary.staleness.items()]
        print_table(invocation.out, ("staleness", "updates"), late, right=("staleness", "updates"))
    if summary.problems:
        invocation.say()
        print_table(invocation.out, ("at", "what"), [(seconds(at), text) for at, text in summary.problems])


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _written(path: Path, data: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as e:
        raise AgoraError(f"{path} cannot be written: {e.strerror or e}", hint="name another place") from None
    return path


def _write(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        made.write_text(text, encoding="utf-8")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
