"""The base model of a federation, loaded once for all clients that train on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from agora.errors import InvalidRequest, ModelError
from experts.engine.text import Codec
from experts.loading import loading
from fed.trainer.fingerprint import fingerprint

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Formats the frozen weights can be kept in; what is trained is always float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A frozen causal language model with its tokenizer.

    Attributes:
        folder: Where it came from.
        fingerprint: See `fed.trainer.fingerprint`.
        model: Of transformers, frozen.
        tokenizer: Of transformers.
        codec: The tokenizer, with what agora's engine needs of it.
        context: Tokens it can read; None if it does not say.
    """

    folder: Path
    fingerprint: str
    model: Any
    tokenizer: Any
    codec: Codec
    context: int | None

    @classmethod
    def load(cls, folder: Path, *, dtype: str = "float32", device: str = "cpu") -> BaseModel:
        """Loads a model folder. Code in it is never run.

        Args:
            folder: In the layout of transformers: config.json, safetensors, tokenizer.
            dtype: One of `DTYPES`.
            device: `cpu`, `cuda`, `cuda:1`, …

        Raises:
            InvalidRequest: If `dtype` or `device` is none of these.
            ModelError: If the folder holds no usable causal language model.
        """
        if dtype not in DTYPES:
            raise InvalidRequest(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        where = _device(device)
        told = fingerprint(folder)
        with loading(folder):
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if lacking := sorted(map(str, report.get("missing_keys", ()))):
            # They would be filled with random numbers.
            raise ModelError(f"the model in {folder} lacks {len(lacking)} of its weights, the first is {lacking[0]}")
        if model.get_output_embeddings() is None or model.get_input_embeddings() is None:
            raise ModelError(f"{type(model).__name__} in {folder} has no output head; a causal language model has one")
        model = model.to(where).eval().requires_grad_(False)
        context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(
            folder=folder,
            fingerprint=told,
            model=model,
            tokenizer=tokenizer,
            codec=Codec(tokenizer, vocabulary=model.get_input_embeddings().num_embeddings),
            context=context,
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        found: torch.device = self.model.device
        return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"device is {name!r}; allowed: cpu, cuda, cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices",
            hint="use cpu, or a torch build with CUDA on a machine with a GPU",
        )
    return device
