"""A run of a tree as facts and arrays, and back: what each aggregator holds apart, and what the world around them does.

`nodes` has, by aggregator, what that aggregator itself holds and may hold; `world` has what belongs to nobody in the
tree alone: the clock, updates on their way, what clients remember, and updates that wait to be part of a sum. Arrays
are named by whose they are, so that the part of an aggregator can be looked at, or kept, without the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from agora.errors import AgoraError, StoreError
from fed.aggregate.rule import State as Held
from fed.hierarchy.grove import Grove
from fed.simulator.clock import Clock
from fed.simulator.saving import Arrays, pack, unpack
from fed.words import WHOLE

WORLDLY: Final = ("flights", "memories", "dead", "clock")
"""Facts of a simulation that are not the server's."""


def pack_tree(grove: Grove) -> tuple[dict[str, Any], Arrays]:
    """All that a run of a tree needs to go on."""
    nodes: dict[str, Any] = {}
    around: dict[str, Any] = {}
    arrays: Arrays = {}
    for name, node in grove.nodes.items():
        facts, found = pack(node)
        world = {key: facts.pop(key) for key in WORLDLY}
        moving = {place for _, place in world["flights"]} | {place for _, _, place in world["memories"]}
        for place, array in found.items():
            arrays[f"{'world' if place in moving else 'node'}.{name}.{place}"] = array
        gate = node.gate.state()
        world["gate"] = gate.facts
        arrays.update({f"world.{name}.gate.{key}": a for key, a in gate.arrays.items()})
        facts["above"] = None
        if node.above is not None:
            above = node.above.state()
            facts["above"] = above.facts
            arrays.update({f"node.{name}.above.{key}": a for key, a in above.arrays.items()})
        facts["sent"] = node.sent
        nodes[name], around[name] = facts, world
    facts = {
        "nodes": nodes,
        "world": {
            "clock": grove.clock.to_json(),
            "nodes": around,
            "alive": sorted(grove.alive),
            "host": grove.host,
            "down": sorted(grove.down),
            "over": grove.over,
        },
    }
    return facts, arrays


def unpack_tree(grove: Grove, facts: Mapping[str, Any], arrays: Arrays) -> None:
    """Puts a new run of the same tree where another one was when it was packed.

    Raises:
        StoreError: If that is not what these facts and arrays are.
    """
    try:
        _unpack(grove, facts, arrays)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise StoreError(f"the checkpoint cannot be read: {type(e).__name__}: {e}") from e
    except StoreError:
        raise
    except AgoraError as e:
        raise StoreError(f"the checkpoint cannot be read: {e}") from e


def _unpack(grove: Grove, facts: Mapping[str, Any], arrays: Arrays) -> None:
    world = facts["world"]
    by_owner: dict[str, Arrays] = {name: {} for name in grove.nodes}
    for name in grove.nodes:
        for prefix in (f"node.{name}.", f"world.{name}."):
            found = {key[len(prefix) :]: a for key, a in arrays.items() if key.startswith(prefix)}
            by_owner[name].update(found)
    for name, node in grove.nodes.items():
        own, around, found = facts["nodes"][name], world["nodes"][name], by_owner[name]
        clock = node.clock
        unpack(node, {**own, **around}, {key: a for key, a in found.items() if key.isdecimal()})
        node.clock = clock
        node.sent = own["sent"]
        node.gate.load_state(Held(_within(found, "gate."), around["gate"]))
        if node.above is not None:
            node.above.load_state(Held(_within(found, "above."), own["above"]), node.run.initial[WHOLE].spec)
    # In place: the aggregators hold it.
    saved = Clock.from_json(world["clock"])
    grove.clock.__dict__.update(saved.__dict__)
    grove.alive, grove.host = set(world["alive"]), dict(world["host"])
    grove.down, grove.over = set(world["down"]), world["over"]
    grove.readopt()


def _within(arrays: Arrays, prefix: str) -> Arrays:
    return {key[len(prefix) :]: a for key, a in arrays.items() if key.startswith(prefix)}
