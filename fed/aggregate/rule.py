"""What an aggregation rule is: it absorbs updates, publishes versions, and says where clients start from.

All rules weigh alike. An update of relative weight w (examples, say) that is τ versions late has c = w·s(τ), and the
step from one version to the next is

    η·Σ c_i·Δ_i / Σ w_i .

Dividing by the *undiscounted* weights makes equal weights the mean, lets a fresh update weigh exactly 1, and makes the
step really smaller when all updates are late; divided by Σ c_i, staleness would cancel out of a buffer whose updates
are equally late, and altogether out of one that holds a single update. `Normalise.COUNT` divides by the number K of
updates instead (FedBuff, Nguyen et al. 2022, arXiv 2106.06639, algorithm 1): an update's weight then counts even when
it is alone in its buffer, and it is on the caller to give weights whose mean over all clients is 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from agora.errors import AdapterError, ConfigError, InvalidRequest, StoreError
from fed.adapter import Adapter, Method, Spec, Vector

STARTS_KEPT: Final = 8
"""Starts of other ranks that are kept ready: as many as there are usual ranks from 1 to 128. A start that is asked for
again is then the same object, and updates made from it share work."""


FINITE_BLOCK: Final = 8192
"""Numbers whose squares are summed at a time: few enough for one thread of BLAS."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contribution:
    """A client's update, as a rule takes it.

    Attributes:
        client: Whose it is.
        start: The adapter as it was sent to this client, of its rank.
        delta: What training added to it, shape (start.spec.size,). Kept by reference, so not to be written to later.
        weight: c = w·s(τ): relative weight, staleness included.
        staleness: τ, versions published since `start`.
        discount: s(τ), which is in the weight already.
    """

    client: str
    start: Adapter
    delta: Vector
    weight: float = 1.0
    staleness: int = 0
    discount: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InvalidRequest(f"the update of {self.client!r} has weight {self.weight}; it must be a number from 0")
        if self.staleness < 0 or not 0 < self.discount <= 1:
            raise InvalidRequest(
                f"the update of {self.client!r} has staleness {self.staleness} and discount {self.discount}; they must "
                "be from 0, and above 0 and at most 1"
            )
        if self.staleness == 0 and self.discount != 1:
            raise InvalidRequest(f"a fresh update of {self.client!r} is discounted by {self.discount}; it must be 1")
        if self.delta.shape != (self.start.spec.size,) or self.delta.dtype != np.float32:
            raise AdapterError(
                f"the update of {self.client!r} is {self.delta.dtype} of shape {self.delta.shape}; "
                f"its start has {self.start.spec.size} float32 numbers"
            )

    @property
    def relative(self) -> float:
        """The weight w, before staleness."""
        return self.weight / self.discount

    @property
    def change(self) -> Adapter:
        """The delta by tensors."""
        return Adapter(self.start.spec, self.delta)


@dataclass(frozen=True, slots=True)
class State:
    """What a rule needs to go on bit for bit, on the same kind of processor.

    Attributes:
        arrays: By name, each C-contiguous: fit for safetensors.
        facts: Fit for JSON.
    """

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def within(self, prefix: str) -> State:
        """The part that `put` filed under a name."""
        cut = len(prefix) + 1
        arrays = {name[cut:]: a for name, a in self.arrays.items() if name.startswith(f"{prefix}.")}
        return State(arrays, self.facts[prefix])

    def put(self, prefix: str, part: State) -> None:
        """Files another state under a name."""
        self.arrays.update({f"{prefix}.{name}": a for name, a in part.arrays.items()})
        self.facts[prefix] = part.facts


class Rule(Protocol):
    """How versions are made."""

    @property
    def current(self) -> Adapter:
        """The newest version."""

    @property
    def notes(self) -> Mapping[str, float]:
        """Figures on how the newest version was made, for reports."""

    def absorb(self, contribution: Contribution) -> None:
        """Takes an update into what the next version is made of.

        Raises:
            AdapterError: If the rule cannot use it; nothing has changed then.
        """

    def publish(self) -> Adapter:
        """Makes the next version of what was absorbed, and forgets that; the current one if that was nothing.

        Raises:
            AdapterError: If the next version would hold NaN or infinity. What was absorbed is dropped, and the
                current version stays.
        """

    def start_for(self, adapter: Adapter, rank: int | None) -> Adapter:
        """What a client starts from that is to train a version at a rank; None for the server's own.

        Raises:
            AdapterError: If the rule or the method of the adapter allows no such rank.
        """

    def state(self) -> State:
        """All that it holds, to go on later."""

    def load_state(self, state: State) -> None:
        """Goes on where `state` was asked for, in a rule made alike.

        Raises:
            StoreError: If it is of another rule or another adapter.
        """


