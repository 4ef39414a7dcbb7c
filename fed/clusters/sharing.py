"""Clusters that learn from each other: steps are shared in part, or LoRA's A is one for all.

Both are rules for `fed.simulate.simulate`, made by a pool that knows the models of one run:

    pool = SharedSteps(lambda adapter: make("delta", adapter), share=0.2)
    simulate(pace, fleet, trainer, pool, initial=adapter, grouping=grouping)

A pool belongs to one run; make a new one for another, also to resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Final

import numpy as np

from agora.errors import ConfigError, StoreError
from fed.adapter import A, Adapter, Method, Spec, Vector
from fed.aggregate.mean import Mean, MomentumOptions
from fed.aggregate.rule import Contribution, Options, Rule, State
from fed.aggregate.rule import share as check_share

OTHERS: Final = "other clusters"
"""Who shared steps are said to come from."""


class SharedSteps:
    """A pool of rules each of which takes part in the steps of the others.

    When a cluster makes a version, its step is

        (1 − λ)·own + λ·mean of the others',

    where own is what its rule makes of its clients' updates, and the others' is how far each has got since this
    cluster's last version, times the rule's own step. Steps are added by the rule itself, so LoRA's as products. The
    rule of a cluster alone makes what it would without a pool. Rules that remember each client's last update remember
    the others' steps alike; versions whose rank differs from the one before are not shared.

    Args:
        rule: Makes the rule of one model; with the option `normalise` as it is by default.
        share: λ, from 0 to below 1.

    Raises:
        ConfigError: If the share is out of range.
    """

    def __init__(self, rule: Callable[[Adapter], Rule], share: float) -> None:
        check_share("share", share)
        self.rule, self.share = rule, float(share)
        self.members: list[SharedStep] = []

    def __call__(self, initial: Adapter) -> SharedStep:
        """The rule of one more model."""
        number = max((m.number for m in self.members), default=-1) + 1
        made = SharedStep(self, self.rule(initial), number)
        self.members.append(made)
        return made


class SharedStep:
    """The rule of one model in a pool.

    Args:
        pool: The pool.
        rule: The model's own rule, at its first version.
        number: Of the model in the pool.
    """

    def __init__(self, pool: SharedSteps, rule: Rule, number: int) -> None:
        self._pool, self._rule, self._initial, self.number = pool, rule, rule.current, number
        self.made = 0
        self._weights = 0.0
        self._shared = 0
        # Those that come later are seen from where they begin.
        self._seen: dict[int, tuple[int, Adapter]] = {m.number: (m.made, m.current) for m in pool.members}

    @property
    def current(self) -> Adapter:
        """The newest version."""
        return self._rule.current

    @property
    def notes(self) -> Mapping[str, float]:
        """Figures on how the newest version was made; `shared` tells from how many other clusters' steps."""
        return {**self._rule.notes, "shared": float(self._shared)}

    def absorb(self, contribution: Contribution) -> None:
        """See `Rule.absorb`."""
        self._rule.absorb(contribution)
        self._weights += contribution.relative

    def publish(self) -> Adapter:
        """See `Rule.publish`."""
        weights, self._weights = self._weights, 0.0
        moved = self._moved() if weights and self._pool.share else []
        for other, then in moved:
            each = weights * self._pool.share / ((1.0 - self._pool.share) * len(moved))
            # What is absorbed is a step between two versions of the same model, however old the first is.
            delta = other.current.flat - then.flat
            self._rule.absorb(Contribution(client=OTHERS, start=then, delta=delta, weight=each))
            self._seen[other.number] = (other.made, other.current)
        self._shared = len(moved)
        made = self._rule.publish()
        self.made += 1
        return made

    def _moved(self) -> list[tuple[SharedStep, Adapter]]:
        """Other models that have got further, and where they were. Sorted: a resumed pool has another order."""
        found = []
        for other in sorted(self._pool.members, key=lambda m: m.number):
            made, then = self._seen.get(other.number, (0, other._initial))
            if other is not self and other.made > made and other.current.spec == then.spec:
                found.append((other, then))
        return found

    def start_for(self, adapter: Adapter, rank: int | None) -> Adapter:
        """See `Rule.start_for`."""
        return self._rule.start_for(adapter, rank)

    def state(self) -> State:
        """See `Rule.state`."""
        state = State({}, {"number": self.number, "made": self.made, "weights": self._weights, "seen": []})
        state.facts["shared"] = self._shared
        state.put("rule", self._rule.state())
        for number, (made, adapter) in sorted(self._seen.items()):
            state.facts["seen"].append([number, made, adapter.spec.to_json()])
            state.arrays[f"seen{number}"] = adapter.flat
        return state

    def load_state(self, state: State) -> None:
        """See `Rule.load_state`."""
        facts = state.facts
        try:
            self._rule.load_state(state.within("rule"))
            self.number, self.made, self._weights = int(facts["number"]), int(facts["made"]), float(facts["weights"])
            self._shared = int(facts["shared"])
            # A resumed run makes the first rules twice.
            self._pool.members = [m for m in self._pool.members if m is self or m.number != self.number]
            self._seen = {
                int(number): (int(made), Adapter(Spec.from_json(spec), state.arrays[f"seen{number}"]))
                for number, made, spec in facts["seen"]
            }
        except (KeyError, TypeError, ValueError) as e:
            raise StoreError(f"the state of shared steps is damaged: {type(e).__name__}: {e}") from e


