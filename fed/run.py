"""A federation from a configuration: data, clients, training under a virtual clock, and results on disk.

    config = load_config("fed.toml")
    outcome = run(config, config.run.out)

The folder then holds `config.toml` (every setting told), `record.jsonl` (a row for each version), `evaluations.jsonl`,
`clusters.jsonl`, `clients.json`, `result.json`, and `adapters/MODEL/`, a PEFT folder for each model. None of them holds
any of the data. A run that was killed goes on from its last checkpoint, and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock, Timeout

from agora.errors import AgoraError, StoreError
from experts.models import ModelStore
from fed.adapter import Adapter
from fed.client import StepTold
from fed.config import FedConfig
from fed.runs import folder as files
from fed.runs.clients import clients_of, totals_of
from fed.runs.folder import ADAPTERS, CLIENTS, EVALUATIONS, GROUPS, LOCK, RESULT
from fed.runs.journal import Journal, read_lines
from fed.runs.prepare import Prepared, prepare
from fed.runs.told import Begun, Doing, Judged, Made, Progress, Stepped, silent
from fed.runs.watched import Watched
from fed.simulate import RECORD, Checkpoints, Published, Result, simulate
from fed.simulator.checkpoint import latest
from fed.words import WHOLE

WEIGHTS: Final = "adapter_model.safetensors"


class NothingLearned(AgoraError):
    """A run came to its end without a single version."""

    code = "nothing_learned"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """How a run ended.

    Attributes:
        folder: Where the results are.
        finished: Whether it came to its end; if not, it was stopped, and can be gone on with.
        result: What `result.json` holds; of a stopped run as far as it came.
        adapters: The PEFT folder of every model; none of a stopped run.
    """

    folder: Path
    finished: bool
    result: Mapping[str, Any]
    adapters: Mapping[str, Path]


def run(
    config: FedConfig,
    folder: Path,
    *,
    progress: Progress = silent,
    resume: bool = False,
    fresh: bool = False,
    stop: Callable[[], bool] | None = None,
    model: Path | None = None,
) -> Outcome:
    """Runs a federation, or goes on with one that was interrupted. Takes a while: not for the event loop.

    Args:
        config: The run.
        folder: Of its results.
        progress: Told how it goes, on this thread.
        resume: Whether to go on with a run that is in the folder; where there is none, it begins.
        fresh: Whether to take away a run that is in the folder.
        stop: Asked after everything that happens; True saves the run and ends the call.
        model: Folder of the base model; None to find it by its name on this machine, without the network.

    Returns:
        How it ended. Of a run that had ended before, the same again, at once.

    Raises:
        ConfigError: If the folder belongs to another run, or something in the configuration does not fit the data.
        InvalidRequest: If it does not fit the model, or the data cannot be read or learned from.
        NothingLearned: If no version was made, as when all clients are dead.
        StoreError: If the folder cannot be used.
    """
    folder = folder.absolute()
    try:
        # Before the lock, which would leave a file: most refusals need none.
        began = files.claim(folder, config, resume=resume, fresh=False) if not fresh else None
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK).acquire(timeout=0):
            if fresh:
                began = files.claim(folder, config, resume=resume, fresh=True)
            return _run(_pinned(config, began), folder, began is not None, progress, stop, model)
    except Timeout:
        raise StoreError(
            f"another process runs in {str(folder)!r}", hint="wait until it ends, or take another folder"
        ) from None
    except OSError as e:
        raise StoreError(f"the folder {str(folder)!r} cannot be used: {e.strerror or e}") from e


def _pinned(config: FedConfig, began: FedConfig | None) -> FedConfig:
    """With the number of threads that the run began with: another one would give other last bits."""
    threads = config.model.threads if began is None else began.model.threads
    return replace(config, model=replace(config.model, threads=threads or torch.get_num_threads()))


def _run(
    config: FedConfig,
    folder: Path,
    there: bool,
    progress: Progress,
    stop: Callable[[], bool] | None,
    model: Path | None,
) -> Outcome:
    if there and (done := files.read_json(folder / RESULT)) is not None:
        return _ended(folder, done)
    found = ModelStore().path(config.model.source) if model is None else model
    prepared = prepare(config, found, tell=progress, on_step=partial(_stepped, progress))
    if not there:
        files.begin(folder, config)
    saved = latest(folder)
    judgements = Journal(folder / EVALUATIONS, ("model", "version"))
    watched = None
    if prepared.grouping is not None:
        watched = Watched(prepared.grouping, Journal(folder / GROUPS, ("at", "model", "version")))
    judge = partial(_judge, prepared, judgements, watched, progress)
    if config.run.evaluate_every or not judgements.rows:
        progress(Doing(what="judging the start"))
    for name in _models(prepared):
        judge(0.0, name, 0, prepared.initial)
    if saved is None:
        _write_clients(prepared, folder, [], watched)
    pace = prepared.pace
    progress(
        Begun(
            clients=tuple(c.name for c in prepared.fleet.clients),
            resumed=saved is not None,
            publications=pace.publications,
            jobs=pace.jobs,
            seconds=pace.seconds,
            rows=tuple(read_lines(folder / RECORD)) if saved else (),
        )
    )

    def observe(published: Published) -> None:
        progress(Made(row=published.row))
        every = config.run.evaluate_every
        if every and published.version % every == 0:
            judge(published.at, published.model, published.version, published.adapter)

    result = simulate(
        pace,
        prepared.fleet,
        prepared.trainer,
        prepared.rule,
        initial=prepared.initial,
        chain=config.chain,
        seed=config.run.seed,
        own_steps=prepared.own_steps,
        grouping=watched,
        federation=config.run.name,
        about={**prepared.about, "config": files.core(config)},
        observe=observe,
        checkpoint=Checkpoints(
            folder=folder,
            versions=config.run.checkpoint_every,
            seconds=config.run.checkpoint_s,
            stop=stop,
        ),
    )
    _write_clients(prepared, folder, result.rows, watched)
    if not result.why:
        return Outcome(folder=folder, finished=False, result=_summary(config, result, judgements), adapters={})
    return _finish(config, folder, prepared, result, judgements, judge, watched, progress)


def _finish(
    config: FedConfig,
    folder: Path,
    prepared: Prepared,
    result: Result,
    judgements: Journal,
    judge: Callable[[float, str, int, Adapter], None],
    watched: Watched | None,
    progress: Progress,
) -> Outcome:
    """Judges and writes what came out."""
    newest = {row["model"]: row for row in result.rows}
    if not newest:
        raise NothingLearned(
            f"no version was made: {result.why}" + (f"; {result.problems[-1]}" if result.problems else ""),
            hint="look at what clients lose in [fleet] and how long jobs may take in [server]",
        )
    progress(Doing(what="judging the end"))
    for name, row in newest.items():
        judge(row["at"], name, row["version"], result.adapters[name])
    progress(Doing(what="writing the adapters"))
    files.replace_folder(folder / ADAPTERS)
    for name in newest:
        prepared.trainer.save(result.adapters[name], folder / ADAPTERS / name)
    summary = _summary(config, result, judgements)
    groups = watched.inner.groups() if watched is not None else {}
    for name, model in summary["models"].items():
        model["sha256"] = files.sha256(folder / ADAPTERS / name / WEIGHTS)
        model["rank"] = result.adapters[name].spec.rank
        if watched is not None:
            model["clients"] = len(groups.get(name, []))
    files.write_json(folder / RESULT, summary)
    return _ended(folder, summary)


def _ended(folder: Path, result: Mapping[str, Any]) -> Outcome:
    adapters = {name: folder / ADAPTERS / name for name in result["models"]}
    if missing := [path for path in adapters.values() if not path.is_dir()]:
        raise StoreError(f"the run has ended, but {missing[0]} is gone", hint="--fresh begins anew")
    return Outcome(folder=folder, finished=True, result=result, adapters=adapters)


def _summary(config: FedConfig, result: Result, judgements: Journal) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for row in result.rows:
        models[row["model"]] = {"version": row["version"], "at": row["at"]}
    for row in judgements.rows:
        if row["model"] in models and row["version"] <= models[row["model"]]["version"]:
            told = {k: v for k, v in row.items() if k != "model"}
            models[row["model"]].setdefault("first", told)
            models[row["model"]]["last"] = told
    return {
        "name": config.run.name,
        "seed": config.run.seed,
        "why": result.why,
        "at": result.at,
        "versions": len(result.rows),
        "models": models,
        **totals_of(result.rows),
        "problems": list(result.problems),
    }


def _judge(
    prepared: Prepared,
    judgements: Journal,
    watched: Watched | None,
    progress: Progress,
    at: float,
    model: str,
    version: int,
    adapter: Adapter,
) -> None:
    row: dict[str, Any] = {"at": at, "model": model, "version": version}
    if not prepared.judge.judges or row in judgements:
        return
    members = None if watched is None else {c for c, m in watched.inner.members.items() if m == model}
    # Before anybody joined, all belong to the one model that there is.
    row |= prepared.judge.judge(adapter, members or None)
    judgements.add(row)
    progress(Judged(row=row))


def _models(prepared: Prepared) -> tuple[str, ...]:
    return (prepared.grouping.home,) if prepared.grouping is not None else (WHOLE,)


def _write_clients(prepared: Prepared, folder: Path, rows: list[dict[str, Any]], watched: Watched | None) -> None:
    members = None if watched is None else watched.inner.members
    told = clients_of(prepared.fleet.clients, rows, members, left_out=prepared.left_out, notes=prepared.notes)
    files.write_json(folder / CLIENTS, {"clients": told})


def _stepped(progress: Progress, told: StepTold) -> None:
    job = told.job
    progress(Stepped(client=job.client, model=job.model, step=told.step, steps=told.steps, loss=told.loss))
