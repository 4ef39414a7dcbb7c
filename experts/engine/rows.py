"""One request in the batch: the tokens it still has to read, and what it does with the logits it gets."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agora.errors import BadReply
from agora.protocols import FinishReason, TokenLogprob
from experts.engine.cache import Place
from experts.engine.facts import ModelFacts
from experts.engine.jobs import TREE_TOKENS, GenerateJob, Marks, Piece, ScoreJob
from experts.engine.sampling import Choice, Wish
from experts.engine.text import Detokenizer, StopFilter


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The tokens of a row that take part in a step.

    Attributes:
        tokens: Their ids.
        positions: Their places in the text.
        keep: Which of them the row wants logits of, counted from the first.
        branches: See `attention.Chunk`; up to the last of these tokens, or None.
        all_positions: With `branches`, the positions of all tokens up to the last.
    """

    tokens: list[int]
    positions: Sequence[int]
    keep: list[int]
    branches: list[int] | None = None
    all_positions: list[int] | None = None


def _not_finite(name: str) -> BadReply:
    """The error of a row whose logits are no numbers."""
    return BadReply(
        "the model's output is not finite for this request",
        backend=name,
        hint="weights or adapter are damaged, or the dtype is too narrow; try float32",
    )


class GenerateRow:
    """A generation: reads its prompt, then its own last token, again and again.

    Args:
        job: The request.
        place: Where its keys and values are.
        facts: The tokenizer, and the tokens that end a generation.
    """

    def __init__(self, job: GenerateJob, place: Place, facts: ModelFacts) -> None:
        self.job = job
        self.place = place
        self._codec = facts.codec
        self._eos = facts.eos
        self._tokens = list(job.prompt)
        self._made = 0
        self._detokenizer = Detokenizer(facts.codec, job.prompt)
        self._stops = StopFilter(job.stop)
        self._first_token_at = 0.0
        self._held: list[Piece] = []
        generator = None
        if job.temperature > 0:
            seed = secrets.randbits(63) if job.seed is None else job.seed
            # torch takes 64 bits; a seed may be any whole number.
            generator = torch.Generator().manual_seed(seed % 2**63)
        self.wish = Wish(temperature=job.temperature, top_p=job.top_p, generator=generator, logprobs=job.logprobs)

    @property
    def pending(self) -> int:
        """Tokens not yet in the cache."""
        return len(self._tokens) - self.place.length

    def part(self, count: int) -> Part:
        """The next `count` tokens."""
        start = self.place.length
        end = start + count
        keep = [count - 1] if end == len(self._tokens) else []
        return Part(tokens=self._tokens[start:end], positions=range(start, end), keep=keep)

    def take(self, choice: Choice, now: float) -> Piece | None:
        """Goes on with a token.

        Args:
            choice: The token.
            now: The time on `time.perf_counter`.

        Returns:
            What to tell the request now; the piece that has a `finish_reason` is its last.

        Raises:
            BadReply: If the logits were no numbers.
        """
        if choice.token < 0:
            raise _not_finite(self.job.name)
        self._made += 1
        self._first_token_at = self._first_token_at or now
        self._tokens.append(choice.token)
        finish: FinishReason | None = None
        if choice.token in self._eos:
            text, stopped = self._stops.push(self._detokenizer.flush())
            finish = "stop"
        else:
            text, stopped = self._stops.push(self._detokenizer.push(choice.token))
            if stopped:
                finish = "stop"
            elif self._made >= self.job.limit:
                rest, stopped = self._stops.push(self._detokenizer.flush())
                text += rest
                finish = "stop" if stopped else "length"
        if finish is not None and not stopped:
            text += self._stops.flush()
        piece = Piece(
            text=text,
            logprobs=self._told(choice),
            finish_reason=finish,
            tokens=self._made,
            first_token_at=self._first_token_at,
        )
        if self.job.streaming:
            return piece if piece.text or piece.logprobs or finish else None
        self._held.append(piece)
        return None if finish is None else self._whole(piece)

    def _told(self, choice: Choice) -> tuple[TokenLogprob, ...]:
        if self.job.logprobs is None:
            return ()
        top = tuple((self._codec.name(token), logprob) for token, logprob in choice.top)
        return (TokenLogprob(token=self._codec.name(choice.token), logprob=choice.logprob, top=top),)

    def _whole(self, last: Piece) -> Piece:
        return Piece(
            text="".join(p.text for p in self._held),
            logprobs=tuple(t for p in self._held for t in p.logprobs),
            finish_reason=last.finish_reason,
            tokens=last.tokens,
            first_token_at=last.first_token_at,
        )


