"""A model ready to decode: one forward pass over a flat list of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agora.errors import ModelError
from experts.engine.attention import Step
from experts.engine.cache import CacheShape
from experts.engine.lora import AdapterSwitch


class Runner:
    """Runs a causal language model of transformers over tokens of many rows at once.

    Args:
        model: In eval mode, with `attention.attend` as its attention.
        shape: What its cache needs per token.

    Raises:
        ModelError: If the model has no output head.
    """

    def __init__(self, model: Any, shape: CacheShape) -> None:
        self.shape = shape
        self.adapters = AdapterSwitch(model)
        self._model: Any = model
        self._keep: Tensor | None = None
        head: nn.Module | None = self._model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output head: it generates no text")
        # The head is a third of a small model's work. Cutting the hidden states down right before it, and not calling
        # the layers below by hand, keeps whatever the model does to its logits afterwards (scaling, soft caps).
        head.register_forward_pre_hook(self._only_kept)

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        step: Step,
        keep: Sequence[int],
        adapters: Sequence[str | None] = (),
    ) -> Tensor:
        """One pass.

        Args:
            tokens: Ids, one per token.
            positions: Each token's place in its own row, from 0.
            step: Where keys and values go, and what each token sees.
            keep: Indices of the tokens whose logits are wanted; at least one.
            adapters: Name of each token's adapter, or None; empty for the base model throughout.

        Returns:
            Logits in float32, shape (len(keep), vocabulary).
        """
        device = self.shape.device
        self.adapters.select(list(adapters))
        self._keep = torch.tensor(keep, device=device)
        out = self._model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=torch.tensor(positions, device=device)[:, None],
            use_cache=False,
            agora_step=step,
        )
        logits: Tensor = out.logits[:, 0]
        return logits.float()

    def _only_kept(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return (hidden.index_select(0, self._keep), *rest)
