"""Federation under a virtual clock: compute, transfers and drop-out are modelled, while trainers really train.

    result = simulate(
        Pace.fedbuff(16, 4, publications=100), fleet(16, speeds="lognormal"), trainer, rule, initial=adapter
    )

The same arguments give the same adapter and the same record, bit for bit. With a folder, the run is saved now and then;
killed at any moment and started anew, it goes on from there, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
from filelock import FileLock, Timeout

from agora.errors import ConfigError, StoreError
from fed.adapter import Adapter
from fed.aggregate.rule import Rule
from fed.chain import Chain
from fed.fleet import Fleet
from fed.pace import Pace
from fed.simulator.checkpoint import latest, write, write_whole
from fed.simulator.record import Record
from fed.simulator.run import Simulation, too_slow
from fed.simulator.same import difference
from fed.simulator.saving import pack, unpack
from fed.simulator.words import Checkpoints, Grouping, Published, Regroup, Result, Run
from fed.words import WHOLE, Trainer

__all__ = ["Checkpoints", "Grouping", "Published", "Regroup", "Result", "simulate"]

CONFIG: Final = "config.json"
RECORD: Final = "record.jsonl"
LOCK: Final = ".lock"


def simulate(
    pace: Pace,
    fleet: Fleet,
    trainer: Trainer,
    rule: Callable[[Adapter], Rule],
    *,
    initial: Adapter | Mapping[str, Adapter],
    chain: Chain | None = None,
    seed: int = 0,
    own_steps: int | Mapping[str, int] = 1,
    groups: Mapping[str, str] | None = None,
    grouping: Grouping | None = None,
    federation: str = "simulation",
    about: Mapping[str, Any] | None = None,
    until: Callable[[Published], bool] | None = None,
    observe: Callable[[Published], None] | None = None,
    checkpoint: Checkpoints | Path | str | None = None,
) -> Result:
    """Runs a federation, or goes on with one that was interrupted.

    Args:
        pace: How the server goes about it.
        fleet: Clients and links.
        trainer: Trains for all clients. A job is trained when its update is sent (with a chain) or arrives (without),
            so one that is lost or stopped before costs nothing.
        rule: Makes the rule of a model from the model's first version.
        initial: The first version, or the first versions of several models; clients that are given no other belong to
            the first of them.
        chain: What updates go through before they travel; they are then really encoded, checked and decoded, and their
            real bytes take time. An empty `Chain()` sends them as they are. None: four bytes a number are counted, and
            nothing is encoded.
        seed: Of the server's choices and the jobs. What the fleet draws has the fleet's own.
        own_steps: Steps of jobs whose number the pace leaves to the client, of all or by client.
        groups: Model by client at the beginning.
        grouping: Moves clients between models on the way.
        federation: Name in the headers of updates.
        about: Whatever else determines the result (data, learning rate, the rule and its settings), fit for JSON. A
            run is not resumed with another one.
        until: Told of each version; True ends the run.
        observe: Told of each version. After a crash, those since the last checkpoint are told again.
        checkpoint: Where to save the run, and how often.

    Returns:
        How it ended; `why` is empty if it was stopped. If it had ended before, the same again, at once.

    Raises:
        ConfigError: If there are no clients, groups name what is not there, or the folder belongs to another run.
        StoreError: If the folder cannot be used.
    """
    models = {WHOLE: initial} if isinstance(initial, Adapter) else dict(initial)
    run = Run(
        pace=pace,
        fleet=fleet,
        trainer=trainer,
        rule=rule,
        initial=models,
        chain=chain,
        seed=seed,
        own_steps=own_steps,
        groups=dict(groups or {}),
        grouping=grouping,
        federation=federation,
        about=dict(about or {}),
        until=until,
        observe=observe,
    )
    _check(run)
    if checkpoint is None:
        sim = Simulation(run, Record(None))
        sim.start()
        while sim.advance():
            pass
        return sim.result()
    places = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(folder=Path(checkpoint))
    with alone_in(places.folder):
        return _go_on(run, places)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder, made if it is not there, so that no other run uses it.

    Raises:
        StoreError: If one does, or the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(
            f"another process runs in {str(folder)!r}", hint="wait until it ends, or take another folder"
        ) from None
    except OSError as e:
        raise StoreError(f"the folder {str(folder)!r} cannot be used: {e}") from e
    try:
        yield
    finally:
        lock.release()


def _go_on(run: Run, places: Checkpoints) -> Result:
    folder = places.folder
    same_run(folder, config(run))
    saved = latest(folder)
    record = Record(folder / RECORD, saved.facts["record"] if saved else 0)
    try:
        sim = Simulation(run, record)
        if saved:
            unpack(sim, saved.facts, saved.arrays)
        else:
            sim.start()
        number = saved.number if saved else 0
        if sim.over is not None:
            return sim.result()
        last_version, last_time = sim.versions, time.monotonic()
        while True:
            goes_on = sim.advance()
            if places.versions is not None:
                due = sim.versions >= last_version + places.versions
            else:
                due = time.monotonic() >= last_time + places.seconds
            stops = places.stop is not None and places.stop()
            if due or stops or not goes_on:
                # Rows reach the disk before the checkpoint that counts them.
                record.sync()
                number += 1
                write(folder, number, *pack(sim))
                last_version, last_time = sim.versions, time.monotonic()
            if stops or not goes_on:
                return sim.result()
    finally:
        record.close()


def same_run(folder: Path, now: Mapping[str, Any]) -> None:
    """Writes what determines a run into its folder, or compares it with what is there.

    Raises:
        ConfigError: If the folder belongs to another run.
        StoreError: If it cannot be read or written.
    """
    path = folder / CONFIG
    try:
        if not path.exists():
            write_whole(path, orjson.dumps(now, option=orjson.OPT_INDENT_2))
            return
        was = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise StoreError(f"{str(path)!r} cannot be read or written: {e}") from e
    if found := difference(was, now):
        raise ConfigError(
            f"the run in {str(folder)!r} was begun with another configuration: {found}",
            hint="go on with the same one, or take another folder",
        )


def config(run: Run) -> dict[str, Any]:
    """All that determines a run, fit for JSON, as far as it can be told from the outside."""
    told = {
        "pace": run.pace.to_json(),
        "fleet": run.fleet.to_json(),
        "initial": {name: _fingerprint(adapter) for name, adapter in run.initial.items()},
        "chain": None if run.chain is None else run.chain.to_json(),
        "seed": run.seed,
        "own_steps": run.own_steps if isinstance(run.own_steps, int) else dict(run.own_steps),
        "groups": dict(run.groups),
        "grouping": run.grouping is not None,
        "federation": run.federation,
        "about": run.about,
    }
    # Through JSON, so that it equals what was read: tuples are lists there.
    try:
        plain: dict[str, Any] = orjson.loads(orjson.dumps(told))
    except TypeError as e:
        raise ConfigError(f"the configuration is not fit for JSON: {e}", hint="look at `about`") from e
    return plain


def _fingerprint(adapter: Adapter) -> str:
    return hashlib.sha256(adapter.spec.digest.encode() + adapter.flat.tobytes()).hexdigest()


def _check(run: Run) -> None:
    if not run.fleet.clients:
        raise ConfigError("the fleet has no clients", hint="at least one is needed")
    for name, seed in (("seed", run.seed), ("the fleet's seed", run.fleet.seed)):
        if not 0 <= seed < 2**63:
            raise ConfigError(f"{name} is {seed}; it must be from 0 to 2⁶³ − 1")
    names = {c.name for c in run.fleet.clients}
    if unknown := sorted(set(run.groups) - names):
        raise ConfigError(f"groups name client {unknown[0]!r}, who is not in the fleet")
    if wrong := sorted(set(run.groups.values()) - set(run.initial)):
        raise ConfigError(f"groups name model {wrong[0]!r}, which has no first version")
    steps = [run.own_steps] if isinstance(run.own_steps, int) else list(run.own_steps.values())
    if any(n < 1 for n in steps):
        raise ConfigError(f"own_steps are {min(steps)}; there must be one at least")
    slow = too_slow(run)
    if len(slow) == len(run.fleet.clients):
        raise ConfigError(
            f"every client computes longer than job_timeout_s, {run.pace.job_timeout_s:g} s, allows; the fastest "
            f"{min(slow.values()):g} s",
            hint="set a longer job_timeout_s, or fewer steps",
        )
