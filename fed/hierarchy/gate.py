"""The one place that what a level may not see does not pass.

All that an aggregator is told of a child, in events, for its record and as numbers, comes through its gate. What the
gate holds back meanwhile (updates that wait to be part of a sum) is held by the simulated world, not by the aggregator:
in its place stands, outside of a simulation, a sum that clients make among each other (Bonawitz et al. 2017, "Practical
Secure Aggregation"), or an enclave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from agora.errors import AdapterError
from fed.adapter import A, Adapter, B, Method, Spec
from fed.aggregate.product import STACK
from fed.aggregate.rule import Contribution, Rule, State
from fed.aggregate.terms import Stack, at, summed
from fed.hierarchy.sees import Sees, View
from fed.pace import Weighting
from fed.simulator.record import Absorbed
from fed.simulator.uplink import HEADER_BYTES, Came
from fed.words import Arrived, ClientInfo, Job, Trained, Trainer

SOMEBODY: Final = "several children"
"""Who a sum is said to come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What an accepted update was, without its numbers.

    Attributes:
        job: Which job's.
        child: Whose.
        examples: As told.
        devices: Behind it.
        loss: As told.
    """

    job: int
    child: str
    examples: int
    devices: int
    loss: float | None


class Gate:
    """Between an aggregator and its children.

    Args:
        sees: What it may see.
        weighting: What an update weighs.
        spec: Of the aggregator's adapter.
    """

    def __init__(self, sees: Sees, weighting: Weighting, spec: Spec) -> None:
        self.sees = sees
        self._weighting, self._spec = weighting, spec
        self._parts: list[Part] = []
        self._box: list[Contribution] = []
        self.norm: float | None = None
        """Of the sum that was released last."""

    # Before it is sent.

    def outbound(self, trained: Trained) -> Trained:
        """What a child says to the level."""
        told = self.sees.metrics and self.sees.what is View.UPDATES
        return trained if told else replace(trained, metrics={})

    # What the server is told.

    def joined(self, info: ClientInfo) -> ClientInfo:
        """A child's card."""
        return replace(info, examples=1) if self.sees.what is View.SUMS else info

    def arrived(self, event: Arrived) -> Arrived:
        """That an update came."""
        if self.sees.what is View.UPDATES:
            return event if self.sees.metrics else replace(event, loss=None)
        examples = event.examples if self.sees.what is View.COUNTS else 1
        # A norm that is not finite is refused, and so it must be told.
        norm = 0.0 if np.isfinite(event.norm) else event.norm
        return replace(event, examples=examples, steps=1, norm=norm, loss=None)

    def noted(self, absorbed: Absorbed) -> Absorbed:
        """What the record will tell of an update."""
        if self.sees.what is View.UPDATES:
            return absorbed if self.sees.metrics else replace(absorbed, loss=None)
        examples = absorbed.examples if self.sees.what is View.COUNTS else 1
        return replace(absorbed, norm=0.0, examples=examples, loss=None)

    def why(self, text: str) -> str:
        """Why a job came to nothing: errors of training tell of what was trained on."""
        return text if self.sees.what is View.UPDATES else "it failed"

    # Numbers.

    def absorb(self, rule: Rule, contribution: Contribution, part: Part) -> None:
        """Takes an update that the server wants in its next version.

        Raises:
            AdapterError: If the rule cannot use it.
        """
        if self.sees.what is View.UPDATES:
            rule.absorb(contribution)
        elif self.sees.what is View.SUMS:
            self._box.append(self._weighed(contribution, part))
        self._parts.append(part)

    def release(self, rule: Rule) -> tuple[Part, ...]:
        """Lets the rule have all that it may, before it makes a version.

        Returns:
            What is in the version, which is nothing if too few children are in the sum: then it waits on.

        Raises:
            AdapterError: If the sum cannot be used; it is dropped, and `dropped` tells what was in it.
        """
        self.norm = None
        if self.sees.what is View.SUMS:
            if len({p.child for p in self._parts}) < self.sees.least:
                return ()
            box, self._box = self._box, []
            one = _sum(self._spec, box)
            self.norm = float(np.linalg.norm(one.delta.astype(np.float64)))
            rule.absorb(one)
        parts, self._parts = tuple(self._parts), []
        return parts

    def dropped(self) -> tuple[Part, ...]:
        """What was to be in a version that could not be made."""
        parts, self._parts, self._box = tuple(self._parts), [], []
        return parts

    def _weighed(self, contribution: Contribution, part: Part) -> Contribution:
        # The server was told of one example each; what the update weighs is multiplied by the child itself.
        by = float(part.examples) if self._weighting == Weighting.EXAMPLES else 1.0
        return replace(contribution, weight=contribution.weight * by)

    # To go on later.

    def state(self) -> State:
        """All that it holds back."""
        state = State({}, {"parts": [[p.job, p.child, p.examples, p.devices, p.loss] for p in self._parts], "box": []})
        for n, c in enumerate(self._box):
            state.arrays[f"start{n}"], state.arrays[f"delta{n}"] = c.start.flat, c.delta
            state.facts["box"].append([c.client, c.start.spec.rank, c.weight, c.staleness, c.discount])
        return state

    def load_state(self, state: State) -> None:
        """Goes on where `state` was asked for."""
        self._parts = [
            Part(job=job, child=child, examples=examples, devices=devices, loss=loss)
            for job, child, examples, devices, loss in state.facts["parts"]
        ]
        self._box = [
            Contribution(
                client=client,
                start=Adapter(at(self._spec, rank), state.arrays[f"start{n}"]),
                delta=state.arrays[f"delta{n}"],
                weight=weight,
                staleness=staleness,
                discount=discount,
            )
            for n, (client, rank, weight, staleness, discount) in enumerate(state.facts["box"])
        ]


