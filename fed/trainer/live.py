"""The one base model in memory, and whichever client's adapter is on it at the moment."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor

from agora.errors import AdapterError, InvalidRequest
from experts.adapters import MAX_RANK
from fed.adapter import Adapter, Method, Spec, Vector
from fed.trainer.base import BaseModel
from fed.trainer.batches import Batch
from fed.trainer.methods import METHODS, check_rank
from fed.trainer.settings import AdapterSettings


class LiveModel:
    """A base model with adapters of one method on it; LoRA of each rank that is asked for gets its own place.

    Every use starts by putting on an adapter's numbers, so nothing of an earlier one is left. One thread at a time:
    users stay in a `session` from putting on to the last forward pass.

    Args:
        base: The base model. It is changed in place and belongs to this object from now on.
        settings: What is trained.
        threads: CPU threads of a session; None for torch's own.

    Raises:
        InvalidRequest: If the settings do not fit the model: unknown layers, a rank no layer can have, more virtual
            tokens than it can read.
    """

    def __init__(self, base: BaseModel, settings: AdapterSettings, threads: int | None = None) -> None:
        self.base = base
        self.settings = settings
        self.kit = METHODS[settings.method]
        self._lock = threading.RLock()
        self._threads = threads
        self._spec = self.kit.spec(base, settings)
        if settings.method is not Method.LORA and base.context is not None and settings.virtual_tokens >= base.context:
            raise InvalidRequest(
                f"{settings.virtual_tokens} virtual tokens for a model that reads {base.context}",
                hint="take fewer virtual tokens",
            )
        self._model: Any = None
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        self._spec_on: Spec | None = None
        self._at: tuple[Tensor, Tensor] | None = None
        base.model.get_output_embeddings().register_forward_pre_hook(self._pick)

    @contextmanager
    def session(self) -> Iterator[None]:
        """The model for this thread alone; sessions of one thread may lie in each other."""
        with self._lock:
            before = torch.get_num_threads()
            if self._threads is not None:
                torch.set_num_threads(self._threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the adapter takes of the model's context."""
        return 0 if self._spec.method is Method.LORA else self.settings.virtual_tokens

    def spec(self, rank: int | None = None) -> Spec:
        """The spec of adapters, of LoRA with another rank.

        Raises:
            InvalidRequest: If no adapter here can have that rank.
        """
        if rank is None or rank == self._spec.rank:
            return self._spec
        if self._spec.method is not Method.LORA:
            raise InvalidRequest(f"rank {rank} for {self._spec.method}, which has none; allowed: None")
        if not 1 <= rank <= MAX_RANK:
            raise InvalidRequest(f"rank {rank}; allowed: whole numbers from 1 to {MAX_RANK}")
        spec = self._spec.at_rank(rank)
        check_rank(spec)
        return spec

    def initial(self, seed: int, rank: int | None = None) -> Adapter:
        """The adapter a federation starts from; the same for the same seed."""
        spec = self.spec(rank)
        with self.session(), torch.no_grad():
            tensors = self.kit.initial(self.base, self.settings, spec, np.random.default_rng(seed))
        return Adapter.from_tensors(spec, tensors)

    def put_on(self, adapter: Adapter, *, train: bool, freeze_a: bool = False) -> list[Tensor]:
        """Gives the model an adapter's numbers.

        Args:
            adapter: Of a spec that this model can have.
            train: Whether to train it; else its dropout is off.
            freeze_a: Whether LoRA's A is not trained.

        Returns:
            The parameters to train, in the order of the spec.

        Raises:
            AdapterError: If the adapter is for another base model, method or shape.
        """
        rank = adapter.spec.rank if self._spec.method is Method.LORA else None
        expected = self._spec if adapter.spec.method is not self._spec.method else self.spec(rank)
        if adapter.spec != expected or list(adapter.spec.shapes) != list(expected.shapes):
            raise AdapterError(_difference(adapter.spec, expected))
        tensors = self._place(expected)
        with torch.no_grad():
            for name, tensor in tensors.items():
                # copy(): torch warns of arrays that may not be written to, which versions may be.
                tensor.copy_(torch.from_numpy(adapter[name].copy()).view(tensor.shape))
                tensor.grad = None
                tensor.requires_grad_(train and not (freeze_a and name.endswith(".lora_A")))
        self._model.train(train)
        self._spec_on = expected
        return [t for t in tensors.values() if t.requires_grad]

    def take(self) -> Vector:
        """The numbers now on the model, shape (spec.size,)."""
        assert self._spec_on is not None, "no adapter was put on"
        tensors = self._tensors[_name(self._spec_on)]
        return np.concatenate([t.detach().float().cpu().numpy().ravel() for t in tensors.values()])

    def logits(self, batch: Batch) -> Tensor:
        """Logits at the places of a batch that count, shape (places, vocabulary), float32.

        The output head, a fifth of a small model, runs on those alone. Rows are filled up on the right, where no token
        before can see it, so that no mask is needed and virtual tokens stand right before the text.
        """
        device = self.base.device
        # From the end: some methods put virtual tokens before the text.
        self._at = (batch.rows.to(device), (batch.places - batch.ids.shape[1]).to(device))
        try:
            out = self._model(input_ids=batch.ids.to(device), use_cache=False)
        finally:
            self._at = None
        logits: Tensor = out.logits
        return logits.float()

    @contextmanager
    def without(self) -> Iterator[None]:
        """The base model alone."""
        self._place(self._spec)
        self._model.eval()
        with self._model.disable_adapter():
            yield

    def _pick(self, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._at is None:
            return None
        return (args[0][self._at], *args[1:])

    def _place(self, spec: Spec) -> Mapping[str, Tensor]:
        """The parameters for adapters of a spec, made when first asked for, and switched to."""
        name = _name(spec)
        if name not in self._tensors:
            config = self.kit.config(self.base, spec, self.settings)
            # What peft draws at first is overwritten, but must not move the caller's random numbers.
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                # peft asks transformers by a name that it is about to drop.
                warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
                try:
                    if self._model is None:
                        self._model = get_peft_model(self.base.model, config, adapter_name=name)
                    else:
                        self._model.add_adapter(name, config)
                except (ValueError, AttributeError, TypeError) as e:
                    raise InvalidRequest(
                        f"peft cannot put {spec.method} on {type(self.base.model).__name__}: {e}",
                        hint="choose another method or other targets",
                    ) from e
            tensors = self.kit.parameters(self._model, name, spec)
            for tensor, slot in spec.slots.items():
                if tensors[tensor].numel() != slot.size:
                    raise InvalidRequest(
                        f"{spec.method} on {type(self.base.model).__name__} has a tensor of "
                        f"{tuple(tensors[tensor].shape)} where {slot.shape} was expected",
                        hint="choose another method: this one needs layers that are all alike",
                    )
            self._tensors[name] = {tensor: tensors[tensor] for tensor in spec.shapes}
        if self._model.active_adapter != name:
            self._model.set_adapter(name)
        return self._tensors[name]


def _name(spec: Spec) -> str:
    return f"rank{spec.rank}"


def _difference(seen: Spec, expected: Spec) -> str:
    for what in ("method", "base", "rank", "alpha", "rslora"):
        there, here = getattr(seen, what), getattr(expected, what)
        if there != here:
            return f"the adapter's {what} is {str(there)!r}; this model trains {str(here)!r}"
    for name in [*seen.shapes, *expected.shapes]:
        if seen.shapes.get(name) != expected.shapes.get(name):
            return (
                f"the adapter's tensor {name!r} is {seen.shapes.get(name)}; this model has {expected.shapes.get(name)}"
            )
    return "the adapter's tensors are in another order than this model's"
