"""A simulation as facts and arrays, and back: what is read goes on exactly as what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agora.errors import AgoraError, StoreError
from fed.adapter import Adapter, Spec
from fed.aggregate.rule import State as Held
from fed.simulator.clock import Clock
from fed.simulator.record import Absorbed, Totals
from fed.simulator.run import Flight, Simulation
from fed.state import State, job_from_json, job_to_json

Arrays = dict[str, NDArray[Any]]


def pack(sim: Simulation) -> tuple[dict[str, Any], Arrays]:
    """All that a simulation needs to go on."""
    shelf = _Shelf()
    rules = {}
    for name in sorted(sim.rules):
        held = sim.rules[name].state()
        rules[name] = {
            "initial": shelf.adapter(sim.initial[name]),
            "facts": held.facts,
            "arrays": shelf.named(held.arrays),
        }
    starts = []
    for (model, version), by_rank in sorted(sim.starts.items()):
        for rank, start in by_rank.items():
            # A rule may know versions that it handed out by identity, not only by value.
            own = start is sim.rules[model].current
            starts.append([model, version, rank, None if own else shelf.adapter(start)])
    grouping = None
    if sim.run.grouping is not None:
        held = sim.run.grouping.state()
        grouping = {"facts": held.facts, "arrays": shelf.named(held.arrays)}
    facts = {
        "server": sim.state.to_json(),
        "clock": sim.clock.to_json(),
        "rules": rules,
        "starts": starts,
        "flights": [
            [job_to_json(f.job), None if f.message is None else shelf.message(f.message)]
            for _, f in sorted(sim.flights.items())
        ],
        "memories": [[client, model, shelf.message(data)] for (client, model), data in sim.uplink.save().items()],
        "grouping": grouping,
        "buffered": {name: [list(astuple(u)) for u in updates] for name, updates in sorted(sim.buffered.items())},
        "dead": sorted(sim.dead),
        "totals": asdict(sim.totals),
        "problems": sim.problems,
        "versions": sim.versions,
        "over": sim.over,
        "record": sim.record.size,
        "specs": shelf.specs,
    }
    return facts, shelf.arrays


def unpack(sim: Simulation, facts: Mapping[str, Any], arrays: Arrays) -> None:
    """Puts a new simulation of the same run where another one was when it was packed.

    Raises:
        StoreError: If that is not what these facts and arrays are.
    """
    try:
        _unpack(sim, facts, arrays)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise StoreError(f"the checkpoint cannot be read: {type(e).__name__}: {e}") from e
    except StoreError:
        raise
    except AgoraError as e:
        raise StoreError(f"the checkpoint cannot be read: {e}") from e


def _unpack(sim: Simulation, facts: Mapping[str, Any], arrays: Arrays) -> None:
    shelf = _Shelf(facts["specs"], arrays)
    sim.state = State.from_json(facts["server"])
    sim.clock = Clock.from_json(facts["clock"])
    for name, body in facts["rules"].items():
        sim.initial[name] = shelf.get_adapter(body["initial"])
        sim.rules[name] = sim.run.rule(sim.initial[name])
        sim.rules[name].load_state(Held(shelf.get_named(body["arrays"]), body["facts"]))
    for model, version, rank, place in facts["starts"]:
        start = sim.rules[model].current if place is None else shelf.get_adapter(place)
        sim.starts.setdefault((model, version), {})[rank] = start
    for job_body, place in facts["flights"]:
        job = job_from_json(job_body)
        start = sim.starts[job.model, job.version][job.rank]
        sim.flights[job.id] = Flight(job, start, None if place is None else shelf.get_message(place))
    sim.uplink.load({(client, model): shelf.get_message(place) for client, model, place in facts["memories"]})
    if sim.run.grouping is not None:
        held = facts["grouping"]
        sim.run.grouping.load_state(Held(shelf.get_named(held["arrays"]), held["facts"]))
    sim.buffered = {name: [Absorbed(*u) for u in updates] for name, updates in facts["buffered"].items()}
    sim.dead = set(facts["dead"])
    sim.totals = Totals(**facts["totals"])
    sim.problems = list(facts["problems"])
    sim.versions = facts["versions"]
    sim.over = facts["over"]


class _Shelf:
    """Arrays by their place on it, and the specs of those that are adapters, each once."""

    def __init__(self, specs: Mapping[str, Any] | None = None, arrays: Arrays | None = None) -> None:
        self.specs: dict[str, Any] = dict(specs or {})
        self.arrays: Arrays = dict(arrays or {})
        self._read: dict[str, Spec] = {}
        self._places: dict[int, list[str]] = {}

    def adapter(self, adapter: Adapter) -> list[str]:
        """Puts an adapter there; the same one is put there once."""
        if id(adapter) not in self._places:
            digest = adapter.spec.digest
            self.specs.setdefault(digest, adapter.spec.to_json())
            self._places[id(adapter)] = [digest, self._put(adapter.flat)]
        return self._places[id(adapter)]

    def message(self, data: bytes) -> str:
        """Puts bytes there."""
        return self._put(np.frombuffer(data, np.uint8))

    def named(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        """Puts arrays there: places by name."""
        return {name: self._put(a) for name, a in arrays.items()}

    def get_adapter(self, place: list[str]) -> Adapter:
        """The adapter at a place."""
        digest, at = place
        if digest not in self._read:
            self._read[digest] = Spec.from_json(self.specs[digest])
        return Adapter(self._read[digest], self.arrays[at])

    def get_message(self, place: str) -> bytes:
        """The bytes at a place."""
        return self.arrays[place].tobytes()

    def get_named(self, places: Mapping[str, str]) -> dict[str, NDArray[Any]]:
        """The arrays at places by name."""
        return {name: self.arrays[at] for name, at in places.items()}

    def _put(self, array: NDArray[Any]) -> str:
        place = str(len(self.arrays))
        self.arrays[place] = array
        return place
