"""Adapters as federation sees them: one vector of numbers, and the names and shapes of the tensors in it.

Everything that travels or is added up works on the vector: clipping, noise, compression, checksums, weighted means.
Rules that know more (which tensors are factors of the same product) look at the tensors, which are views of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from agora.errors import AdapterError

Vector = NDArray[np.float32]
"""Shape (size,)."""

A: Final = "lora_A"
"""Suffix of a layer's first factor, shape (r, inputs), named as peft names it."""

B: Final = "lora_B"
"""Suffix of a layer's second factor, shape (outputs, r)."""


class Method(StrEnum):
    """What is trained: low-rank factors, tokens or key-value pairs put before the text, or plain tensors."""

    LORA = "lora"
    PREFIX = "prefix"
    P_TUNING = "p_tuning"
    PROMPT = "prompt"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor: its name, its shape, and where in the vector it begins."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LayerSize:
    """A linear layer that an adapter changes: y = W·x with W of shape (outputs, inputs)."""

    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """What the numbers of an adapter mean. Two vectors may be added only if their specs are equal, the order of their
    tensors included.

    Attributes:
        method: What is trained.
        base: Fingerprint of the base model; empty where there is none.
        shapes: Tensors by name, in their order in the vector.
        rank: r of LoRA; for the other methods the number of virtual tokens, 0 for plain tensors.
        alpha: α of LoRA.
        rslora: Whether s is α/√r instead of α/r (Kalajdzievski 2023, arXiv 2312.03732).
        layers: LoRA's layers by name, in their order in the vector.
    """

    method: Method
    base: str = ""
    shapes: Mapping[str, tuple[int, ...]]
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    layers: Mapping[str, LayerSize] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # An α of 8 and one of 8.0 are the same, and must give the same digest.
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.method is Method.LORA and not (self.rank >= 1 and math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"LoRA with rank {self.rank} and alpha {self.alpha}; both must be above 0")
        if not self.shapes:
            raise AdapterError("an adapter needs at least one tensor")
        for name, shape in self.shapes.items():
            if not shape or any(n < 1 for n in shape):
                raise AdapterError(f"tensor {name!r} has shape {shape}; every side must be at least 1")

    @classmethod
    def lora(
        cls, layers: Mapping[str, LayerSize], *, rank: int, alpha: float, rslora: bool = False, base: str = ""
    ) -> Self:
        """The spec of LoRA on these layers; tensors are named `LAYER.lora_A` and `LAYER.lora_B`.

        Raises:
            AdapterError: If there is no layer, or rank or alpha is out of range.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in layers.items():
            shapes[f"{name}.{A}"] = (rank, size.inputs)
            shapes[f"{name}.{B}"] = (size.outputs, rank)
        return cls(
            method=Method.LORA, base=base, shapes=shapes, rank=rank, alpha=alpha, rslora=rslora, layers=dict(layers)
        )

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """Where each tensor is, by name."""
        slots: dict[str, Slot] = {}
        start = 0
        for name, shape in self.shapes.items():
            slots[name] = Slot(name, tuple(shape), start)
            start += slots[name].size
        return slots

    @cached_property
    def size(self) -> int:
        """Numbers in the vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def digest(self) -> str:
        """Of `to_json`, sha256 in hexadecimal: specs with equal digests are equal, order of tensors included."""
        return hashlib.sha256(json.dumps(self.to_json(), separators=(",", ":")).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Spec) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def scaling(self) -> float:
        """s of ΔW = s·B·A; 1 for other methods."""
        if self.method is not Method.LORA:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at_rank(self, rank: int) -> Spec:
        """The same LoRA with another rank and the same α.

        Raises:
            AdapterError: If this is not LoRA, or the rank is out of range.
        """
        if self.method is not Method.LORA:
            raise AdapterError(f"{self.method} has no rank to change")
        return Spec.lora(self.layers, rank=rank, alpha=self.alpha, rslora=self.rslora, base=self.base)

    def to_json(self) -> dict[str, Any]:
        """As JSON, for headers and checkpoints."""
        return {
            "method": str(self.method),
            "base": self.base,
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "rank": self.rank,
            "alpha": self.alpha,
            "rslora": self.rslora,
            "layers": [[name, size.inputs, size.outputs] for name, size in self.layers.items()],
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            AdapterError: If it is something else.
        """
        try:
            return cls(
                method=Method(body["method"]),
                base=str(body["base"]),
                shapes={str(name): tuple(int(n) for n in shape) for name, shape in body["shapes"]},
                rank=int(body["rank"]),
                alpha=float(body["alpha"]),
                rslora=bool(body["rslora"]),
                layers={str(name): LayerSize(int(i), int(o)) for name, i, o in body["layers"]},
            )
        except (KeyError, TypeError, ValueError) as e:
            raise AdapterError(f"this tells no adapter's shape: {type(e).__name__}: {e}") from e


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter's numbers.

    Attributes:
        spec: What they mean.
        flat: All of them, shape (spec.size,), C-contiguous float32. Not to be written to: versions are immutable.
    """

    spec: Spec
    flat: Vector

    def __post_init__(self) -> None:
        if self.flat.shape != (self.spec.size,) or self.flat.dtype != np.float32:
            raise AdapterError(
                f"an adapter of {self.spec.size} numbers was given {self.flat.dtype} of shape {self.flat.shape}"
            )

    @classmethod
    def zeros(cls, spec: Spec) -> Self:
        """All zero: the start of plain tensors, never of LoRA, whose gradient would stay zero."""
        return cls(spec, np.zeros(spec.size, np.float32))

    @classmethod
    def from_tensors(cls, spec: Spec, tensors: Mapping[str, NDArray[np.floating]]) -> Self:
        """Puts tensors into one vector.

        Raises:
            AdapterError: If they are not those of the spec.
        """
        if wrong := sorted(set(tensors) ^ set(spec.shapes)):
            raise AdapterError(f"tensor {wrong[0]!r} is {'missing' if wrong[0] in spec.shapes else 'not expected'}")
        flat = np.empty(spec.size, np.float32)
        for name, slot in spec.slots.items():
            if tensors[name].shape != slot.shape:
                raise AdapterError(f"tensor {name!r} has shape {tensors[name].shape}; expected {slot.shape}")
            flat[slot.start : slot.start + slot.size] = tensors[name].ravel()
        return cls(spec, flat)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """A tensor: a view of the vector."""
        slot = self.spec.slots[name]
        return self.flat[slot.start : slot.start + slot.size].reshape(slot.shape)

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Every tensor with its name, views all."""
        for name in self.spec.slots:
            yield name, self[name]

    def factors(self) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
        """LoRA's layers: name, B of shape (outputs, r), A of shape (r, inputs)."""
        for layer in self.spec.layers:
            yield layer, self[f"{layer}.{B}"], self[f"{layer}.{A}"]

    def plus(self, delta: Vector) -> Adapter:
        """Another one, that much away."""
        return Adapter(self.spec, self.flat + delta)
