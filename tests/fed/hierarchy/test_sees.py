"""What a level may not see does not reach it: not in events, records, checkpoints or messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fed.adapter import Adapter
from fed.aggregate.rules import make
from fed.chain import Chain
from fed.fleet import Change, Move, fleet
from fed.hierarchy import Aggregator, Level, Link, Sees, Tree, View, simulate_tree
from fed.hierarchy.gate import Gate, Part
from fed.hierarchy.grove import Grove
from fed.hierarchy.node import Node
from fed.hierarchy.saving import pack_tree
from fed.hierarchy.words import TreeRun
from fed.pace import Pace, Weighting
from fed.simulator import uplink
from fed.simulator.record import Record
from fed.words import Arrived, ClientInfo, Joined

NAMES = [f"secret-{i:03d}" for i in range(8)]


class Spied:
    """A run of which everything is kept that reaches each aggregator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trees: Any, tree: Tree, spec: Any, seed: int) -> None:
        self.events: dict[str, list[Any]] = {name: [] for name in tree.places}
        self.messages: dict[str, list[bytes]] = {name: [] for name in tree.places}
        self.numbers: dict[str, list[bytes]] = {name: [] for name in tree.places}
        self.deltas: set[bytes] = set()
        self.losses: set[float] = set()
        self.checkpoints: list[tuple[dict[str, Any], Any]] = []
        spy = self

        class Watched(trees.Pull):  # type: ignore[misc]
            def train(self, start: Adapter, job: Any) -> Any:
                found = super().train(start, job)
                spy.deltas.add(found.delta.tobytes())
                spy.losses.add(found.metrics["loss"])
                return found

        tell = Node._tell

        def told(node: Node, event: Any) -> None:
            self.events[node.name].append(event)
            tell(node, event)

        monkeypatch.setattr(Node, "_tell", told)
        encode = uplink.encode  # type: ignore[attr-defined]

        def encoded(update: Any) -> bytes:
            data = encode(update)
            to = update.federation.partition("/")[2] or tree.root
            self.messages[to].append(data)
            return data

        monkeypatch.setattr(uplink, "encode", encoded)
        self.clients = {name: tree.places[name].devices + tree.children(name) for name in tree.places}
        world = fleet([ClientInfo(name=n, examples=7) for n in NAMES], speeds="lognormal", loss=0.1, seed=seed)
        changes = (Change(15.0, "edge-0", Move.DIES), Change(40.0, "edge-0", Move.JOINS))
        run = TreeRun(tree=tree, fleet=world, trainer=Watched(), initial=trees.start(spec), seed=seed, changes=changes)
        self.grove = Grove(run, lambda name: Record(None))
        for node in self.grove.nodes.values():
            self._watch(node)
        self.grove.start()
        steps = 0
        while self.grove.advance():
            steps += 1
            if steps % 40 == 0:
                self.checkpoints.append(pack_tree(self.grove))
        self.checkpoints.append(pack_tree(self.grove))

    def _watch(self, node: Node) -> None:
        rule, absorb = node.rule, node.rule.absorb

        def absorbed(contribution: Any) -> None:
            self.numbers[node.name].append(contribution.delta.tobytes())
            absorb(contribution)

        rule.absorb = absorbed  # type: ignore[method-assign]


def of(what: View, least: int, behind: int, below: View, metrics: bool, wired: bool) -> Tree:
    chain = Chain() if wired else None
    return Tree(
        levels=(
            Level(
                name="cloud",
                pace=Pace.fedbuff(2, 2, job_timeout_s=60.0, publications=6),
                sees=Sees(what=what, least=least if what is View.SUMS else 1, behind=behind, metrics=metrics),
                chain=chain,
            ),
            Level(
                name="edge",
                pace=Pace.fedbuff(3, 2, job_timeout_s=30.0),
                sees=Sees(what=below, least=2 if below is View.SUMS else 1, metrics=metrics),
                up=Link(round_trip_s=0.5),
                chain=chain,
                orphans="sibling",  # type: ignore[arg-type]
            ),
        ),
        aggregators=(
            Aggregator(name="cloud", level="cloud"),
            Aggregator(name="edge-0", level="edge", parent="cloud", devices=tuple(NAMES[:4])),
            Aggregator(name="edge-1", level="edge", parent="cloud", devices=tuple(NAMES[4:])),
        ),
    )


def names_in(text: str) -> set[str]:
    return {name for name in NAMES if name in text}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    what=st.sampled_from(list(View)),
    below=st.sampled_from([View.UPDATES, View.SUMS]),
    behind=st.integers(1, 3),
    metrics=st.booleans(),
    wired=st.booleans(),
    lora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nothing_reaches_an_aggregator_that_it_may_not_see(
    trees: Any, what: View, below: View, behind: int, metrics: bool, wired: bool, lora: bool, seed: int
) -> None:
    tree = of(what, 2, behind, below, metrics, wired)
    with pytest.MonkeyPatch.context() as patch:
        spied = Spied(patch, trees, tree, trees.LORA if lora else trees.DENSE, seed)
    assert spied.deltas and spied.events["cloud"]
    cloud = spied.grove.nodes["cloud"]
    rows = json.dumps(cloud.record.rows)
    own = [
        orjson.dumps(facts["nodes"]["cloud"], option=orjson.OPT_NON_STR_KEYS).decode() for facts, _ in spied.checkpoints
    ]
    # Nobody below its children, by name, anywhere.
    for text in (repr(spied.events["cloud"]), rows, *own):
        assert not names_in(text)
    assert not any(name.encode() in data for data in spied.messages["cloud"] for name in NAMES)
    # No device's numbers.
    held = [
        a.tobytes() for _, arrays in spied.checkpoints for key, a in arrays.items() if key.startswith("node.cloud.")
    ]
    assert not spied.deltas & {*held, *spied.numbers["cloud"]}
    if behind > 1 or what is not View.UPDATES or not metrics:
        told = {e.loss for e in spied.events["cloud"] if isinstance(e, Arrived)} - {None}
        assert not told & spied.losses
    if not metrics or what is not View.UPDATES:
        assert all(e.loss is None for e in spied.events["cloud"] if isinstance(e, Arrived))
        assert all(row["loss"] is None for row in cloud.record.rows)
        assert all(b'"loss' not in data and b'\\"loss' not in data for data in spied.messages["cloud"])
    _check_view(spied, "cloud", what)
    for edge in ("edge-0", "edge-1"):
        _check_view(spied, edge, below)


def _check_view(spied: Spied, name: str, what: View) -> None:
    node, events = spied.grove.nodes[name], spied.events[name]
    arrived = [e for e in events if isinstance(e, Arrived)]
    if what is View.UPDATES:
        assert all(e.norm > 0 for e in arrived)
        return
    assert arrived and all(e.norm == 0 and e.loss is None for e in arrived)
    held = {
        a.tobytes() for _, arrays in spied.checkpoints for key, a in arrays.items() if key.startswith(f"node.{name}.")
    }
    if what is View.COUNTS:
        assert not spied.numbers[name], "no numbers at all"
        assert node.rule.current is node.initial["all"]
        return
    assert {e.examples for e in arrived} == {1}
    assert {e.client.examples for e in events if isinstance(e, Joined)} == {1}
    assert not spied.deltas & {*held, *spied.numbers[name]}
    # A version at most holds one sum.
    assert len(spied.numbers[name]) <= len(node.record.rows)


