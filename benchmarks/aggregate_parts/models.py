"""The adapters whose merging is timed, and updates of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from fed.adapter import Adapter, LayerSize, Spec
from fed.aggregate.lowrank import fresh
from fed.aggregate.rule import Contribution

CLIENTS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model's adapter.

    Attributes:
        blocks: Transformer blocks.
        layers: Adapted layers of a block.
        rank: r.
    """

    blocks: int
    layers: Mapping[str, LayerSize]
    rank: int

    def spec(self) -> Spec:
        """LoRA on those layers."""
        layers = {f"{n}.{name}": size for n in range(self.blocks) for name, size in self.layers.items()}
        return Spec.lora(layers, rank=self.rank, alpha=2.0 * self.rank)


MODELS: Final[Mapping[str, Model]] = MappingProxyType(
    {
        "smollm2": Model(blocks=30, layers={"q_proj": LayerSize(576, 576), "v_proj": LayerSize(576, 192)}, rank=8),
        "llama7b": Model(blocks=32, layers={"q_proj": LayerSize(4096, 4096), "v_proj": LayerSize(4096, 4096)}, rank=16),
    }
)
"""q and v of SmolLM2-135M at rank 8, and of Llama 7B (64 modules of 4096²) at rank 16."""

QUICK_BLOCKS: Final = 4
"""Blocks of each under `--quick`: results say so."""


def start(spec: Spec, seed: int) -> Adapter:
    """A version that has learned something."""
    adapter = fresh(spec, seed)
    rng = np.random.default_rng([seed, 1])
    for _, b, _ in adapter.factors():
        b[:] = 0.01 * rng.standard_normal(b.shape, dtype=np.float32)
    return adapter


def contributions(adapter: Adapter, seed: int, clients: int = CLIENTS) -> Iterator[Contribution]:
    """One update of each client, made when it is asked for."""
    for n in range(clients):
        rng = np.random.default_rng([seed, 2, n])
        delta = rng.standard_normal(adapter.spec.size, dtype=np.float32)
        delta *= np.float32(0.003)
        yield Contribution(client=f"c{n}", start=adapter, delta=delta, weight=n + 1.0)
