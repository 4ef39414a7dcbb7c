"""The chain of stages: clip → weight → noise → top-k → int8, any of them left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any, Final

import numpy as np

from agora.errors import ConfigError
from fed.adapter import Spec, Vector
from fed.chain.clip import Clip
from fed.chain.int8 import Int8
from fed.chain.memory import Memory, Residual
from fed.chain.noise import Noise
from fed.chain.stage import VALUES, Coder, Context, Shaper, Stage, to_json
from fed.chain.top_k import TopK
from fed.chain.weight import Weight
from fed.wire import Parts, Reason, Refused, check_finite

STAGES: Final[Mapping[str, type[Stage]]] = {stage.kind: stage for stage in (Clip, Weight, Noise, TopK, Int8)}
"""Every stage by its kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """An update as it leaves the client and as it is read at the server.

    Attributes:
        chain: What was done to it.
        parts: What travels.
        delta: What the parts decode to, shape (spec.size,): the update times `weight`.
        weight: What it was multiplied by at the client.
    """

    chain: Chain
    parts: Parts
    delta: Vector
    weight: float = 1.0

    @property
    def unweighted(self) -> Vector:
        """The update itself, whatever the client multiplied it by."""
        return self.delta if self.weight == 1.0 else self.delta / np.float32(self.weight)


@dataclass(frozen=True)
class Chain:
    """What is done to an update before it travels. Without stages it travels as it is, four bytes a number.

    Attributes:
        stages: In order of their places.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.place >= after.place:
                raise ConfigError(
                    f"chain: {after.kind} stands after {before.kind}",
                    hint=f"each kind at most once, in this order: {', '.join(STAGES)}",
                )
        kinds = {stage.kind: stage for stage in self.stages}
        if Noise.kind in kinds and Clip.kind not in kinds:
            raise ConfigError("chain: noise without clip has no scale", hint="put clip before it")
        int8 = kinds.get(Int8.kind)
        if isinstance(int8, Int8) and int8.block is None and TopK.kind in kinds:
            raise ConfigError(
                "chain: after top_k there are no whole tensors to scale", hint="give int8 a block, such as 256"
            )

    @classmethod
    def from_config(cls, config: Sequence[Mapping[str, Any]]) -> Chain:
        """A chain from a configuration or a header: a list of `{kind, …}`, the rest being the stage's own settings.

        Raises:
            ConfigError: If a kind or a setting is unknown, missing or out of range, or the order is wrong.
        """
        return cls(tuple(_stage(number, entry) for number, entry in enumerate(config, 1)))

    def to_json(self) -> list[dict[str, Any]]:
        """As `from_config` reads it."""
        return [to_json(stage) for stage in self.stages]

    @cached_property
    def shapers(self) -> tuple[Shaper, ...]:
        """Stages that leave numbers numbers."""
        return tuple(stage for stage in self.stages if isinstance(stage, Shaper))

    @cached_property
    def coders(self) -> tuple[Coder, ...]:
        """Stages that pack them."""
        return tuple(stage for stage in self.stages if isinstance(stage, Coder))

    @property
    def error_feedback(self) -> bool:
        """Whether clients keep what coding drops."""
        return any(coder.error_feedback for coder in self.coders)

    def factor(self, examples: int) -> float:
        """What an update of a client with so many examples is multiplied by."""
        return next((stage.factor(examples) for stage in self.stages if isinstance(stage, Weight)), 1.0)

    def payload_bytes(self, spec: Spec) -> int:
        """Bytes of an update's numbers at most, header not counted: for planning a transfer before it is made."""
        size, parts = spec.size, {VALUES: 4 * spec.size}
        for coder in self.coders:
            parts = dict(coder.payload(size, parts, spec))
            size = coder.count(size)
        return sum(parts.values())

    def apply(self, delta: Vector, context: Context, memory: Memory | None = None) -> tuple[Sent, Memory]:
        """Makes an update ready to travel.

        With error feedback, what the client owes is added after clipping, weighting and noise, and before coding:
        coding alone is made good for. The norm of what is sent may then exceed the clip norm by what was owed.

        Args:
            delta: The update, shape (spec.size,). Not written to.
            context: Whose it is.
            memory: The client's for this model; None for none yet.

        Returns:
            What to send, and the memory with this job open: `settle` it when the update's fate is known. Without error
            feedback the memory comes back as it was.

        Raises:
            ConfigError: If noise has no bound to go by, or examples are none.
            InvalidRequest: If the memory has a job open.
            Refused: If the update is of another shape than the start, or not finite: training diverged.
        """
        memory = Memory() if memory is None else memory
        _check(delta, context.spec)
        vector = delta
        for shaper in self.shapers:
            vector, context = shaper.apply(vector, context)
        keeps = self.error_feedback
        if keeps and (owed := memory.owed(context.start)) is not None:
            vector = vector + owed * np.float32(context.weight)
        # What weighting or noise makes too large for float32 must not reach the coders.
        if vector is not delta:
            check_finite(vector, "numbers of the update")
        parts: Parts = {VALUES: np.ascontiguousarray(vector)}
        for coder in self.coders:
            parts = coder.encode(parts, context)
        sent = Sent(self, parts, self.decode(parts, context.spec), context.weight)
        if keeps:
            left = (vector - sent.delta) / np.float32(context.weight)
            memory = memory.opened(context.job, Residual(context.start, left))
        return sent, memory

    def decode(self, parts: Parts, spec: Spec) -> Vector:
        """The numbers that these parts stand for, shape (spec.size,).

        Raises:
            Refused: If they are not what this chain makes of such an adapter.
        """
        if VALUES not in parts:
            raise Refused(Reason.TENSORS, f"tensor {VALUES!r} is missing; {sorted(parts)} came")
        sizes = [spec.size]
        for coder in self.coders:
            sizes.append(coder.count(sizes[-1]))
        for coder, size in zip(reversed(self.coders), reversed(sizes[:-1]), strict=True):
            if parts[VALUES].shape != (coder.count(size),):
                raise Refused(
                    Reason.SHAPE,
                    f"{VALUES!r} has shape {parts[VALUES].shape}; {coder.kind} makes {coder.count(size)} of {size}",
                )
            parts = coder.decode(parts, size, spec)
        if extra := sorted(set(parts) - {VALUES}):
            raise Refused(Reason.TENSORS, f"tensor {extra[0]!r} is not expected")
        values: Vector = parts[VALUES]
        _check(values, spec)
        return values