class Normalise(StrEnum):
    """What the sum of updates is divided by: the sum of their undiscounted weights, or their number."""

    WEIGHTS = "weights"
    COUNT = "count"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What all rules that add deltas have in common.

    Attributes:
        step: η, the server's step.
        normalise: What the sum of updates is divided by.
        seed: Of the random rows of unused ranks.
    """

    step: float = 1.0
    normalise: Normalise = Normalise.WEIGHTS
    seed: int = 0

    def __post_init__(self) -> None:
        positive("step", self.step)
        if self.normalise not in list(Normalise):
            raise ConfigError(f"normalise is {self.normalise!r}; allowed: {', '.join(Normalise)}")
        whole("seed", self.seed, least=0)


class Base:
    """What every rule does alike: checks, weights, and starts of other ranks."""

    name: ClassVar[str]
    options_type: ClassVar[type[Any]] = Options
    methods: ClassVar[frozenset[Method]] = frozenset({Method.LORA})
    instead: ClassVar[str] = "mean"

    def __init__(self, initial: Adapter, options: Any = None) -> None:
        if initial.spec.method not in self.methods:
            raise AdapterError(
                f"rule {self.name!r} is for {', '.join(sorted(self.methods))}; this adapter is {initial.spec.method}",
                hint=f"take {self.instead!r}",
            )
        if options is not None and not isinstance(options, self.options_type):
            raise ConfigError(f"rule {self.name!r} takes {self.options_type.__name__}, not {type(options).__name__}")
        if initial.spec.method is Method.LORA:
            for layer, b, a in initial.factors():
                if not (b.any() or a.any()):
                    raise AdapterError(
                        f"both factors of layer {layer!r} are zero, so that it could never learn",
                        hint="start with B = 0 and A random",
                    )
        self._options = self.options_type() if options is None else options
        self._spec = initial.spec
        self._specs = {initial.spec.rank: initial.spec}
        self._current = initial
        self._notes: dict[str, float] = {}
        self._weights = 0.0
        self._count = 0
        self._starts: OrderedDict[tuple[int, int], tuple[Adapter, Adapter]] = OrderedDict()

    @property
    def current(self) -> Adapter:
        """The newest version."""
        return self._current

    @property
    def notes(self) -> Mapping[str, float]:
        """Figures on how the newest version was made."""
        return dict(self._notes)

    def absorb(self, contribution: Contribution) -> None:
        """See `Rule.absorb`."""
        self._check(contribution)
        self._take(contribution)
        self._weights += contribution.relative
        self._count += 1

    def publish(self) -> Adapter:
        """See `Rule.publish`."""
        if not self._weights:
            self._forget()
            return self._current
        try:
            self._current = self._next()
        finally:
            self._forget()
        return self._current

    def combined(self, parts: Sequence[tuple[float, Adapter]], rank: int | None = None) -> Adapter:
        """A weighted sum of adapters, as this rule adds them up: products, or number by number.

        Args:
            parts: Weight and adapter.
            rank: Of the sum, cut to its largest singular values; None for the server's own.

        Raises:
            AdapterError: If they cannot be added, or the rule has no place for that rank.
        """
        if rank is not None and rank != self._spec.rank:
            raise AdapterError(f"rule {self.name!r} adds adapters up at rank {self._spec.rank}; {rank} was asked for")
        total = np.zeros(self._spec.size, np.float32)
        for weight, adapter in parts:
            if adapter.spec != self._spec:
                raise AdapterError(f"adapters of other kinds cannot be added: {_difference(adapter.spec, self._spec)}")
            total += np.float32(weight) * adapter.flat
        return self._finite(Adapter(self._spec, total))

    def shift(self, parts: Sequence[tuple[float, Adapter]]) -> Adapter:
        """Moves the current version by a weighted sum of adapters. That is no update, and is weighed with nothing.

        Returns:
            The current version from now on.

        Raises:
            InvalidRequest: If updates were absorbed that are not published yet.
            AdapterError: If they cannot be added; nothing has changed then.
        """
        if self._count:
            raise InvalidRequest(f"{self._count} updates were absorbed; a version is moved after it was published")
        self._current = self._shifted(parts)
        return self._current

    def _shifted(self, parts: Sequence[tuple[float, Adapter]]) -> Adapter:
        return self.combined([(1.0, self._current), *parts])

    def start_for(self, adapter: Adapter, rank: int | None) -> Adapter:
        """See `Rule.start_for`."""
        if adapter.spec.method is not Method.LORA:
            if rank is not None and rank != adapter.spec.rank:
                raise AdapterError(f"{adapter.spec.method} cannot be trained at another rank; {rank} was asked for")
            return adapter
        wanted = self._spec.rank if rank is None else rank
        if wanted == adapter.spec.rank:
            return adapter
        key = (id(adapter), wanted)
        if key not in self._starts:
            # The adapter is kept beside its start, so that its id is not given to another meanwhile.
            self._starts[key] = (adapter, self._at_rank(adapter, wanted))
            if len(self._starts) > STARTS_KEPT:
                self._starts.popitem(last=False)
        self._starts.move_to_end(key)
        return self._starts[key][1]

    def state(self) -> State:
        """See `Rule.state`."""
        state = State({"current": self._current.flat}, {})
        state.facts.update(
            rule=self.name,
            spec=self._spec.digest,
            current=self._current.spec.rank,
            weights=self._weights,
            count=self._count,
            notes=dict(self._notes),
        )
        self._save(state)
        return state

    def load_state(self, state: State) -> None:
        """See `Rule.load_state`."""
        if state.facts.get("rule") != self.name or state.facts.get("spec") != self._spec.digest:
            raise StoreError(
                f"this is the state of rule {state.facts.get('rule')!r} for another adapter or rule than {self.name!r}",
                hint="go on with the configuration that the run was begun with",
            )
        try:
            self._current = Adapter(self._ranked(int(state.facts["current"])), state.arrays["current"])
            self._weights = float(state.facts["weights"])
            self._count = int(state.facts["count"])
            self._notes = dict(state.facts["notes"])
            self._starts.clear()
            self._load(state)
        except (KeyError, TypeError, ValueError, AdapterError) as e:
            raise StoreError(f"the state of rule {self.name!r} is damaged: {type(e).__name__}: {e}") from e

    @property
    def _scale(self) -> float:
        """η over what the sum is divided by."""
        by = self._weights if self._options.normalise == Normalise.WEIGHTS else self._count
        return float(self._options.step / by)

    def _check(self, contribution: Contribution) -> None:
        spec = contribution.start.spec
        # Digests tell orders of tensors apart, which equality does not.
        if spec is self._spec or spec.digest == self._spec.digest:
            return
        mixed = self._spec.method is Method.LORA and spec.method is Method.LORA and spec.rank != self._spec.rank
        if not mixed or spec.digest != self._ranked(spec.rank).digest:
            why = _difference(spec, self._spec)
            raise AdapterError(f"the update of {contribution.client!r} is of another adapter than the server's: {why}")
        self._check_rank(contribution)

    def _ranked(self, rank: int) -> Spec:
        """The server's spec at a rank."""
        if rank not in self._specs:
            self._specs[rank] = self._spec.at_rank(rank)
        return self._specs[rank]

    def _check_rank(self, contribution: Contribution) -> None:
        """Refuses ranks that the method has no place for; by default there are none."""

    def _at_rank(self, adapter: Adapter, rank: int) -> Adapter:
        raise AdapterError(
            f"rule {self.name!r} has rank {adapter.spec.rank} for all; rank {rank} was asked for",
            hint="take the rule 'delta', or give all clients the same rank",
        )

    def _finite(self, adapter: Adapter) -> Adapter:
        finite(adapter.flat)
        return adapter

    def _take(self, contribution: Contribution) -> None:
        raise NotImplementedError

    def _next(self) -> Adapter:
        raise NotImplementedError

    def _forget(self) -> None:
        """Forgets what was absorbed."""
        self._weights = 0.0
        self._count = 0

    def _save(self, state: State) -> None:
        """Adds what the rule holds besides."""

    def _load(self, state: State) -> None:
        """Takes what `_save` added."""


