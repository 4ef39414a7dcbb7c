"""A client's work: training an adapter on its own examples, one base model serving all clients on this machine."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from agora.errors import AdapterError, InvalidRequest
from fed.adapter import Adapter, Method, Spec
from fed.data import Example
from fed.peft_folder import write_folder
from fed.trainer.base import BaseModel
from fed.trainer.batches import collate, judge, plan, steps_of
from fed.trainer.encode import Encoded, Encoder
from fed.trainer.evaluate import Evaluator, Scores
from fed.trainer.live import LiveModel
from fed.trainer.methods import transposed
from fed.trainer.settings import AdapterSettings, TrainingFailed, TrainSettings
from fed.words import Job, Trained

__all__ = [
    "AdapterSettings",
    "Evaluator",
    "PeftTrainer",
    "Scores",
    "StepTold",
    "TrainSettings",
    "TrainingFailed",
]

MAX_CACHED_TOKENS: Final = 20_000_000
"""Tokens of clients' rows kept between their jobs, about 200 MB; beyond it those used longest ago are made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTold:
    """A step of a job that was just taken.

    Attributes:
        job: Which job.
        step: Its number, from 1.
        steps: Of the job in all.
        loss: Of the step's rows, before it.
    """

    job: Job
    step: int
    steps: int
    loss: float