def test_an_update_goes_up_only_when_enough_devices_are_behind_it(trees: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = of(View.UPDATES, 1, 3, View.UPDATES, True, False)
    behind: list[int] = []
    comes = Node.comes

    def seen(node: Node, job: Any) -> None:
        behind.append(node.lower[job.client].up.behind_out())
        comes(node, job)

    monkeypatch.setattr(Node, "comes", seen)
    Spied(monkeypatch, trees, tree, trees.DENSE, 1)
    assert len(behind) > 5 and min(behind) >= 3


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rule", ["default", "dense"])
@pytest.mark.parametrize("weighting", list(Weighting))
def test_a_sum_makes_the_version_that_single_updates_would(
    trees: Any, lora: bool, rule: str, weighting: Weighting
) -> None:
    spec = trees.LORA if lora else trees.DENSE
    name = "dense" if lora and rule == "dense" else ("delta" if lora else "mean")
    pace = Pace.fedbuff(3, 3, publications=6, steps=1, job_timeout_s=50.0, weighting=weighting)
    world = fleet([ClientInfo(name=f"c-{i}", examples=1 + i) for i in range(5)], speeds="lognormal", seed=3)

    def run(sees: Sees) -> Any:
        tree = Tree.flat(Level(name="server", pace=pace, rule=name, sees=sees), [f"c-{i}" for i in range(5)])

        class Weighs(trees.Pull):  # type: ignore[misc]
            def train(self, start: Adapter, job: Any) -> Any:
                found = super().train(start, job)
                return type(found)(delta=found.delta, examples=1 + int(job.client[-1]), steps=1)

        return simulate_tree(tree, world, Weighs(), initial=trees.start(spec))

    one, other = run(Sees()), run(Sees(what=View.SUMS, least=2))
    assert one.level("server").staleness_max > 0
    a, b = one.adapter, other.adapter
    if not lora:
        np.testing.assert_allclose(a.flat, b.flat, atol=2e-6)
        return
    for (_, b0, a0), (_, b1, a1) in zip(a.factors(), b.factors(), strict=True):
        np.testing.assert_allclose(b0 @ a0, b1 @ a1, atol=2e-4)


def test_a_sum_of_too_few_waits_and_is_in_the_next_version(trees: Any) -> None:
    gate = Gate(Sees(what=View.SUMS, least=2), Weighting.EXAMPLES, trees.DENSE)
    start = Adapter.zeros(trees.DENSE)
    rule = make("mean", start)
    from fed.aggregate.rule import Contribution

    def absorb(child: str, job: int, value: float) -> None:
        delta = np.full(trees.DENSE.size, value, np.float32)
        part = Part(job=job, child=child, examples=3, devices=1, loss=None)
        gate.absorb(rule, Contribution(client=child, start=start, delta=delta), part)

    absorb("a", 1, 1.0)
    absorb("a", 2, 3.0)
    assert gate.release(rule) == () and not rule.publish().flat.any()
    held = gate.state()
    again = Gate(Sees(what=View.SUMS, least=2), Weighting.EXAMPLES, trees.DENSE)
    again.load_state(held)
    gate = again
    absorb("b", 3, 8.0)
    assert [p.job for p in gate.release(rule)] == [1, 2, 3]
    assert rule.publish().flat == pytest.approx(4.0)


def test_errors_of_training_are_not_told_where_updates_are_not_seen(trees: Any) -> None:
    from agora.errors import StoreError

    class Fragile(trees.Pull):  # type: ignore[misc]
        def train(self, start: Adapter, job: Any) -> Any:
            if job.client == "client-0":
                raise StoreError("row 'the patient said' has no label")
            return super().train(start, job)

    for sees, told in ((Sees(), True), (Sees(what=View.SUMS, least=2), False)):
        pace = Pace.fedbuff(3, 2, publications=5, job_timeout_s=30.0)
        tree = Tree.flat(Level(name="server", pace=pace, sees=sees), trees.devices(3))
        found = simulate_tree(tree, fleet(3), Fragile(), initial=trees.start(trees.DENSE))
        text = json.dumps(found.rows)
        assert "came to nothing" in text and ("the patient said" in text) == told


def test_records_of_aggregators_are_apart(trees: Any, tmp_path: Path) -> None:
    trees.run("sums", tmp_path)
    files = sorted(p.name for p in (tmp_path / "records").iterdir())
    assert files == ["cloud.jsonl", "edge-0.jsonl", "edge-1.jsonl", "edge-2.jsonl"]
    assert "client-" not in (tmp_path / "records" / "cloud.jsonl").read_text()
