"""How good versions are: on rows that nobody trains on, and on those held back at the clients."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from agora.errors import InvalidRequest
from fed.adapter import Adapter
from fed.client import Evaluator, PeftTrainer, Scores
from fed.data import Example

ASSESSED: Final = 64
"""Rows of a client that a cluster's model is tried on: the mean loss of so many is known to about an eighth of the
losses' spread, which is what differs between clusters."""


class Judge:
    """Judges versions of models.

    Args:
        trainer: Whose base model is used.
        common: Rows that every model is judged on; empty for none.
        own: Rows by client that its own model is judged on; empty for none.

    Raises:
        InvalidRequest: If none of the common rows is short enough to be read.
    """

    def __init__(self, trainer: PeftTrainer, common: Sequence[Example], own: Mapping[str, Sequence[Example]]) -> None:
        self._common = trainer.evaluator(common) if len(common) else None
        self._own: dict[str, Evaluator] = {}
        for name, rows in own.items():
            try:
                self._own[name] = trainer.evaluator(rows)
            except InvalidRequest:
                # All of the client's few rows are too long; its model is judged on those of the others.
                continue

    @property
    def judges(self) -> bool:
        """Whether there is anything to judge on."""
        return self._common is not None or bool(self._own)

    def judge(self, adapter: Adapter, members: Collection[str] | None) -> dict[str, Any]:
        """What a row of `evaluations.jsonl` tells of a version.

        Args:
            adapter: The version.
            members: Clients whose model it is; None for all of them.

        Returns:
            `loss`, `accuracy` and `rows` on the common rows, where there are some; `own_loss`, `own_worst` (the client
            with the highest loss), `own_accuracy` and `own_rows` on those of its members, where there are some.
        """
        found: dict[str, Any] = {}
        if self._common is not None:
            scores = self._common.evaluate(adapter)
            found |= {"loss": scores.loss, "accuracy": _accuracy(scores), "rows": scores.examples}
        own = {
            name: evaluator.evaluate(adapter)
            for name, evaluator in self._own.items()
            if members is None or name in members
        }
        if own:
            rows = sum(s.examples for s in own.values())
            right = [(a, s.examples) for s in own.values() if (a := _accuracy(s)) is not None]
            found |= {
                "own_loss": math.fsum(s.loss * s.examples for s in own.values()) / rows,
                "own_worst": max(s.loss for s in own.values()),
                "own_accuracy": math.fsum(a * n for a, n in right) / sum(n for _, n in right) if right else None,
                "own_rows": rows,
            }
        return found


class Assessor:
    """Tries models on clients' own rows; a `fed.clusters.ifca.Assessor`.

    Args:
        trainer: Whose base model is used.
        clients: Rows by client.
    """

    def __init__(self, trainer: PeftTrainer, clients: Mapping[str, Sequence[Example]]) -> None:
        self._trainer, self._clients = trainer, clients
        self._evaluators: dict[str, Evaluator] = {}

    def loss(self, adapter: Adapter, client: str) -> float:
        """The mean loss on the client's first rows."""
        if client not in self._evaluators:
            self._evaluators[client] = self._trainer.evaluator(self._clients[client][:ASSESSED])
        return self._evaluators[client].evaluate(adapter).loss


def _accuracy(scores: Scores) -> float | None:
    return scores.token_accuracy if scores.accuracy is None else scores.accuracy