def _check(values: Vector, spec: Spec) -> None:
    if values.dtype != np.float32 or values.shape != (spec.size,):
        raise Refused(
            Reason.SHAPE, f"the numbers are {values.dtype} of shape {values.shape}; expected {spec.size} float32"
        )
    check_finite(values, "numbers")


def _stage(number: int, entry: Mapping[str, Any]) -> Stage:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("kind"), str):
        raise ConfigError(f"chain, stage {number}: {entry!r} has no kind; it must be one of {', '.join(STAGES)}")
    kind = entry["kind"]
    if kind not in STAGES:
        raise ConfigError(f"chain, stage {number}: kind is {kind!r}; it must be one of {', '.join(STAGES)}")
    stage: Any = STAGES[kind]
    settings = {name: value for name, value in entry.items() if name != "kind"}
    allowed = [f.name for f in fields(stage)]
    if unknown := sorted(set(settings) - set(allowed), key=str):
        raise ConfigError(f"chain, stage {number}: {kind} has no setting {unknown[0]!r}; it has {', '.join(allowed)}")
    if missing := [f.name for f in fields(stage) if f.default is MISSING and f.name not in settings]:
        raise ConfigError(f"chain, stage {number}: {kind} needs {missing[0]!r}")
    made: Stage = stage(**settings)
    return made
