"""The simulator: repeatable to the last bit, whatever happens to the process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fed
from agora.errors import ConfigError, StoreError
from fed.adapter import Adapter, Method, Spec
from fed.aggregate.rule import State as Held
from fed.aggregate.rules import make
from fed.chain import Chain
from fed.fleet import Change, Move, fleet
from fed.pace import Pace, Weighting
from fed.simulate import Checkpoints, Published, Regroup, Result, simulate
from fed.words import ClientInfo, Job, Trained

TOY = Path(__file__).parent / "simulator" / "toy.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulated_toy", TOY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load()
ONE = Spec(method=Method.DENSE, shapes={"x": (3,)})


def same(one: Result, other: Result) -> bool:
    flat = {name: a.flat.tobytes() for name, a in one.adapters.items()}
    return (
        flat == {name: a.flat.tobytes() for name, a in other.adapters.items()}
        and one.rows == other.rows
        and one.state == other.state
        and (one.why, one.at) == (other.why, other.at)
    )


class Add:
    """Adds one to every number, and tells of a loss."""

    def __init__(self) -> None:
        self.jobs: list[int] = []

    def train(self, start: Adapter, job: Job) -> Trained:
        self.jobs.append(job.id)
        return Trained(delta=np.ones(start.spec.size, np.float32), examples=2, steps=1, metrics={"loss": float(job.id)})


def plain(pace: Pace, world: Any, trainer: Any = None, **more: Any) -> Result:
    more = {"initial": Adapter.zeros(ONE)} | more
    return simulate(pace, world, trainer or Add(), lambda a: make("mean", a), **more)


@pytest.mark.parametrize("kind", ["dense", "chain", "lora", "sync"])
def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(kind: str) -> None:
    one, other = toy.run(kind), toy.run(kind)
    assert same(one, other) and not same(one, toy.run(kind, seed=4))
    if kind != "lora":
        assert one.rows[-1]["loss"] < 0.6 * one.rows[0]["loss"], "trainers really train"
    assert one.rows[-1]["lost"] > 0 and one.rows[-1]["bytes_up"] > 0


@pytest.mark.parametrize("kind", ["dense", "chain", "lora", "sync"])
def test_stopped_after_any_version_and_resumed_it_ends_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    whole = toy.run(kind)

    class Stop(Exception):
        pass

    class Breaks(toy.Pull):  # type: ignore[misc, name-defined]
        def train(self, start: Adapter, job: Job) -> Trained:
            if len(self.trained) == 23:
                raise Stop
            return super().train(start, job)  # type: ignore[no-any-return]

    for _ in range(100):
        try:
            found = toy.run(kind, Checkpoints(folder=tmp_path, versions=1), trainer=Breaks())
            break
        except Stop:
            continue
    assert same(found, whole)
    rows = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert rows == whole.rows
    # It has ended: the same again, and nothing is trained for it.
    trainer = toy.Pull()
    assert same(toy.run(kind, Checkpoints(folder=tmp_path, versions=1), trainer=trainer), whole)
    assert not trainer.trained


@pytest.fixture(scope="module")
def starter() -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": str(Path(fed.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(TOY)], env=env, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("kind", ["chain", "lora", "sync"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    kind: str, tmp_path: Path, starter: subprocess.Popen[str]
) -> None:
    assert starter.stdin is not None and starter.stdout is not None
    whole = toy.run(kind)
    rng, kills, newest, moments = random.Random(kind), 0, 0, set()
    for _ in range(100):
        print(kind, tmp_path, file=starter.stdin, flush=True)
        number = int(starter.stdout.readline())
        if kills < 8:
            if kills % 3:
                _wait_for(tmp_path, more_than=newest)
            time.sleep(rng.uniform(0.0, 0.05))
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        code = int(starter.stdout.readline())
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        newest = _checkpoints(tmp_path)
        moments.add(newest)
    assert code == 0 and kills >= 3 and len(moments) >= 3, "it was killed several times, and while at work"
    found = toy.run(kind, Checkpoints(folder=tmp_path, versions=2))
    assert same(found, whole)
    rows = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [r["version"] for r in rows] == list(range(1, len(whole.rows) + 1)) and rows == whole.rows


def _checkpoints(folder: Path) -> int:
    """Number of the newest one."""
    return max((int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*")), default=0)


def _wait_for(folder: Path, more_than: int) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and _checkpoints(folder) <= more_than:
        time.sleep(0.002)


def test_another_configuration_is_refused_with_the_key_that_differs(tmp_path: Path) -> None:
    places = Checkpoints(folder=tmp_path, versions=1)
    pace, world = Pace.fedasync(2, publications=3, steps=1), fleet(2)
    plain(pace, world, checkpoint=places, about={"data": {"alpha": 0.3}})
    for told, call in {
        "pace.publications is 4, and was 3": (pace.but(publications=4), world, {}),
        "fleet.clients has 3 entries, and had 2": (pace, fleet(3), {}),
        "fleet.loss is 0.1, and was 0.0": (pace, fleet(2, loss=0.1), {}),
        "about.data.alpha is 0.5, and was 0.3": (pace, world, {"about": {"data": {"alpha": 0.5}}}),
        "chain is [], and was None": (pace, world, {"chain": Chain()}),
        "seed is 7, and was 0": (pace, world, {"seed": 7}),
    }.items():
        with pytest.raises(ConfigError) as e:
            plain(call[0], call[1], checkpoint=places, **({"about": {"data": {"alpha": 0.3}}} | call[2]))
        assert told in str(e.value)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    def again(published: Published) -> None:
        with pytest.raises(StoreError, match="another process runs"):
            plain(Pace.fedasync(1, publications=1), fleet(1), checkpoint=tmp_path)

    plain(Pace.fedasync(1, publications=1), fleet(1), checkpoint=tmp_path, observe=again)


def test_the_clock_goes_by_the_model() -> None:
    world = fleet(2, seconds_per_step=2.0, up_bytes_per_s=100.0, down_bytes_per_s=1000.0, round_trip_s=0.5)
    result = plain(Pace.synchronous(2, publications=3, steps=5), world)
    transfer = 4 * 3 + 512
    each = 0.5 + transfer / 1000 + 10.0 + transfer / 100
    assert [r["at"] for r in result.rows] == pytest.approx([each, 2 * each, 3 * each])
    assert result.rows[-1]["bytes_up"] == 6 * transfer
    # The mean of equal deltas: one more each round.
    assert result.adapters["all"].flat.tolist() == [3.0, 3.0, 3.0]
    assert result.why == "3 versions were made"


def test_a_chain_makes_updates_smaller_and_so_faster() -> None:
    wide = Adapter.zeros(Spec(method=Method.DENSE, shapes={"x": (5000,)}))
    world = fleet(4, up_bytes_per_s=10_000.0)
    pace = Pace.synchronous(4, publications=2, steps=1)
    raw = plain(pace, world, chain=Chain(), initial=wide)
    packed = plain(pace, world, chain=Chain.from_config([{"kind": "int8"}]), initial=wide)
    up = [r.rows[-1]["bytes_up"] / 8 for r in (raw, packed)]
    assert 20_000 < up[0] < 21_500 and 5_000 < up[1] < 6_500
    assert raw.at == pytest.approx(2 * (1 + up[0] / 10_000), rel=0.01)
    assert packed.at < 0.6 * raw.at
    assert packed.adapters["all"].flat == pytest.approx(2.0, abs=0.01)


def test_lost_jobs_and_stopped_ones_are_never_trained() -> None:
    trainer = Add()
    result = plain(Pace.synchronous(4, over_select=1.5, publications=10), fleet(8, loss=0.3, jitter=1.0), trainer)
    last = result.rows[-1]
    assert last["lost"] > 5 and last["cancelled"] > 5
    assert len(trainer.jobs) == last["absorbed"] < last["assigned"]


def test_clients_that_die_leave_and_join_do_not_stall_it() -> None:
    changes = (
        Change(5.5, "client-0", Move.DIES),
        Change(7.5, "client-1", Move.LEAVES),
        Change(10.0, "client-2", Move.JOINS),
        Change(40.0, "client-0", Move.JOINS),
    )
    seen: list[tuple[float, str]] = []

    class Watch(Add):
        def train(self, start: Adapter, job: Job) -> Trained:
            seen.append((clock[-1], job.client))
            return super().train(start, job)

    clock = [0.0]
    pace = Pace.fedasync(3, publications=80, steps=1, job_timeout_s=5.0)
    result = plain(pace, fleet(3, changes=changes), Watch(), observe=lambda p: clock.append(p.at))
    assert result.why == "80 versions were made"
    assert {c for at, c in seen if at < 5} == {"client-0", "client-1"}
    assert {c for at, c in seen if 12 < at < 40} == {"client-2"}
    assert {c for at, c in seen if at > 42} == {"client-0", "client-2"}
    assert 1 <= result.rows[-1]["lost"] <= 4


def test_all_dead_is_told() -> None:
    changes = tuple(Change(3.0, f"client-{i}", Move.DIES) for i in range(3))
    result = plain(Pace.fedasync(3, job_timeout_s=5.0, give_up=3), fleet(3, changes=changes))
    assert "no client works" in result.why and 0 < len(result.rows) < 20


def test_a_trainer_that_fails_or_diverges_costs_its_own_jobs_only() -> None:
    class Fragile(Add):
        def train(self, start: Adapter, job: Job) -> Trained:
            if job.client == "client-0":
                raise StoreError("its disk is full")
            trained = super().train(start, job)
            return replace(trained, delta=trained.delta * np.float32(np.nan)) if job.client == "client-1" else trained

    for chain in (None, Chain()):
        result = plain(Pace.fedasync(3, publications=30), fleet(3), Fragile(), chain=chain)
        assert result.adapters["all"].flat.tolist() == [30.0] * 3
        last = result.rows[-1]
        assert last["absorbed"] == 30 and last["lost"] + last["refused"] >= 2
        told = " ".join(p for r in result.rows for p in r["problems"])
        assert "its disk is full" in told and ("norm is nan" in told or "NaN" in told)


def test_a_client_without_examples_is_left_out_and_told() -> None:
    class Empty(Add):
        def train(self, start: Adapter, job: Job) -> Trained:
            trained = super().train(start, job)
            return replace(trained, examples=0) if job.client == "client-0" else trained

    for chain in (None, Chain()):
        result = plain(Pace.fedasync(2, publications=20, discount="constant"), fleet(2), Empty(), chain=chain)
        assert result.adapters["all"].flat.tolist() == [20.0] * 3
        assert any("client-0" in p for r in result.rows for p in r["problems"])
    alone = plain(Pace.fedasync(1, give_up=3), fleet(1), Empty())
    assert "no client works" in alone.why and "0 examples" in alone.problems[0]


def test_clients_that_the_timeout_shuts_out_are_told_at_once() -> None:
    world = fleet(3, speeds="tiers", parameters={"factors": [1.0, 4.0, 9.0]})
    result = plain(Pace.fedasync(3, steps=2, job_timeout_s=10.0, publications=9), world)
    assert "1 of 3 clients compute longer than job_timeout_s, 10 s" in result.rows[0]["problems"][0]
    with pytest.raises(ConfigError, match="every client computes longer than job_timeout_s, 1 s"):
        plain(Pace.fedasync(3, steps=2, job_timeout_s=1.0), world)


def test_until_ends_the_run() -> None:
    result = plain(Pace.fedasync(2, discount="constant"), fleet(2), until=lambda p: bool(p.adapter.flat[0] >= 7))
    assert len(result.rows) == 7 and "version 7" in result.why


def test_rows_tell_of_staleness_and_losses() -> None:
    infos = [ClientInfo(name="slow", examples=2), ClientInfo(name="fast", examples=2)]
    world = fleet(infos, speeds="tiers", parameters={"factors": [1.0, 4.5]})
    pace = Pace.fedasync(2, publications=9, steps=1, discount="constant", weighting=Weighting.EQUAL)
    rows = plain(pace, world).rows
    assert max(r["staleness_max"] for r in rows) == 4
    assert all(r["updates"] == r["clients"] == 1 and r["loss"] is not None for r in rows)


def test_clusters_learn_apart_and_clients_may_move() -> None:
    class Toward(Add):
        """The first two clients pull towards 1, the others towards −1."""

        def train(self, start: Adapter, job: Job) -> Trained:
            goal = 1.0 if job.client in ("client-0", "client-1") else -1.0
            delta = (0.5 * (goal - start.flat)).astype(np.float32)
            return Trained(delta=delta, examples=1, steps=1)

    class Moves:
        """Puts those whose updates fell into a cluster of their own, once."""

        def __init__(self) -> None:
            self.fell: list[str] = []
            self.moved = False

        def joins(self, client: ClientInfo) -> str | None:
            return None

        def absorbed(self, job: Job, start: Adapter, delta: Any) -> None:
            if delta[0] < 0 and job.client not in self.fell:
                self.fell.append(job.client)

        def regroup(self, published: Published) -> Regroup | None:
            if self.moved or published.version < 4:
                return None
            self.moved = True
            return Regroup(models=dict.fromkeys(self.fell, "other"), starts={"other": published.adapter})

        def state(self) -> Held:
            return Held({}, {"fell": self.fell, "moved": self.moved})

        def load_state(self, state: Held) -> None:
            self.fell, self.moved = list(state.facts["fell"]), state.facts["moved"]

    pace = Pace.synchronous(4, publications=30)
    alone = plain(pace, fleet(4), Toward())
    assert abs(alone.adapters["all"].flat[0]) < 0.1
    result = plain(pace, fleet(4), Toward(), grouping=Moves())
    assert result.adapters["all"].flat[0] > 0.9 and result.adapters["other"].flat[0] < -0.9

    start = {"a": Adapter.zeros(ONE), "b": Adapter.zeros(ONE)}
    groups = {"client-2": "b", "client-3": "b"}
    fixed = plain(pace, fleet(4), Toward(), initial=start, groups=groups)
    assert fixed.adapters["a"].flat[0] > 0.9 and fixed.adapters["b"].flat[0] < -0.9


def test_thousands_of_idle_clients_are_no_burden() -> None:
    trainer = Add()
    result = plain(Pace.fedbuff(8, 4, publications=25), fleet(5000), trainer)
    assert len(result.rows) == 25 and len(trainer.jobs) == 100
    assert result.events < 5000 + 250


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"groups": {"nobody": "all"}}, "'nobody', who is not in the fleet"),
        ({"groups": {"client-0": "x"}}, "model 'x', which has no first version"),
        ({"own_steps": 0}, "own_steps are 0"),
        ({"seed": -1}, "seed is -1"),
        ({"about": {"x": object()}}, "not fit for JSON"),
    ],
)
def test_what_cannot_be_run_is_told_at_once(more: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        plain(Pace.fedasync(1, publications=1), fleet(2), checkpoint=tmp_path, **more)
    assert told in str(e.value)
    with pytest.raises(ConfigError, match="no clients"):
        plain(Pace(), fleet(0))