class SharedA:
    """A pool of LoRA rules with one A for all clusters, and a B of each cluster's own.

    A takes what models have in common, B what is each cluster's (Guo et al. 2024, "Selective Aggregation for Low-Rank
    Adaptation in Federated Learning", arXiv 2410.01463, where every single client has its own B). Factors are averaged
    as they are, so all clients have one rank. When a cluster makes a version, A moves by its clients' mean ΔA over the
    number of clusters that share it; other clusters take it up with their next version.

    Args:
        options: Of every rule.

    Raises:
        ConfigError: If momentum is asked for: A would have as many velocities as clusters.
    """

    def __init__(self, options: MomentumOptions | None = None) -> None:
        self.options = options if options is not None else MomentumOptions()
        if self.options.momentum:
            raise ConfigError(f"a shared A has no momentum; {self.options.momentum} was asked for")
        self.count = 0
        """Models that share it."""
        self.shared: Vector | None = None
        """A of all layers and zeros elsewhere, shape (spec.size,)."""

    def __call__(self, initial: Adapter) -> OwnB:
        """The rule of one more model. It takes up the A of the pool with its first version."""
        made = OwnB(initial, self.options)
        made.pool = self
        if self.shared is None:
            self.shared = initial.flat * made.of_a
        self.count += 1
        return made


class OwnB(Mean):
    """The rule of one model in a `SharedA` pool."""

    name = "shared_a"
    options_type: ClassVar[type[Options]] = MomentumOptions
    methods: ClassVar[frozenset[Method]] = frozenset({Method.LORA})
    instead: ClassVar[str] = "mean"

    pool: SharedA

    def __init__(self, initial: Adapter, options: Options | None = None) -> None:
        super().__init__(initial, options)
        self.of_a = _mask(initial.spec)

    def _next(self) -> Adapter:
        pool = self.pool
        assert pool.shared is not None
        direction = self._direction()
        # Each cluster moves A by its part, so that A's step is the mean of all clusters' when all have made a version.
        shared = pool.shared + direction * self.of_a / np.float32(pool.count)
        made = self._finite(Adapter(self._spec, np.where(self.of_a > 0, shared, self._current.flat + direction)))
        pool.shared = shared
        return made

    def _save(self, state: State) -> None:
        super()._save(state)
        assert self.pool.shared is not None
        state.arrays["shared"] = self.pool.shared
        state.facts["sharing"] = self.pool.count

    def _load(self, state: State) -> None:
        super()._load(state)
        # The same in the state of every model of the pool. A resumed run makes the first rules twice, hence the count.
        self.pool.shared, self.pool.count = state.arrays["shared"], int(state.facts["sharing"])


def _mask(spec: Spec) -> Vector:
    """1 where numbers belong to A, 0 elsewhere, shape (spec.size,)."""
    found = np.zeros(spec.size, np.float32)
    for layer in spec.layers:
        slot = spec.slots[f"{layer}.{A}"]
        found[slot.start : slot.start + slot.size] = 1.0
    return found
