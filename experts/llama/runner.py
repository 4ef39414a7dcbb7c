"""One forward pass of llama.cpp over a flat list of tokens from many rows."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.engine.attention import Chunk, Step
from experts.engine.cache import CacheShape
from experts.llama.library import Library, last_words
from experts.llama.sequences import MAX_BRANCHES, SequencePlace, Sequences


class LlamaRunner:
    """A model with its context and memory; stands where `experts.engine.runner.Runner` does.

    It frees what llama.cpp holds when it is collected itself; until then it belongs to one thread.

    Attributes:
        shape: What one token needs of the memory.
        sequences: Who has which of it.

    Args:
        library: llama.cpp.
        model: A pointer to the model, which the runner frees.
        context: A pointer to the context, which the runner frees.
        shape: What one token needs of the memory.
        rows: Most rows at once, besides urgent ones.
        max_context: Tokens of one row.
        max_tokens: Most tokens of one pass.
    """

    def __init__(
        self,
        library: Library,
        model: Any,
        context: Any,
        *,
        shape: CacheShape,
        rows: int,
        max_context: int,
        max_tokens: int,
    ) -> None:
        self._library = library
        self._api = api = library.api
        self._context = context
        self._vocabulary: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = batch = api.llama_batch_init(max_tokens, 0, MAX_BRANCHES)
        self._tokens = np.ctypeslib.as_array(batch.token, (max_tokens,))
        self._positions = np.ctypeslib.as_array(batch.pos, (max_tokens,))
        self._wanted = np.ctypeslib.as_array(batch.logits, (max_tokens,))
        self.shape = shape
        self.sequences = Sequences(
            shape, api=api, memory=api.llama_get_memory(context), rows=rows, max_context=max_context
        )
        # Not at the end of the process: a thread may still be in the middle of a pass then.
        weakref.finalize(self, _free, api, batch, context, model).atexit = False

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
            step: Whose the tokens are, and what each one sees.
            keep: Indices of the tokens whose logits are wanted, ascending; at least one.
            adapters: Empty: there are none.

        Returns:
            Logits in float32, shape (len(keep), vocabulary); overwritten by the next pass.

        Raises:
            RuntimeError: If llama.cpp fails.
        """
        count = len(tokens)
        self._batch.n_tokens = count
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._wanted[:count] = 0
        self._wanted[list(keep)] = 1
        self._assign(step)
        with self._library.listening() as lines:
            status = self._api.llama_decode(self._context, self._batch)
            logits = self._api.llama_get_logits(self._context) if status == 0 else None
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}: {last_words(lines)}")
        if not logits:
            raise RuntimeError("llama_decode gave no logits: this model generates no text")
        kept = (ctypes.c_float * (len(keep) * self._vocabulary)).from_address(ctypes.addressof(logits.contents))
        return torch.from_numpy(np.ctypeslib.as_array(kept)).view(len(keep), self._vocabulary)

    def _assign(self, step: Step) -> None:
        """Tells llama.cpp which sequences each token belongs to."""
        for run in step.runs:
            for n, length in enumerate(run.lengths):
                place = self.sequences.at(run.slot + n)
                self._write(place, length - 1, length)
                self._belongs(run.first + n, place.seqs)
        for chunk in step.chunks:
            place = self.sequences.at(chunk.slot)
            self._write(place, chunk.start, chunk.start + chunk.last - chunk.first)
            for n, seqs in enumerate(_sequences_of(chunk, place.seqs)):
                self._belongs(chunk.first + n, seqs)

    def _write(self, place: SequencePlace, start: int, end: int) -> None:
        if start < place.written:
            self.sequences.cut(place, start)
        place.written = end

    def _belongs(self, index: int, seqs: Sequence[int]) -> None:
        self._batch.n_seq_id[index] = len(seqs)
        ids = self._batch.seq_id[index]
        for n, seq in enumerate(seqs):
            ids[n] = seq


def _sequences_of(chunk: Chunk, seqs: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Each token's sequences: the prompt's tokens have all of the row's, those of its n-th branch the n-th."""
    if chunk.branches is None:
        return [seqs] * (chunk.last - chunk.first)
    order = {branch: n for n, branch in enumerate(dict.fromkeys(b for b in chunk.branches if b))}
    return [(seqs[order[b]],) if b else seqs for b in chunk.branches[chunk.start :]]


def _free(api: Any, batch: Any, context: Any, model: Any) -> None:
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
