"""What is trained and how; checked when made as far as that can be done without the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from agora.errors import AgoraError, InvalidRequest
from experts.adapters import MAX_RANK
from fed.adapter import Method

MAX_VIRTUAL_TOKENS: Final = 1024
"""Virtual tokens put before a text; published work uses 5 to 200."""

TRAINED_METHODS: Final = (Method.LORA, Method.PREFIX, Method.P_TUNING, Method.PROMPT)


class TrainingFailed(AgoraError):
    """A job's training came to nothing: its loss or its gradients were not finite."""

    code = "training_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What is trained.

    Attributes:
        method: LoRA (Hu et al. 2021), prefix tuning (Li and Liang 2021), P-tuning (Liu et al. 2021, with an MLP as its
            encoder) or prompt tuning (Lester et al. 2021).
        rank: r of LoRA, where a job names no other.
        alpha: α of LoRA.
        rslora: Whether LoRA is scaled by α/√r instead of α/r.
        targets: Layers LoRA changes: ends of their names, or `all-linear` for all but the output head.
        dropout: Share of a layer's inputs that LoRA's training leaves out.
        virtual_tokens: Of prefix, P- and prompt tuning.
        encoder_hidden: Width of P-tuning's encoder.
        init_text: Whose tokens prefix and prompt tuning start from, repeated as needed; empty for random tokens.
    """

    method: Method = Method.LORA
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    virtual_tokens: int = 16
    encoder_hidden: int = 128
    init_text: str = ""

    def __post_init__(self) -> None:
        try:
            method = Method(self.method)
        except ValueError:
            method = Method.DENSE
        if method not in TRAINED_METHODS:
            raise InvalidRequest(
                f"the training method is {str(self.method)!r}; allowed: {', '.join(map(str, TRAINED_METHODS))}"
            )
        _whole("rank", self.rank, 1, MAX_RANK)
        _number("alpha", self.alpha, above=0)
        _whole("virtual_tokens", self.virtual_tokens, 1, MAX_VIRTUAL_TOKENS)
        _whole("encoder_hidden", self.encoder_hidden, 1, 65536)
        if not 0 <= self.dropout < 1:
            raise InvalidRequest(f"dropout is {self.dropout}; allowed: from 0 to below 1")
        if not self.targets:
            raise InvalidRequest("no target layers are named", hint="name some, like q_proj and v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a job is trained.

    Attributes:
        steps: Steps of a job that names no other number; None for `epochs`.
        epochs: Passes over the client's rows.
        batch: Rows of a step; all of them where a client has fewer.
        learning_rate: The highest of a job; None for the method's own.
        optimiser: `adamw` (Loshchilov and Hutter 2019) or `sgd`. Its state is fresh for every job.
        momentum: Of `sgd`.
        weight_decay: Of `adamw`. Not 0.01 as usual: what it takes away would travel as if it had been learned.
        warmup: Steps over which the rate rises to its highest.
        decay: What the rate does then: `constant`, or `linear` down to nothing at the job's end.
        clip: Highest L2 norm of a step's gradient; None for any.
        mu: μ of FedProx (Li et al. 2020, arXiv 1812.06127): μ/2·‖w − w_start‖² is added to the loss. 0 is FedAvg.
        freeze_a: Whether LoRA's A stays as it came, as in FFA-LoRA (Sun et al. 2024, arXiv 2403.12313).
        bf16: Whether the model computes in bfloat16 (the adapter and its gradients stay float32).
        max_tokens: Longest row. A longer response is cut; a row whose prompt alone is longer is left out.
        chat: Whether texts go through the tokenizer's chat template; None for free-text rows where there is one, and
            not for rows with label words, whose prompts are whole as they stand.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 16
    learning_rate: float | None = None
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup: int = 0
    decay: Literal["constant", "linear"] = "constant"
    clip: float | None = 1.0
    mu: float = 0.0
    freeze_a: bool = False
    bf16: bool = False
    max_tokens: int = 512
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            _whole("steps", self.steps, 1, 10**9)
        _whole("batch", self.batch, 1, 2**20)
        _whole("max_tokens", self.max_tokens, 2, 2**24)
        _whole("warmup", self.warmup, 0, 10**9)
        _number("epochs", self.epochs, above=0)
        for name in ("learning_rate", "clip"):
            if (value := getattr(self, name)) is not None:
                _number(name, value, above=0)
        for name in ("mu", "weight_decay"):
            _number(name, getattr(self, name), least=0)
        if not 0 <= self.momentum < 1:
            raise InvalidRequest(f"momentum is {self.momentum}; allowed: from 0 to below 1")
        for name, allowed in (("optimiser", ("adamw", "sgd")), ("decay", ("constant", "linear"))):
            if getattr(self, name) not in allowed:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")

    def rate(self, step: int, steps: int, highest: float) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return highest * (step + 1) / (self.warmup + 1)
        if self.decay == "linear":
            return highest * (steps - step) / max(1, steps - self.warmup)
        return highest


def _whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"{name} is {value!r}; allowed: whole numbers from {least} to {most}")


def _number(name: str, value: float, *, above: float | None = None, least: float | None = None) -> None:
    low = (above is not None and value <= above) or (least is not None and value < least)
    if not math.isfinite(value) or low:
        raise InvalidRequest(f"{name} is {value!r}; allowed: {f'above {above}' if least is None else f'from {least}'}")
