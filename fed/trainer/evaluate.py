"""How good an adapter is on examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from agora.errors import InvalidRequest
from fed.adapter import Adapter
from fed.data import Example
from fed.trainer.batches import collate, judge
from fed.trainer.encode import Encoded, Encoder
from fed.trainer.live import LiveModel

BATCH_TOKENS: Final = 512
"""Tokens of a batch, filling included. SmolLM2-135M judged SST-2 at 270 to 310 tokens/s of one core with 512, at 220 to
255 with 1,024 and at 200 with 4,096: what a layer makes no longer fits the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How good an adapter is on examples.

    Attributes:
        loss: Mean cross-entropy of what is to be predicted: label words among label words, tokens among all.
        perplexity: exp(loss).
        accuracy: Share of the rows with label words whose right one is the likeliest; None without such rows.
        token_accuracy: Share of the tokens of free text that are the likeliest; None without such rows.
        correct: For each example whether all of it is right; None for one left out as too long.
        examples: Rows that were judged.
        left_out: Rows that were not, as too long.
        targets: Label words and tokens that were predicted.
    """

    loss: float
    perplexity: float
    accuracy: float | None
    token_accuracy: float | None
    correct: tuple[bool | None, ...]
    examples: int
    left_out: int
    targets: int


class Evaluator:
    """Judges adapters on examples that are read once.

    Args:
        live: The model.
        examples: What to judge on.
        encoder: How examples are read.

    Raises:
        InvalidRequest: If there are no examples, or none short enough.
    """

    def __init__(self, live: LiveModel, examples: Sequence[Example], encoder: Encoder) -> None:
        self._live = live
        self._count = len(examples)
        self._encoded: Encoded = encoder.encode(examples)
        if not self._encoded.rows:
            raise InvalidRequest(f"none of {len(examples)} examples can be judged: {self._encoded.left_out} too long")

    def evaluate(self, adapter: Adapter | None) -> Scores:
        """Judges an adapter, or the base model alone; the same numbers each time.

        Raises:
            AdapterError: If the adapter is not for this model.
        """
        with self._live.session():
            if adapter is None:
                with self._live.without(), torch.inference_mode():
                    return self._scores()
            self._live.put_on(adapter, train=False)
            with torch.inference_mode():
                return self._scores()

    def _scores(self) -> Scores:
        rows = self._encoded.rows
        losses: list[float] = []
        right: dict[int, bool] = {}
        hits = {True: 0, False: 0}
        totals = {True: 0, False: 0}
        for batch in self._batches():
            tensors = collate([rows[i] for i in batch])
            judged = judge(self._live.logits(tensors), tensors)
            losses += judged.losses.double().tolist()
            for at, correct in zip(tensors.rows.tolist(), judged.correct.tolist(), strict=True):
                row = batch[at]
                right[row] = right.get(row, True) and correct
                word = bool(rows[row].choices)
                hits[word] += correct
                totals[word] += 1
        loss = math.fsum(losses) / len(losses)
        by_example: list[bool | None] = [None] * self._count
        for i, kept in enumerate(self._encoded.kept):
            by_example[kept] = right[i]
        return Scores(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            accuracy=hits[True] / totals[True] if totals[True] else None,
            token_accuracy=hits[False] / totals[False] if totals[False] else None,
            correct=tuple(by_example),
            examples=len(rows),
            left_out=self._encoded.left_out,
            targets=len(losses),
        )

    def _batches(self) -> list[list[int]]:
        """Rows by length, as many together as `BATCH_TOKENS` allow."""
        batches: list[list[int]] = []
        order = sorted(range(len(self._encoded.rows)), key=lambda i: (len(self._encoded.rows[i].tokens), i))
        for i in order:
            longest = len(self._encoded.rows[i].tokens) + self._live.virtual_tokens
            if batches and (len(batches[-1]) + 1) * longest <= BATCH_TOKENS:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches
