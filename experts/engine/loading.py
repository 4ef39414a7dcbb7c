"""From a model folder to a `Runner` and a `Codec`, with everything checked that can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from agora.errors import AgoraError, InvalidRequest, ModelError
from experts.adapters import layer_shapes
from experts.engine import attention
from experts.engine.attention import Chunk, Run, Step, Write
from experts.engine.cache import CacheShape, Lane
from experts.engine.facts import ModelFacts
from experts.engine.packed import can_pack, pack
from experts.engine.runner import Runner
from experts.engine.text import Codec
from experts.loading import loading

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Number formats a model can be loaded in."""

AGREEMENT: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference between the model's own logits and the engine's on the check at loading, as a share of the largest
logit. Rounding gave 1e-6 in float32 and 0.02 in bfloat16; a wrong mask or position gives 0.5 and more."""

PROBE_TOKENS: Final = 8
"""Tokens of the check at loading."""

LENGTH_BOUND_ROPE: Final = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change for all rows of a batch when one of them passes the original context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to serve.

    Attributes:
        runner: The model.
        facts: What is known of it.
    """

    runner: Runner
    facts: ModelFacts


def load(folder: Path, *, dtype: str, device: str, max_context: int | None = None) -> LoadedModel:
    """Loads a causal language model and checks that the engine computes what the model does.

    Args:
        folder: In the layout of transformers: config.json, safetensors, tokenizer. Code in it is never run.
        dtype: One of `DTYPES`.
        device: `cpu`, `cuda`, `cuda:1`, …
        max_context: A limit below the model's own, or None.

    Raises:
        InvalidRequest: If `dtype` or `device` is none of these.
        ModelError: If the folder holds no usable model, or one the engine cannot run.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    where = _device(device)
    _check_folder(folder)
    with loading(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_report(folder, report)
    model = model.to(where).eval().requires_grad_(False)
    embeddings = model.get_input_embeddings().num_embeddings
    codec = Codec(tokenizer, vocabulary=embeddings)
    text_config = config.get_text_config()
    layers = layer_shapes(model)
    limits = [n for n in (_max_context(text_config), max_context) if n is not None]
    try:
        return LoadedModel(
            runner=_runner(model, DTYPES[dtype], where),
            facts=ModelFacts(
                name=folder.resolve().name,
                codec=codec,
                eos=_eos(model, tokenizer),
                max_context=min(limits, default=None),
                layers=layers,
            ),
        )
    except AgoraError:
        raise
    except Exception as e:
        raise ModelError(
            f"the model in {folder} cannot be run: {type(e).__name__}: {_first_line(e)}",
            hint="`local` runs causal language models of transformers with plain attention layers",
        ) from e


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"device is {name!r}; allowed: cpu, cuda, cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices",
            hint="use device='cpu', or a torch build with CUDA on a machine with a GPU",
        )
    return device


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder", hint="`agora models path ALIAS` tells where a model is")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: there is no config.json in it")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no weights as safetensors, the only format that is read",
            hint="convert them with transformers' save_pretrained",
        )


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """A checkpoint that lacks weights would be filled with random ones."""
    lacking = sorted(str(k) for k in report.get("missing_keys", ()))
    wrong = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report.get("mismatched_keys", ()))
    for what, keys in (("lacks", lacking), ("has wrong shapes for", wrong)):
        if keys:
            raise ModelError(
                f"the model in {folder} {what} {len(keys)} of its weights, the first is {keys[0]}",
                hint="the folder is damaged or its config.json belongs to another model; fetch it again",
            )


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


def _max_context(config: Any) -> int | None:
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_BOUND_ROPE:
        limit = rope.get("original_max_position_embeddings") or limit
    return limit


def _runner(model: Any, dtype: torch.dtype, device: torch.device) -> Runner:
    """Switches the model to the engine's attention and packed weights, and checks that it still says the same."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = [(7 * i + 3) % vocabulary for i in range(PROBE_TOKENS)]
    with torch.inference_mode():
        own = model(input_ids=torch.tensor([tokens], device=device), use_cache=True)
        expected: Tensor = own.logits[0].float()
        shape = _cache_shape(own.past_key_values, dtype, device)
        model.set_attn_implementation(attention.NAME)
        if can_pack(dtype, device):
            pack(model)
        runner = Runner(model, shape)
        seen = _probe(runner, tokens)
    if not torch.isfinite(expected).all():
        raise ModelError("the model's output is not finite", hint="its weights are damaged; fetch it again")
    apart = ((seen - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if not apart <= AGREEMENT[dtype]:
        raise ModelError(
            f"{type(model).__name__} computes something the engine does not: its logits differ by {apart:.1%}",
            hint="serve this model with another backend",
        )
    return runner


def _cache_shape(cache: Any, dtype: torch.dtype, device: torch.device) -> CacheShape:
    layers: list[Any] = list(getattr(cache, "layers", []))
    shapes = {
        tuple(t.shape[1::2]) if isinstance(t := getattr(layer, which, None), Tensor) else None
        for layer in layers
        for which in ("keys", "values")
    }
    if len(shapes) != 1 or (only := next(iter(shapes))) is None:
        raise ModelError("the model has layers without a plain key-value cache, or of different sizes")
    heads, dim = only
    return CacheShape(layers=len(layers), heads=heads, dim=dim, dtype=dtype, device=device)


def _probe(runner: Runner, tokens: list[int]) -> Tensor:
    """Logits at all tokens: a chunk from the start, a chunk that continues it, and single steps."""
    shape = runner.shape
    lane = Lane(shape, len(tokens))
    lane.add()
    logits, start = [], 0
    for end in (3, 6, *range(7, len(tokens) + 1)):
        n = end - start
        step = Step(writes=[Write(0, n, lane, torch.arange(start, end, device=shape.device))])
        if n == 1:
            step.runs.append(Run(0, 1, lane, 0, [end]))
        else:
            step.chunks.append(Chunk(0, n, lane, 0, start))
        logits.append(runner.forward(tokens[start:end], range(start, end), step, range(n)))
        start = end
    return torch.cat(logits)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