def finite(numbers: Vector) -> None:
    """Refuses what would make a version of NaN or infinity.

    Raises:
        AdapterError: If so.
    """
    # A sum of squares is one pass without a copy, in blocks without an overflow below 1e16.
    for start in range(0, len(numbers), FINITE_BLOCK):
        block = numbers[start : start + FINITE_BLOCK]
        if not math.isfinite(float(np.dot(block, block))):
            raise AdapterError(
                "the next version would hold NaN, infinity or numbers near it, so what was absorbed is dropped",
                hint="look for clients whose training diverges, or clip updates",
            )


def positive(name: str, value: float) -> None:
    """Refuses a setting that is no number above 0.

    Raises:
        ConfigError: With its name and value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0")


def share(name: str, value: float, *, whole_too: bool = False) -> None:
    """Refuses a setting that is not from 0 to below 1, or to 1.

    Raises:
        ConfigError: With its name and value.
    """
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not (0 <= value < 1 or (whole_too and value == 1)):
        raise ConfigError(f"{name} is {value!r}; it must be from 0 to {'1' if whole_too else 'below 1'}")


def whole(name: str, value: int, *, least: int) -> None:
    """Refuses a setting that is no whole number from `least`.

    Raises:
        ConfigError: With its name and value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {least}")


def _difference(spec: Spec, ours: Spec) -> str:
    for name in ("method", "base", "rslora", "alpha"):
        if getattr(spec, name) != getattr(ours, name):
            return f"{name} is {str(getattr(spec, name))!r}, not {str(getattr(ours, name))!r}"
    return "names, shapes or order of its tensors differ"
