"""The running batch over llama.cpp: rows that share sequences when scoring, and rows held to a grammar."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

from torch import Tensor

from experts.engine.batch import Batch
from experts.engine.facts import ModelFacts
from experts.engine.jobs import GenerateJob, Job, Outbox, Piece, ScoreJob
from experts.engine.loading import LoadedModel
from experts.engine.pace import Pace
from experts.engine.rows import GenerateRow, Row, ScoreRow
from experts.engine.runner import Runner
from experts.engine.sampling import Choice
from experts.llama.grammar import Grammar
from experts.llama.runner import LlamaRunner
from experts.llama.sequences import SequencePlace


@dataclass(slots=True, eq=False, kw_only=True)
class SchemaJob(GenerateJob):
    """A generation whose text a grammar holds to a JSON schema."""

    grammar: Grammar

    @classmethod
    def of(cls, job: GenerateJob, grammar: Grammar) -> SchemaJob:
        """The same generation, held to a grammar."""
        return cls(**{f.name: getattr(job, f.name) for f in fields(GenerateJob)}, grammar=grammar)


class SchemaRow(GenerateRow):
    """A generation whose tokens a grammar allows.

    Attributes:
        logits: Those that the next token was chosen from, shape (vocabulary,).
    """

    job: SchemaJob
    logits: Tensor

    def take(self, choice: Choice, now: float) -> Piece | None:
        """As `GenerateRow.take`, with another token where the grammar does not allow this one."""
        if choice.token >= 0:
            choice = self.job.grammar.hold(choice, self.logits, self.wish, name=self.job.name)
        return super().take(choice, now)


class BranchRow(ScoreRow):
    """A scoring that reads as many continuations side by side as it has sequences."""

    place: SequencePlace

    def _grow_tree(self) -> None:
        wide = len(self.place.seqs)
        later = self._left[wide:]
        del self._left[wide:]
        super()._grow_tree()
        self._left += later


class LlamaBatch(Batch):
    """Rows decoding together in llama.cpp. Lives on the worker thread.

    Args:
        runner: The model.
        facts: What is known of it.
        max_rows: Most requests at once; urgent ones come on top.
        max_cells: Tokens in memory, over all rows; a request waits until its share is free.
        prefill_tokens: Prompt tokens read in one step.
        outbox: Where events go.
        pace: Where it is noted how fast requests end.
    """

    def __init__(
        self,
        runner: LlamaRunner,
        facts: ModelFacts,
        *,
        max_rows: int,
        max_cells: int,
        prefill_tokens: int,
        outbox: Outbox,
        pace: Pace,
    ) -> None:
        super().__init__(
            # It has what a batch without adapters uses of a runner.
            LoadedModel(runner=cast(Runner, runner), facts=facts),
            max_rows=max_rows,
            max_bytes=max_cells,
            outbox=outbox,
            pace=pace,
            prefill_tokens=prefill_tokens,
        )
        self._cache = self._sequences = runner.sequences

    def _row(self, job: Job) -> Row:
        if isinstance(job, ScoreJob):
            # A continuation of one token needs no sequence: the prompt's last logits tell all about it.
            wanted = sum(len(c) > 1 for c in job.continuations)
            return BranchRow(job, self._sequences.open_branches(max(1, wanted)))
        assert isinstance(job, GenerateJob)
        place = self._sequences.open_branches(1)
        try:
            kind = SchemaRow if isinstance(job, SchemaJob) else GenerateRow
            return kind(job, place, self.facts)
        except Exception:
            self._sequences.close(place)
            raise

    def _generate(self, rows: list[tuple[GenerateRow, int]], logits: Tensor) -> None:
        for row, at in rows:
            if isinstance(row, SchemaRow):
                row.logits = logits[at]
        super()._generate(rows, logits)
