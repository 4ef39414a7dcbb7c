"""A tree of aggregators under a virtual clock: device → edge → cloud, to any depth.

    tree = Tree.even(
        Level(name="cloud", pace=Pace.synchronous(4, publications=50)),
        Level(name="edge", pace=Pace.fedbuff(8, 4), every=2, up=Link(up_bytes_per_s=1e6, round_trip_s=0.2)),
        [c.name for c in world.clients], edges=4,
    )
    result = simulate_tree(tree, world, trainer, initial=adapter)
    served = mix(result.seen_by("client-3"), {"cloud": 0.5, "edge": 0.5})

A tree of one aggregator is a flat federation: the same bytes as `fed.simulate.simulate` gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from agora.errors import ConfigError, StoreError
from fed.adapter import Adapter, Method
from fed.aggregate.product import ProductRule
from fed.fleet import Change, Fleet
from fed.hierarchy.grove import Grove
from fed.hierarchy.saving import pack_tree, unpack_tree
from fed.hierarchy.tree import Tree
from fed.hierarchy.words import Made, TreeResult, TreeRun
from fed.simulate import alone_in, config, same_run
from fed.simulator.checkpoint import latest, write
from fed.simulator.record import Record
from fed.simulator.words import Checkpoints, Run
from fed.words import WHOLE, Trainer

RECORDS: Final = "records"
"""Folder of the records: one file per aggregator, `NAME.jsonl`, since one may not see what another one does."""


def simulate_tree(
    tree: Tree,
    fleet: Fleet,
    trainer: Trainer,
    *,
    initial: Adapter,
    seed: int = 0,
    own_steps: int | Mapping[str, int] = 1,
    changes: tuple[Change, ...] = (),
    federation: str = "simulation",
    about: Mapping[str, Any] | None = None,
    until: Callable[[Made], bool] | None = None,
    observe: Callable[[Made], None] | None = None,
    checkpoint: Checkpoints | Path | str | None = None,
) -> TreeResult:
    """Runs a federation through a tree, or goes on with one that was interrupted.

    The run ends when the server at the top does, by its pace. A job that an aggregator gets from above lasts as long as
    its `every` versions and its link take: `job_timeout_s` of the level above must allow for that.

    Args:
        tree: Aggregators, and which device belongs to which.
        fleet: The devices, their links to their aggregators, and when they come and go.
        trainer: Trains for all devices.
        initial: The first version, of all aggregators.
        seed: Of the servers' choices and the jobs.
        own_steps: Steps of jobs whose number the pace leaves to the device, of all or by device.
        changes: When aggregators go and come back, by `Change` with an aggregator's name. One that is gone keeps what
            it has stored; the aggregators below it wait, its devices do as its level's `orphans` says.
        federation: Name in the headers of updates.
        about: Whatever else determines the result, fit for JSON.
        until: Told of each version of every aggregator; True ends the run.
        observe: Told of each version of every aggregator.
        checkpoint: Where to save the run, and how often, by versions of all aggregators together.

    Returns:
        How it ended; `why` is empty if it was stopped. If it had ended before, the same again, at once.

    Raises:
        ConfigError: If tree and fleet have different devices, the rules of two levels cannot be combined, or the folder
            belongs to another run.
        StoreError: If the folder cannot be used.
    """
    run = TreeRun(
        tree=tree,
        fleet=fleet,
        trainer=trainer,
        initial=initial,
        seed=seed,
        own_steps=own_steps,
        changes=tuple(changes),
        federation=federation,
        about=dict(about or {}),
        until=until,
        observe=observe,
    )
    _check(run)
    if checkpoint is None:
        grove = Grove(run, lambda name: Record(None))
        _check_rules(grove)
        grove.start()
        while grove.advance():
            pass
        return grove.result()
    places = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(folder=Path(checkpoint))
    with alone_in(places.folder):
        return _go_on(run, places)


def _go_on(run: TreeRun, places: Checkpoints) -> TreeResult:
    folder = places.folder
    same_run(folder, _config(run))
    saved = latest(folder)
    sizes = {name: saved.facts["nodes"][name]["record"] if saved else 0 for name in run.tree.places}
    records: dict[str, Record] = {}

    def record(name: str) -> Record:
        records[name] = Record(folder / RECORDS / f"{name}.jsonl", sizes[name])
        return records[name]

    try:
        _make_folder(folder / RECORDS)
        grove = Grove(run, record)
        _check_rules(grove)
        if saved:
            unpack_tree(grove, saved.facts, saved.arrays)
        else:
            grove.start()
        number = saved.number if saved else 0
        if grove.over is not None:
            return grove.result()
        last_version, last_time = grove.versions, time.monotonic()
        while True:
            goes_on = grove.advance()
            if places.versions is not None:
                due = grove.versions >= last_version + places.versions
            else:
                due = time.monotonic() >= last_time + places.seconds
            stops = places.stop is not None and places.stop()
            if due or stops or not goes_on:
                # Rows reach the disk before the checkpoint that counts them.
                for one in records.values():
                    one.sync()
                number += 1
                write(folder, number, *pack_tree(grove))
                last_version, last_time = grove.versions, time.monotonic()
            if stops or not goes_on:
                return grove.result()
    finally:
        for one in records.values():
            one.close()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise StoreError(f"the folder {str(folder)!r} cannot be made: {e}") from e


def _config(run: TreeRun) -> dict[str, Any]:
    top = run.tree.level(run.tree.root)
    flat = Run(
        pace=top.pace,
        fleet=run.fleet,
        trainer=run.trainer,
        rule=_no_rule,
        initial={WHOLE: run.initial},
        seed=run.seed,
        own_steps=run.own_steps,
        federation=run.federation,
        about={
            "of": run.about,
            "tree": run.tree.to_json(),
            "changes": [[c.at, c.client, str(c.what)] for c in run.changes],
        },
    )
    found = config(flat)
    about = found.pop("about")
    return {**found, "tree": about["tree"], "changes": about["changes"], "about": about["of"]}


def _no_rule(adapter: Adapter) -> Any:
    raise NotImplementedError


def _check(run: TreeRun) -> None:
    names, homes = [c.name for c in run.fleet.clients], run.tree.home
    if not names:
        raise ConfigError("the fleet has no clients", hint="at least one is needed")
    if without := [n for n in names if n not in homes]:
        raise ConfigError(f"device {without[0]!r} of the fleet is under no aggregator")
    if unknown := sorted(set(homes) - set(names)):
        raise ConfigError(f"device {unknown[0]!r} of {homes[unknown[0]]!r} is not in the fleet")
    if clash := sorted(set(names) & set(run.tree.places)):
        raise ConfigError(f"{clash[0]!r} is a device and an aggregator")
    for name, seed in (("seed", run.seed), ("the fleet's seed", run.fleet.seed)):
        if not 0 <= seed < 2**63:
            raise ConfigError(f"{name} is {seed}; it must be from 0 to 2⁶³ − 1")
    steps = [run.own_steps] if isinstance(run.own_steps, int) else list(run.own_steps.values())
    if any(n < 1 for n in steps):
        raise ConfigError(f"own_steps are {min(steps)}; there must be one at least")
    for change in run.changes:
        if change.client not in run.tree.places:
            raise ConfigError(
                f"{change.client!r} {change.what}, and is no aggregator of this tree",
                hint="when devices come and go is for the fleet to say",
            )
        if change.client == run.tree.root:
            raise ConfigError(f"{change.client!r} is at the top; when it goes, so does the run")
        if not change.at >= 0:
            raise ConfigError(f"the time when {change.client!r} {change.what} is {change.at}; it must be from 0")


def _check_rules(grove: Grove) -> None:
    """LoRA's adapters of all levels must be added in the same way, as products or as factors."""
    if grove.run.initial.spec.method is not Method.LORA:
        return
    products = {name: isinstance(node.rule, ProductRule) for name, node in grove.nodes.items()}
    kinds = {node.rule.name for name, node in grove.nodes.items() if not products[name]}
    if kinds and (len(kinds) > 1 or any(products.values())):
        told = ", ".join(f"{name}: {node.rule.name}" for name, node in grove.nodes.items())
        raise ConfigError(
            f"rules that add LoRA's products and rules that add its factors do not go together: {told}",
            hint="take the same rule for all levels, or 'delta', 'dense', 'stacking' and 'mix' in any combination",
        )
