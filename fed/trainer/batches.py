"""Which rows make a step, and the tensors of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fed.trainer.encode import Row

WINDOW: Final = 16
"""Batches that are sorted by length together, so that rows of a batch are about as long as each other. On SST-2 with 16
rows a batch, filling up is 56 % of the work without, 16 % with 8, 9 % with 16 and 5 % with 32; the fewer, the more
random are the rows that meet."""

NOT_A_CHOICE: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The tensors of a step.

    Attributes:
        ids: Tokens, shape (rows, longest), filled up on the right.
        rows: Row of each place that counts, shape (places,).
        places: Index of the token that predicts there, shape (places,).
        targets: The right token, or the right choice's index where there are choices, shape (places,).
        choices: Tokens to choose from, shape (places, most choices), `NOT_A_CHOICE` where there are fewer; all of them
            where the answer is free.
        tokens: Tokens of the rows, without the filling.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor
    choices: Tensor
    tokens: int


def steps_of(rows: int, *, batch: int, steps: int | None, epochs: float) -> int:
    """Steps of a job."""
    return steps if steps is not None else max(1, math.ceil(epochs * rows / min(batch, rows)))


def plan(lengths: Sequence[int], *, batch: int, steps: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Rows of each step: pass after pass over all rows in random order, alike lengths together, none twice in a step.

    Args:
        lengths: Tokens of each row.
        batch: Rows of a step; all where there are fewer.
        steps: Steps.
        rng: Of the order.
    """
    size = min(batch, len(lengths))
    over: list[int] = []
    left = steps
    while left > 0:
        order: list[int] = rng.permutation(len(lengths)).tolist()
        if over:
            # What the last pass left is filled up from this one, with other rows.
            filling = [i for i in order if i not in over][: size - len(over)]
            yield over + filling
            left -= 1
            order = [i for i in order if i not in filling]
        whole = len(order) // size
        over = order[whole * size :]
        for at in range(0, min(whole, left), WINDOW):
            count = min(WINDOW, whole - at, left)
            window = sorted(order[at * size : (at + count) * size], key=lambda i: (lengths[i], i))
            for one in rng.permutation(count).tolist():
                yield window[one * size : (one + 1) * size]
            left -= count


def collate(rows: Sequence[Row]) -> Batch:
    """The tensors of these rows."""
    longest = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    at: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    choices: list[tuple[int, ...]] = []
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        predicted = (row.answer,) if row.choices else row.tokens[row.start :]
        at += [i] * len(predicted)
        places += range(row.start - 1, row.start - 1 + len(predicted))
        targets += predicted
        choices += [row.choices] * len(predicted)
    most = max(map(len, choices))
    table = torch.full((len(choices), most), NOT_A_CHOICE)
    for i, words in enumerate(choices):
        if words:
            table[i, : len(words)] = torch.tensor(words)
    return Batch(
        ids=ids,
        rows=torch.tensor(at),
        places=torch.tensor(places),
        targets=torch.tensor(targets),
        choices=table,
        tokens=sum(len(row.tokens) for row in rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the model said at each place of a batch.

    Attributes:
        losses: Cross-entropy, shape (places,).
        correct: Whether the right token or choice was the likeliest, shape (places,).
    """

    losses: Tensor
    correct: Tensor


def judge(logits: Tensor, batch: Batch) -> Judged:
    """Cross-entropy of the right token among all, or of the right label word among the label words.

    Args:
        logits: Shape (places, vocabulary).
        batch: Whose they are.
    """
    targets, choices = batch.targets.to(logits.device), batch.choices.to(logits.device)
    losses = torch.empty(len(targets), dtype=logits.dtype, device=logits.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=logits.device)
    chosen = (choices != NOT_A_CHOICE).any(1) if choices.shape[1] else torch.zeros_like(correct)
    for kind in (chosen, ~chosen):
        if not bool(kind.any()):
            continue
        scores = logits[kind]
        if kind is chosen:
            allowed = choices[kind]
            # The lowest number rather than -inf, whose gradient is not a number where it meets another.
            scores = scores.gather(1, allowed.clamp(min=0)).masked_fill(allowed < 0, torch.finfo(scores.dtype).min)
        found = torch.nn.functional.cross_entropy(scores, targets[kind], reduction="none")
        losses = losses.masked_scatter(kind, found)
        correct = correct.masked_scatter(kind, scores.argmax(1) == targets[kind])
    return Judged(losses=losses, correct=correct)
