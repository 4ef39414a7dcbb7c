"""Attention of a flat list of tokens from many rows, each over its own row's keys and values.

The model is called with one token per batch entry (shape (tokens, 1)), so every layer but attention treats all tokens
alike, whichever row they come from and however long it is. Attention is the only place that knows rows: it writes the
new keys and values into the rows' slots and lets each token see what its row allows.

transformers hands `attend` the projected queries, keys and values of each layer; it is registered under `NAME` in its
registry of attention functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from agora.errors import ModelError
from experts.engine.cache import Lane

NAME: Final = "agora_slots"
"""The name under which transformers knows `attend`."""

UNSUPPORTED: Final = ("softcap", "s_aux", "position_bias")
"""What some models add to attention and this implementation does not compute (Gemma 2, gpt-oss, T5)."""

SHARED_HEADS: Final = frozenset({"cpu"})
"""Devices whose fast kernels take fewer key-value heads than query heads together with a mask; CUDA's do not, and would
fall back to a slow one."""


@dataclass(slots=True)
class Run:
    """Rows in neighbouring slots of a lane that have one new token each: tokens `first` to `last` of the step.

    Attributes:
        first: Index of the first token.
        last: Index after the last token.
        lane: Where the rows are.
        slot: Slot of the first row.
        lengths: Tokens of each row, the new one included.
        masks: What each row may see, by sliding window; filled on first use, shared by the layers.
    """

    first: int
    last: int
    lane: Lane
    slot: int
    lengths: list[int]
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask (rows, 1, 1, longest), or None if every row may see everything."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, like)
        return self.masks[window]

    def _mask(self, window: int | None, like: Tensor) -> Tensor | None:
        longest = max(self.lengths)
        if min(self.lengths) == longest and (window is None or window >= longest):
            return None
        ends = torch.tensor(self.lengths, device=like.device)[:, None]
        at = torch.arange(longest, device=like.device)[None]
        hidden = at >= ends
        if window is not None:
            hidden |= at < ends - window
        zeros = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]


@dataclass(slots=True)
class Chunk:
    """Several new tokens of one row: tokens `first` to `last` of the step.

    Attributes:
        first: Index of the first token.
        last: Index after the last token.
        lane: Where the row is.
        slot: Its slot.
        start: Tokens of the row that are in the cache already.
        branches: For a row whose tokens form a tree (a prompt and several continuations of it), the branch of each of
            its tokens up to `last`, 0 for the prompt: a token sees the prompt and its own branch. None for plain text.
        positions: With `branches`, the position of each of those tokens.
        masks: What each token may see, by sliding window; filled on first use, shared by the layers.
    """

    first: int
    last: int
    lane: Lane
    slot: int
    start: int
    branches: list[int] | None = None
    positions: list[int] | None = None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Boolean mask (1, 1, new tokens, all tokens), or None where plain causal attention from 0 does."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, device)
        return self.masks[window]

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        end = self.start + self.last - self.first
        if self.start == 0 and self.branches is None and (window is None or window >= end):
            return None
        order = torch.arange(end, device=device)
        seen = order[None, :] <= order[self.start :, None]
        if self.branches is not None:
            branch = torch.tensor(self.branches, device=device)
            seen &= (branch[None, :] == 0) | (branch[None, :] == branch[self.start :, None])
        if window is not None:
            position = order if self.positions is None else torch.tensor(self.positions, device=device)
            seen &= position[None, :] > position[self.start :, None] - window
        return seen[None, None]


@dataclass(slots=True)
class Write:
    """Tokens `first` to `last` go to rows `where` of a lane's memory seen as (slots · capacity) rows."""

    first: int
    last: int
    lane: Lane
    where: Tensor


@dataclass(slots=True)
class Step:
    """One forward pass: where its tokens' keys and values go, and what each token may see."""

    writes: list[Write] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    agora_step: Step | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: The layer; its `layer_idx` says which.
        query: Shape (tokens, heads, 1, dim).
        key: Shape (tokens, key-value heads, 1, dim).
        value: As `key`.
        attention_mask: Always None: the step knows what is visible.
        scaling: Factor of query · key; None for 1/√dim.
        sliding_window: Tokens that a token may see, itself included; None for all.
        agora_step: The pass at hand.
        **extra: What else the model's layers hand over.

    Returns:
        The weighted values, shape (tokens, 1, heads, dim), and None for the weights.

    Raises:
        ModelError: If the model needs something this function does not compute.
    """
    if agora_step is None:
        raise ModelError(f"{type(module).__name__} does not hand its keyword arguments to attention")
    if odd := [name for name in UNSUPPORTED if extra.get(name) is not None]:
        raise ModelError(f"{type(module).__name__} needs {' and '.join(odd)} in attention, which is not supported")
    layer = module.layer_idx
    assert isinstance(layer, int)
    tokens, heads, _, dim = query.shape
    groups = key.shape[1]
    new_keys, new_values = key.reshape(tokens, groups * dim), value.reshape(tokens, groups * dim)
    for w in agora_step.writes:
        keys, values = w.lane.keys[layer], w.lane.values[layer]
        keys.view(-1, groups * dim).index_copy_(0, w.where, new_keys[w.first : w.last])
        values.view(-1, groups * dim).index_copy_(0, w.where, new_values[w.first : w.last])
    parts = [_attend_run(r, layer, query, groups, scaling, sliding_window) for r in agora_step.runs]
    parts += [_attend_chunk(c, layer, query, groups, scaling, sliding_window) for c in agora_step.chunks]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(tokens, 1, heads, dim), None


def _attend_run(r: Run, layer: int, query: Tensor, groups: int, scaling: float | None, window: int | None) -> Tensor:
    rows, longest = len(r.lengths), max(r.lengths)
    dim = query.shape[-1]
    keys = r.lane.keys[layer][r.slot : r.slot + rows, :longest].transpose(1, 2)
    values = r.lane.values[layer][r.slot : r.slot + rows, :longest].transpose(1, 2)
    # The queries that share a key-value head stand in for a sequence, so no key is copied.
    q = query[r.first : r.last].reshape(rows, groups, -1, dim)
    out = scaled_dot_product_attention(q, keys, values, attn_mask=r.mask(window, query), scale=scaling)
    return out.reshape(rows, -1, dim)


def _attend_chunk(
    c: Chunk, layer: int, query: Tensor, groups: int, scaling: float | None, window: int | None
) -> Tensor:
    end = c.start + c.last - c.first
    keys = c.lane.keys[layer][c.slot, :end].transpose(0, 1)[None]
    values = c.lane.values[layer][c.slot, :end].transpose(0, 1)[None]
    q = query[c.first : c.last, :, 0].transpose(0, 1)[None]
    mask = c.mask(window, query.device)
    shared = q.shape[1] != groups
    if shared and mask is not None and query.device.type not in SHARED_HEADS:
        keys, values = (t.repeat_interleave(q.shape[1] // groups, 1) for t in (keys, values))
        shared = False
    out = scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
    )
    return out[0].transpose(0, 1)


AttentionInterface.register(NAME, attend)