class PeftTrainer:
    """Trains adapters for any number of clients with one base model in memory; a `fed.words.Trainer`.

    The same start and the same job give the same bytes on the same machine with the same number of threads, whatever
    was trained in between: numbers, optimiser and random numbers start afresh with each job.

    Args:
        base: The base model. It is changed in place and belongs to this object from now on.
        adapter: What is trained.
        training: How.
        clients: Examples by client. They are turned into tokens when first used.
        on_step: Told after each step, from the thread that trains. What it raises ends the job, and the next one is
            none the worse for it.
        threads: CPU threads while training and judging; None for torch's own.

    Raises:
        InvalidRequest: If settings and model do not fit: unknown layers, a rank no layer can have, rows or virtual
            tokens longer than the model can read, a chat template that is not there.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        adapter: AdapterSettings,
        training: TrainSettings,
        clients: Mapping[str, Sequence[Example]],
        on_step: Callable[[StepTold], None] | None = None,
        threads: int | None = None,
    ) -> None:
        if training.freeze_a and adapter.method is not Method.LORA:
            raise InvalidRequest(f"freeze_a is for LoRA; the method is {adapter.method}")
        if threads is not None and threads < 1:
            raise InvalidRequest(f"threads is {threads}; allowed: from 1")
        self.training = training
        self._live = LiveModel(base, adapter, threads)
        longest = training.max_tokens + self._live.virtual_tokens
        if base.context is not None and longest > base.context:
            raise InvalidRequest(
                f"rows of up to {training.max_tokens} tokens and {self._live.virtual_tokens} virtual ones for a model "
                f"that reads {base.context}",
                hint="take a smaller max_tokens",
            )
        self._encoder = Encoder(base, max_tokens=training.max_tokens, chat=training.chat)
        self._clients = clients
        self._on_step = on_step
        self._encoded: OrderedDict[str, Encoded] = OrderedDict()
        self._cached_tokens = 0

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        adapter: AdapterSettings,
        training: TrainSettings,
        clients: Mapping[str, Sequence[Example]],
        dtype: str = "float32",
        device: str = "cpu",
        on_step: Callable[[StepTold], None] | None = None,
        threads: int | None = None,
    ) -> PeftTrainer:
        """Loads the base model and makes a trainer; see there and `BaseModel.load`."""
        base = BaseModel.load(folder, dtype=dtype, device=device)
        return cls(base, adapter=adapter, training=training, clients=clients, on_step=on_step, threads=threads)

    @property
    def base(self) -> BaseModel:
        """The base model."""
        return self._live.base

    def spec(self, rank: int | None = None) -> Spec:
        """What the adapters' numbers mean, of LoRA with another rank.

        Raises:
            InvalidRequest: If no adapter here can have that rank.
        """
        return self._live.spec(rank)

    def initial_adapter(self, seed: int, rank: int | None = None) -> Adapter:
        """The adapter a federation starts from; the same for the same seed.

        Raises:
            InvalidRequest: If no adapter here can have that rank.
        """
        return self._live.initial(seed, rank)

    def check(self, client: str) -> Encoded:
        """Reads a client's examples as training would.

        Raises:
            InvalidRequest: If there is no such client, it has no examples or none short enough, or label words of a
                task cannot be told apart.
        """
        with self._live.session():
            return self._check(client)

    def _check(self, client: str) -> Encoded:
        if client in self._encoded:
            self._encoded.move_to_end(client)
            return self._encoded[client]
        if client not in self._clients:
            raise InvalidRequest(f"there is no client {client!r} here", hint="check the clients' names")
        encoded = self._encoder.encode(self._clients[client])
        if not encoded.rows:
            longer = f": all {encoded.left_out} prompts have {self.training.max_tokens} tokens or more"
            raise InvalidRequest(
                f"client {client!r} has no rows to train on{longer if encoded.left_out else ''}",
                hint="leave the client out, or raise max_tokens" if encoded.left_out else "leave the client out",
            )
        self._encoded[client] = encoded
        self._cached_tokens += _tokens(encoded)
        while self._cached_tokens > MAX_CACHED_TOKENS and len(self._encoded) > 1:
            self._cached_tokens -= _tokens(self._encoded.popitem(last=False)[1])
        return encoded

    def train(self, start: Adapter, job: Job) -> Trained:
        """Trains a client's adapter on its examples. Takes a while: not for the event loop.

        Args:
            start: What to start from, of the job's rank.
            job: What to do.

        Returns:
            The difference to the start, and as metrics the mean `loss`, the first step's `loss_before` and the last
            one's `loss_last`, the mean `grad_norm` before clipping, `tokens` read, and `seconds` taken.

        Raises:
            AdapterError: If the start is not for this model, or not of the job's rank.
            InvalidRequest: As from `check`.
            TrainingFailed: If the loss or a gradient is not finite.
        """
        if job.rank is not None and start.spec.method is Method.LORA and start.spec.rank != job.rank:
            raise AdapterError(
                f"job {job.id} is of rank {job.rank}, but starts from an adapter of rank {start.spec.rank}",
                hint="bring the adapter to the job's rank first",
            )
        with self._live.session(), self._seeded(job.seed):
            return self._train(start, job)

    def evaluator(self, examples: Sequence[Example]) -> Evaluator:
        """Judges adapters on these examples, read as in training.

        Raises:
            InvalidRequest: If there are no examples, or none short enough.
        """
        return Evaluator(self._live, examples, self._encoder)

    def save(self, adapter: Adapter, folder: Path, *, base: str | Path | None = None) -> Path:
        """Writes an adapter as a folder that `PeftModel.from_pretrained` loads; see `fed.peft_folder.write_folder`.

        Args:
            adapter: Of this model.
            folder: Which must not be there yet, or be empty.
            base: What the folder says its base model is; None for the folder it was loaded from.

        Raises:
            AdapterError: If it cannot be written.
        """
        lora = adapter.spec.method is Method.LORA
        return write_folder(
            adapter,
            folder,
            base=self.base.folder if base is None else base,
            transposed=lora and transposed(self.base, adapter.spec),
        )

    def _train(self, start: Adapter, job: Job) -> Trained:
        t = self.training
        rows = self.check(job.client).rows
        parameters = self._live.put_on(start, train=True, freeze_a=t.freeze_a)
        # A new array: the model's own numbers change while it trains.
        began = self._live.take()
        anchors = [p.detach().clone() for p in parameters] if t.mu else []
        highest = t.learning_rate if t.learning_rate is not None else self._live.kit.learning_rate
        optimiser = _OPTIMISERS[t.optimiser](parameters, highest, t)
        steps = steps_of(len(rows), batch=t.batch, steps=job.steps or t.steps, epochs=t.epochs)
        rng = np.random.default_rng(abs(job.seed))
        losses: list[float] = []
        norms: list[float] = []
        tokens = 0
        started = time.perf_counter()
        for step, chosen in enumerate(plan([len(r.tokens) for r in rows], batch=t.batch, steps=steps, rng=rng)):
            batch = collate([rows[i] for i in chosen])
            with torch.autocast(self.base.device.type, torch.bfloat16, enabled=t.bf16):
                logits = self._live.logits(batch)
            loss = judge(logits, batch).losses.mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter, anchor in zip(parameters, anchors, strict=bool(anchors)):
                # The gradient of μ/2·‖w − w_start‖²; the told loss is the data's alone.
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach() - anchor, alpha=t.mu)
            norm = torch.nn.utils.clip_grad_norm_(parameters, t.clip if t.clip is not None else math.inf)
            losses.append(loss.item())
            norms.append(norm.item())
            if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
                raise TrainingFailed(
                    f"job {job.id} of {job.client!r}: at step {step + 1} of {steps} the loss is {losses[-1]} and the "
                    f"gradient's norm {norms[-1]}",
                    hint=f"take a lower learning rate than {highest:g}",
                )
            for group in optimiser.param_groups:
                group["lr"] = t.rate(step, steps, highest)
            optimiser.step()
            tokens += batch.tokens
            if self._on_step is not None:
                self._on_step(StepTold(job=job, step=step + 1, steps=steps, loss=losses[-1]))
        delta = self._live.take() - began
        if not np.isfinite(delta).all():
            raise TrainingFailed(
                f"job {job.id} of {job.client!r}: the adapter is not finite after {steps} steps",
                hint=f"take a lower learning rate than {highest:g}",
            )
        metrics = {
            "loss": math.fsum(losses) / steps,
            "loss_before": losses[0],
            "loss_last": losses[-1],
            "grad_norm": math.fsum(norms) / steps,
            "tokens": float(tokens),
            "seconds": time.perf_counter() - started,
        }
        return Trained(delta=delta, examples=len(rows), steps=steps, metrics=metrics)

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """The random numbers of a job; the caller's own go on as before afterwards."""
        device = self.base.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


def _tokens(encoded: Encoded) -> int:
    return sum(len(row.tokens) for row in encoded.rows)


def _adamw(parameters: list[torch.Tensor], rate: float, t: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=t.weight_decay)


def _sgd(parameters: list[torch.Tensor], rate: float, t: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=t.momentum, weight_decay=t.weight_decay)


_OPTIMISERS: Final[Mapping[str, Callable[[Any, float, TrainSettings], torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}