def _sum(spec: Spec, box: list[Contribution]) -> Contribution:
    """Σ c·Δ / Σ w as one update of weight Σ w, so that a rule makes of it what it would make of all of them.

    LoRA's updates are added as products; the sum has as many ranks as it needs, up to `STACK`.
    """
    total = sum(c.relative for c in box)
    if spec.method is not Method.LORA:
        delta = np.zeros(spec.size, np.float64)
        for c in box:
            if c.start.spec != spec:
                raise AdapterError("an update in the sum is of another adapter than the aggregator's")
            delta += (c.weight / total) * c.delta
        return Contribution(client=SOMEBODY, start=box[0].start, delta=delta.astype(np.float32), weight=total)
    stack = Stack(spec, STACK)
    for c in box:
        if c.start.spec.layers != spec.layers or c.start.spec.base != spec.base:
            raise AdapterError("an update in the sum is of another adapter than the aggregator's")
        stack.add(c.start, c.weight, c.delta)
    blocks = {layer: found.block(0) for layer, found in summed(spec, stack.terms(1.0 / total), STACK)}
    made = at(spec, max(1, *(p.shape[1] for p, _ in blocks.values())))
    start, change = Adapter.zeros(made), Adapter.zeros(made)
    for layer, (p, q) in blocks.items():
        start[f"{layer}.{A}"][: len(q)] = q
        change[f"{layer}.{B}"][:, : len(q)] = p / np.float32(made.scaling)
    return Contribution(client=SOMEBODY, start=start, delta=change.flat, weight=total)


class Counts:
    """How updates travel where only counts may be seen: a header, and no numbers either way. See `simulator.uplink`.

    Args:
        trainer: Tells how many examples are behind a job; nothing else of it is read.
    """

    early = False

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def down_bytes(self, job: Job, start: Adapter) -> int:
        """See `Uplink`."""
        return HEADER_BYTES

    def up_bytes(self, start: Adapter) -> int:
        """See `Uplink`."""
        return HEADER_BYTES

    def send(self, job: Job, start: Adapter) -> bytes:
        """Never asked for."""
        raise NotImplementedError

    def receive(self, job: Job, start: Adapter, info: ClientInfo, message: bytes | None) -> Came:
        """See `Uplink`."""
        examples = self._trainer.train(start, job).examples
        return Came(np.zeros(start.spec.size, np.float32), examples, 1, 0.0, None)

    def settle(self, job: Job, *, accepted: bool) -> None:
        """Nothing is remembered."""

    def save(self) -> dict[tuple[str, str], bytes]:
        """Nothing is remembered."""
        return {}

    def load(self, saved: dict[tuple[str, str], bytes]) -> None:
        """Nothing is remembered."""
