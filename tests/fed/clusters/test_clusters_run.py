"""Groupings in a run: found, kept, moved after drift, resumed to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agora.errors import ConfigError, StoreError
from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.aggregate.lowrank import fresh
from fed.aggregate.mean import MomentumOptions
from fed.aggregate.rules import make
from fed.clusters import ways
from fed.clusters.base import Base
from fed.clusters.drift import Watch
from fed.clusters.sharing import SharedA, SharedSteps
from fed.fleet import Change, Move, fleet
from fed.pace import Pace
from fed.simulate import Checkpoints, Published, Result, simulate
from fed.words import ClientInfo, Job, Profile, Trained

DENSE = Spec(method=Method.DENSE, shapes={"w": (5, 6)})
LORA = Spec.lora({"q": LayerSize(8, 6), "v": LayerSize(5, 7)}, rank=4, alpha=4.0)


class Pull:
    """Clients pull towards the target of their group, with noise; some change group at a job."""

    def __init__(self, groups: int, *, at: int | None = None, moved: Mapping[int, int] | None = None) -> None:
        self.groups, self.at, self.moved, self.stop = groups, at, dict(moved or {}), 10**9

    def group(self, client: str, job: int) -> int:
        n = int(client.removeprefix("c"))
        return self.moved[n] if self.at is not None and job >= self.at and n in self.moved else n % self.groups

    def target(self, size: int, group: int) -> np.ndarray:
        return np.random.default_rng([7, group]).normal(size=size)

    def train(self, start: Adapter, job: Job) -> Trained:
        if job.id >= self.stop:
            raise KeyboardInterrupt
        rng = np.random.default_rng(job.seed)
        group = self.group(job.client, job.id)
        if start.spec.method is Method.LORA:
            # In product space, so that ranks agree on what they want: B·A goes towards the target's product.
            delta = Adapter.zeros(start.spec)
            for layer, b, a in start.factors():
                u, v = (self.target(n, 31 * group + len(layer) + k) for k, n in ((0, len(b)), (9, a.shape[1])))
                gap = np.outer(u, v) - start.spec.scaling * b @ a
                delta[f"{layer}.lora_B"][:] = 0.05 * gap @ a.T / (a**2).sum()
                delta[f"{layer}.lora_A"][:] = 0.05 * b.T @ gap / max((b**2).sum(), 1.0)
            return Trained(delta=delta.flat, examples=5, steps=1)
        step = 0.2 * (self.target(start.spec.size, group) - start.flat) + 0.05 * rng.normal(size=start.spec.size)
        return Trained(delta=step.astype(np.float32), examples=5, steps=1)

    def loss(self, adapter: Adapter, client: str) -> float:
        return float(np.mean((adapter.flat - self.target(adapter.spec.size, self.group(client, self.stop))) ** 2))


def clients(n: int, *, ranks: tuple[int | None, ...] = (None,)) -> list[ClientInfo]:
    return [ClientInfo(name=f"c{i}", examples=5, rank=ranks[i // 2 % len(ranks)]) for i in range(n)]


def run(
    way: Base | None,
    trainer: Pull,
    *,
    n: int = 12,
    jobs: int = 300,
    spec: Spec = DENSE,
    ranks: tuple[int | None, ...] = (None,),
    rule: Any = None,
    late: Mapping[str, float] | None = None,
    folder: Path | None = None,
    observe: Any = None,
) -> Result:
    changes = tuple(Change(at, c, Move.JOINS) for c, at in (late or {}).items())
    return simulate(
        Pace.fedbuff(n, 4, jobs=jobs, steps=1),
        fleet(clients(n, ranks=ranks), speeds="tiers", seed=1, changes=changes),
        trainer,
        rule or (lambda a: make("delta" if spec.method is Method.LORA else "mean", a)),
        initial=first(spec),
        grouping=way,
        seed=2,
        checkpoint=None if folder is None else Checkpoints(folder=folder, versions=3),
        observe=observe,
    )


def first(spec: Spec) -> Adapter:
    return fresh(spec) if spec.method is Method.LORA else Adapter.zeros(spec)


def parted(way: Base, trainer: Pull, job: int = 10**8) -> bool:
    """Whether two clients share a model just if they share a group."""
    truth = {c: trainer.group(c, job) for c in way.members}
    return (
        len({(truth[c], m) for c, m in way.members.items()})
        == len(set(truth.values()))
        == len(set(way.members.values()))
    )


@pytest.mark.parametrize(("spec", "ranks"), [(DENSE, (None,)), (LORA, (4,)), (LORA, (2, 4, 3))])
def test_groups_are_found_and_their_models_differ(spec: Spec, ranks: tuple[int | None, ...]) -> None:
    trainer = Pull(3)
    way = ways.make("agglomerative", first(spec), clients=12)
    result = run(way, trainer, spec=spec, ranks=ranks)
    assert parted(way, trainer)
    # The server believes the same, and nobody is in two.
    assert {name: c.model for name, c in result.state.clients.items()} == way.members
    assert sorted(c for members in way.groups().values() for c in members) == sorted(way.members)
    if spec is DENSE:
        for client, model in way.members.items():
            wanted = trainer.target(30, trainer.group(client, 0))
            assert np.mean((result.adapters[model].flat - wanted) ** 2) < 0.05


def test_clients_that_are_all_alike_keep_one_model() -> None:
    way = ways.make("agglomerative", first(DENSE), clients=12)
    run(way, Pull(1))
    assert set(way.members.values()) == {"all"}


def test_clients_that_change_are_moved_and_the_others_keep_their_models() -> None:
    trainer = Pull(3, at=400, moved={0: 1, 4: 2})
    way = ways.make("agglomerative", first(DENSE), clients=12)
    before: dict[str, str] = {}

    def observe(published: Published) -> None:
        if published.row["assigned"] < 400:
            before.update(way.members)

    run(way, trainer, jobs=900, observe=observe)
    assert parted(way, trainer)
    stayed = set(way.members) - {"c0", "c4"}
    assert {c: way.members[c] for c in stayed} == {c: before[c] for c in stayed}, "names stay"
    assert way.members["c0"] == before["c1"] and way.members["c4"] == before["c2"]


def test_a_new_kind_of_client_gets_a_model_of_its_own() -> None:
    trainer = Pull(2, at=400, moved={0: 5, 2: 5, 4: 5})
    way = ways.make("agglomerative", first(DENSE), clients=14)
    seen = []
    run(way, trainer, n=14, jobs=1000, observe=lambda p: seen.append(parted(way, trainer)))
    # Whoever raises a false alarm is away for a while, so not at every moment.
    assert len(set(way.members.values()) - {"all"}) == 3 and sum(seen[-60:]) > 30


def test_grouped_anew_now_and_then_names_stay_the_same() -> None:
    trainer = Pull(3)
    way = ways.make("agglomerative", first(DENSE), clients=12, every=40, patience=None)
    seen: set[frozenset[str]] = set()
    run(way, trainer, jobs=1200, observe=lambda p: seen.add(frozenset(way.members.values()) - {"all"}))
    assert parted(way, trainer) or "all" in way.members.values()
    assert {name for names in seen for name in names} == {"cluster-1", "cluster-2", "cluster-3"}


def test_who_joins_late_goes_to_its_group_after_its_first_update() -> None:
    trainer = Pull(3)
    way = ways.make("agglomerative", first(DENSE), clients=12, enough=0.7)
    result = run(way, trainer, jobs=500, late={"c9": 60.0, "c10": 60.5})
    assert parted(way, trainer)
    assert result.state.clients["c9"].model == way.members["c0"]


@pytest.mark.parametrize("start", ["one", "several"])
def test_losses_decide_with_ifca(start: str) -> None:
    trainer = Pull(3)
    rng = np.random.default_rng(0)
    several = {f"m{k}": Adapter(DENSE, rng.normal(size=30).astype(np.float32)) for k in range(3)}
    if start == "one":
        way = ways.make("ifca", first(DENSE), clients=12, assessor=trainer, every=5)
        run(way, trainer, late={"c9": 60.0})
    else:
        way = ways.make("ifca", several, clients=12, assessor=trainer, every=5)
        simulate(
            Pace.fedbuff(12, 4, jobs=300, steps=1),
            fleet(clients(12)),
            trainer,
            lambda a: make("mean", a),
            initial=several,
            grouping=way,
        )
    assert len({(trainer.group(c, 0), m) for c, m in way.members.items()}) == 3


def test_ifca_leaves_a_client_that_does_not_answer_where_it_is() -> None:
    class Silent(Pull):
        def loss(self, adapter: Adapter, client: str) -> float:
            return float("nan")

    trainer = Silent(3)
    way = ways.make("ifca", first(DENSE), clients=12, assessor=trainer, every=5)
    run(way, trainer)
    assert parted(way, trainer), "as its first updates told"


def test_profiles_part_slow_from_fast_and_place_newcomers() -> None:
    way = ways.make("profile", first(DENSE), clients=6, steps=2)
    for n, seconds in enumerate((1.0, 1.1, 8.0, 1.2, 9.0, 8.5)):
        way.joins(ClientInfo(name=f"c{n}", profile=Profile(seconds_per_step=seconds)))
    change = way.regroup(Published(at=1.0, model="all", version=1, adapter=first(DENSE), row={}))
    assert change is not None and len(set(change.models.values())) == 2
    assert way.members["c0"] == way.members["c1"] == way.members["c3"] != way.members["c2"]
    assert way.joins(ClientInfo(name="new", profile=Profile(seconds_per_step=7.0))) == way.members["c2"]
    alike = ways.make("profile", first(DENSE), clients=2)
    for n, seconds in enumerate((1.0, 1.1)):
        alike.joins(ClientInfo(name=f"c{n}", profile=Profile(seconds_per_step=seconds)))
    assert alike.regroup(Published(at=1.0, model="all", version=1, adapter=first(DENSE), row={})) is None


@pytest.mark.parametrize("kind", ["agglomerative", "mixed", "ifca", "profile", "steps", "shared_a"])
def test_interrupted_and_resumed_it_ends_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    lora = kind in ("mixed", "shared_a", "steps")

    def go(trainer: Pull, folder: Path | None) -> tuple[Result, Base]:
        spec = LORA if lora else DENSE
        name = kind if kind in ways.WAYS else "agglomerative"
        more = {"assessor": Pull(2)} if name == "ifca" else {}
        way = ways.make(name, first(spec), clients=8, **more)
        rule = {"steps": SharedSteps(lambda a: make("delta", a), 0.3), "shared_a": SharedA()}.get(kind)
        ranks = (2, 4) if kind in ("mixed", "steps") else (None,)
        late = {"c5": 30.0} if kind == "agglomerative" else None
        return run(way, trainer, n=8, jobs=200, spec=spec, ranks=ranks, rule=rule, folder=folder, late=late), way

    whole, way = go(Pull(2, at=120, moved={0: 1}), None)
    assert len(set(way.members.values())) >= 2
    for stop in (23, 71, 109, 131, 150, 10**9):
        trainer = Pull(2, at=120, moved={0: 1})
        trainer.stop = stop
        try:
            found, again = go(trainer, tmp_path)
        except KeyboardInterrupt:
            continue
    assert {n: a.flat.tobytes() for n, a in found.adapters.items()} == {
        n: a.flat.tobytes() for n, a in whole.adapters.items()
    }
    assert found.rows == whole.rows and again.members == way.members and found.state == whole.state


def test_shared_steps_pull_clusters_towards_each_other_and_none_does_nothing() -> None:
    def apart(rule: Any) -> tuple[float, Result]:
        way = ways.make("agglomerative", first(DENSE), clients=12)
        result = run(way, Pull(2), rule=rule)
        one, other = (result.adapters[m].flat for m in sorted(set(way.members.values())))
        return float(np.linalg.norm(one - other)), result

    plain, result = apart(None)
    none, same = apart(SharedSteps(lambda a: make("mean", a), 0.0))
    some, _ = apart(SharedSteps(lambda a: make("mean", a), 0.4))
    assert none == plain and {n: a.flat.tobytes() for n, a in same.adapters.items()} == {
        n: a.flat.tobytes() for n, a in result.adapters.items()
    }
    assert some < 0.8 * plain


def test_a_step_is_the_mix_that_was_asked_for() -> None:
    from fed.aggregate.rule import Contribution

    pool = SharedSteps(lambda a: make("mean", a), 0.25)
    one, other = pool(Adapter.zeros(DENSE)), pool(Adapter.zeros(DENSE))
    zero = Adapter.zeros(DENSE)
    other.absorb(Contribution(client="b", start=zero, delta=np.full(30, 8, np.float32), weight=3.0))
    assert other.publish().flat[0] == 8.0
    one.absorb(Contribution(client="a", start=zero, delta=np.full(30, 4, np.float32), weight=2.0))
    assert one.publish().flat[0] == pytest.approx(0.75 * 4 + 0.25 * 8)
    assert one.notes["shared"] == 1.0
    one.absorb(Contribution(client="a", start=zero, delta=np.full(30, 4, np.float32), weight=2.0))
    assert one.publish().flat[0] == pytest.approx(5 + 4), "the other has not moved since"


def test_a_shared_a_is_the_same_for_all_and_b_is_not() -> None:
    way = ways.make("agglomerative", first(LORA), clients=12)
    pool = SharedA()
    result = run(way, Pull(2), spec=LORA, rule=pool, jobs=500)
    assert parted(way, Pull(2))
    one, other = (result.adapters[m] for m in sorted(set(way.members.values())))
    newest = max(np.linalg.norm(a["q.lora_A"] - first(LORA)["q.lora_A"]) for a in (one, other))
    assert np.linalg.norm(one["q.lora_A"] - other["q.lora_A"]) < 0.2 * newest
    assert np.linalg.norm(one["q.lora_B"] - other["q.lora_B"]) > 0.5 * np.linalg.norm(one["q.lora_B"])
    with pytest.raises(ConfigError, match="momentum"):
        SharedA(MomentumOptions(momentum=0.5))


def test_only_what_lasts_is_drift_and_false_alarms_become_rarer() -> None:
    watch = Watch()
    watch.enters("a")
    assert not any(watch.see("a", 1.0, 0.0) for _ in range(10))
    assert not watch.see("a", 3.0, 0.0) and not watch.see("a", 1.0, 0.0) and not watch.see("a", 3.0, 0.0)
    assert watch.see("a", 3.0, 0.0)
    watch.enters("a", back=True)
    assert [watch.see("a", 1.0, 0.9) for _ in range(8)] == [False] * 7 + [True]


def test_what_cannot_be_is_told_before_the_run() -> None:
    for name, more, told in (
        ("agglomerative", {"clusters": 13}, "13 clusters were asked for, of 12 clients"),
        ("profile", {"clusters": 13}, "13 clusters were asked for, of 12 clients"),
        ("ifca", {}, "goes by clients' losses"),
        ("nearest", {}, "allowed: agglomerative, ifca, profile"),
        ("agglomerative", {"rounds": 3}, "has no setting 'rounds'"),
        ("agglomerative", {"enough": 0.0}, "enough is 0.0"),
    ):
        with pytest.raises(ConfigError, match=told):
            ways.make(name, first(DENSE), clients=12, **more)
    way = ways.make("agglomerative", first(DENSE), clients=12)
    other = ways.make("profile", first(DENSE), clients=12)
    with pytest.raises(StoreError, match="not of 'profile'"):
        other.load_state(way.state())