class ScoreRow:
    """A scoring: reads the prompt once, then all continuations side by side as branches of one tree.

    Each branch sees the prompt and itself, at the positions it would have as the only one. The last token of a
    continuation need not be read, so continuations of one token cost nothing beyond the prompt.

    Args:
        job: The request.
        place: Where its keys and values are.
    """

    def __init__(self, job: ScoreJob, place: Place) -> None:
        self.job = job
        self.place = place
        self._sums = [0.0] * len(job.continuations)
        self._prompt = len(job.prompt)
        self._tokens = list(job.prompt)
        self._positions = list(range(self._prompt))
        self._branches = [0] * self._prompt
        # For each token: which tokens of which continuations it predicts.
        self._targets: list[list[tuple[int, int]]] = [[] for _ in job.prompt]
        self._targets[-1] = [(n, c[0]) for n, c in enumerate(job.continuations)]
        self._left = [n for n, c in enumerate(job.continuations) if len(c) > 1]
        self._grow_tree()

    @property
    def pending(self) -> int:
        """Tokens not yet in the cache."""
        return len(self._tokens) - self.place.length

    def part(self, count: int) -> Part:
        """The next `count` tokens."""
        start = self.place.length
        end = start + count
        branches, positions = None, None
        if end > self._prompt:
            branches, positions = self._branches[:end], self._positions[:end]
        return Part(
            tokens=self._tokens[start:end],
            positions=self._positions[start:end],
            keep=[i - start for i in range(start, end) if self._targets[i]],
            branches=branches,
            all_positions=positions,
        )

    def take(self, logits: Tensor, kept: Sequence[int]) -> Marks | None:
        """Goes on with logits.

        Args:
            logits: Shape (len(kept), vocabulary), float32.
            kept: Which tokens of the row they belong to, counted from its first.

        Returns:
            The scores, once all are known.

        Raises:
            BadReply: If the logits are no numbers.
        """
        if kept:
            logprobs = torch.log_softmax(logits, -1)
            pairs = [(n, at, token) for n, i in enumerate(kept) for at, token in self._targets[i]]
            found = logprobs[[n for n, _, _ in pairs], [token for _, _, token in pairs]].tolist()
            for (_, at, _), logprob in zip(pairs, found, strict=True):
                if math.isnan(logprob):
                    raise _not_finite(self.job.name)
                self._sums[at] += logprob
        if self.pending:
            return None
        if self._left:
            self._cut_tree()
            self._grow_tree()
            return None
        return Marks(tuple(self._sums))

    def _cut_tree(self) -> None:
        for per_token in (self._tokens, self._positions, self._branches, self._targets):
            del per_token[self._prompt :]
        self.place.length = self._prompt

    def _grow_tree(self) -> None:
        grown = 0
        while self._left and (grown == 0 or grown + len(self.job.continuations[self._left[0]]) <= TREE_TOKENS):
            n = self._left.pop(0)
            read = self.job.continuations[n][:-1]
            self._tokens += read
            self._positions += range(self._prompt, self._prompt + len(read))
            self._branches += [n + 1] * len(read)
            self._targets += [[(n, token)] for token in self.job.continuations[n][1:]]
            grown += len(read)


Row = GenerateRow | ScoreRow
