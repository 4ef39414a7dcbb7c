"""How each method is put on a model with peft, which of its parameters are the adapter's tensors, and its start."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor

from agora.errors import InvalidRequest
from experts.adapters import LayerShape, layer_shapes
from fed.adapter import A, B, LayerSize, Method, Spec
from fed.trainer.base import BaseModel
from fed.trainer.settings import AdapterSettings

PROMPT: Final = "prompt"
"""The tensor of prompt tuning, shape (virtual tokens, hidden)."""

PREFIX: Final = "prefix"
"""The tensor of prefix tuning, shape (virtual tokens, layers, 2, key-value heads, head size): keys, then values."""

ENCODER: Final = ("mlp_head.0", "mlp_head.2", "mlp_head.4")
"""Linear layers of P-tuning's encoder, as peft names them."""

EMBEDDING: Final = "embedding.weight"
"""The tensor that P-tuning's encoder reads, shape (virtual tokens, hidden)."""

ALL_LINEAR: Final = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """One method.

    Attributes:
        spec: The spec of its adapters on a base model.
        config: peft's config for adapters of a spec.
        parameters: The parameters of the adapter of that name on a peft model, by tensor name; they have as many
            numbers as the spec's tensors, in the same order.
        initial: The numbers it starts from, by tensor name.
        learning_rate: Where the settings name none. LoRA's is what SST-2 was trained with (DESIGN.md). The others' come
            from 8 steps of 16 phrases there, judged on 64: loss after 1e-3 and 1e-2 was 0.39 and 0.31 with prompt
            tuning, 0.38 and 0.32 with prefix tuning, 0.41 and 0.32 with P-tuning, whose encoder had a rough start with
            the higher one (0.56 while training, against 0.53).
    """

    spec: Callable[[BaseModel, AdapterSettings], Spec]
    config: Callable[[BaseModel, Spec, AdapterSettings], Any]
    parameters: Callable[[Any, str, Spec], Mapping[str, Tensor]]
    initial: Callable[[BaseModel, AdapterSettings, Spec, np.random.Generator], Mapping[str, NDArray[np.floating]]]
    learning_rate: float


def natural(name: str) -> list[str | int]:
    """Sorts `layers.10` after `layers.9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# -- LoRA


def target_layers(model: Any, targets: tuple[str, ...]) -> dict[str, LayerShape]:
    """The layers that are meant by ends of their names, sorted.

    Raises:
        InvalidRequest: If a target is none of the model's layers; it says which there are.
    """
    shapes = layer_shapes(model)
    found: set[str] = set()
    for target in targets:
        matched = {name for name in shapes if target == ALL_LINEAR or name == target or name.endswith(f".{target}")}
        if not matched:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
            raise InvalidRequest(
                f"the model has no linear layer {target!r}; allowed: {ends}", hint=f"or {ALL_LINEAR} for all of them"
            )
        found |= matched
    return {name: shapes[name] for name in sorted(found, key=natural)}


def check_rank(spec: Spec) -> None:
    """Checks that no layer is narrower than the rank.

    Raises:
        InvalidRequest: If one is.
    """
    for name, size in spec.layers.items():
        if spec.rank > min(size.inputs, size.outputs):
            raise InvalidRequest(
                f"rank {spec.rank} on {name}, which is {size.inputs}→{size.outputs}; allowed: up to "
                f"{min(size.inputs, size.outputs)}",
                hint="take a lower rank or other targets",
            )


def _lora_spec(base: BaseModel, settings: AdapterSettings) -> Spec:
    layers = {n: LayerSize(s.inputs, s.outputs) for n, s in target_layers(base.model, settings.targets).items()}
    spec = Spec.lora(layers, rank=settings.rank, alpha=settings.alpha, rslora=settings.rslora, base=base.fingerprint)
    check_rank(spec)
    return spec


def _lora_config(base: BaseModel, spec: Spec, settings: AdapterSettings) -> Any:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        lora_dropout=settings.dropout,
        target_modules=list(spec.layers),
        fan_in_fan_out=transposed(base, spec),
    )


def transposed(base: BaseModel, spec: Spec) -> bool:
    """Whether LoRA's layers keep their weight as (inputs, outputs), as GPT-2 does.

    Raises:
        InvalidRequest: If some do and some do not, which peft has no setting for.
    """
    shapes = layer_shapes(base.model)
    kinds = {shapes[layer].transposed for layer in spec.layers}
    if len(kinds) > 1:
        raise InvalidRequest("some target layers keep their weights transposed and some do not", hint="take fewer")
    return kinds.pop()


def _lora_parameters(model: Any, name: str, spec: Spec) -> Mapping[str, Tensor]:
    base = model.get_base_model()
    found: dict[str, Tensor] = {}
    for layer in spec.layers:
        module = base.get_submodule(layer)
        found[f"{layer}.{A}"] = module.lora_A[name].weight
        found[f"{layer}.{B}"] = module.lora_B[name].weight
    return found


def _lora_initial(
    base: BaseModel, settings: AdapterSettings, spec: Spec, rng: np.random.Generator
) -> Mapping[str, NDArray[np.floating]]:
    """As peft starts it: A uniform in ±1/√inputs (Kaiming with a = √5), B zero, so that nothing changes at first."""
    found: dict[str, NDArray[np.floating]] = {}
    for name, size in spec.layers.items():
        bound = 1 / math.sqrt(size.inputs)
        found[f"{name}.{A}"] = rng.uniform(-bound, bound, (spec.rank, size.inputs))
        found[f"{name}.{B}"] = np.zeros((size.outputs, spec.rank))
    return found


# -- Prompt tuning


def _prompt_spec(base: BaseModel, settings: AdapterSettings) -> Spec:
    n = settings.virtual_tokens
    return Spec(method=Method.PROMPT, base=base.fingerprint, rank=n, shapes={PROMPT: (n, _hidden(base))})


def _prompt_config(base: BaseModel, spec: Spec, settings: AdapterSettings) -> Any:
    n, hidden = spec.shapes[PROMPT]
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, token_dim=hidden)


def _prompt_parameters(model: Any, name: str, spec: Spec) -> Mapping[str, Tensor]:
    return {PROMPT: model.prompt_encoder[name].embedding.weight}


def _prompt_initial(
    base: BaseModel, settings: AdapterSettings, spec: Spec, rng: np.random.Generator
) -> Mapping[str, NDArray[np.floating]]:
    """The embeddings of tokens: better than noise, which the model has never seen (Lester et al. 2021, fig. 3b)."""
    ids = torch.tensor(_start_tokens(base, settings, rng), device=base.device)
    with torch.no_grad():
        return {PROMPT: base.model.get_input_embeddings()(ids).float().cpu().numpy()}


# -- P-tuning


def _p_tuning_spec(base: BaseModel, settings: AdapterSettings) -> Spec:
    n, hidden, width = settings.virtual_tokens, _hidden(base), settings.encoder_hidden
    first, second, third = ENCODER
    shapes = {
        EMBEDDING: (n, hidden),
        f"{first}.weight": (width, hidden),
        f"{first}.bias": (width,),
        f"{second}.weight": (width, width),
        f"{second}.bias": (width,),
        f"{third}.weight": (hidden, width),
        f"{third}.bias": (hidden,),
    }
    return Spec(method=Method.P_TUNING, base=base.fingerprint, rank=n, shapes=shapes)


def p_tuning_config(spec: Spec) -> Any:
    """peft's config of a P-tuning spec."""
    n, hidden = spec.shapes[EMBEDDING]
    width = spec.shapes[f"{ENCODER[0]}.bias"][0]
    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=n,
        token_dim=hidden,
        encoder_hidden_size=width,
        num_transformer_submodules=1,
    )


def _p_tuning_parameters(model: Any, name: str, spec: Spec) -> Mapping[str, Tensor]:
    encoder = model.prompt_encoder[name]
    return {tensor: encoder.get_parameter(tensor) for tensor in spec.shapes}


def _p_tuning_initial(
    base: BaseModel, settings: AdapterSettings, spec: Spec, rng: np.random.Generator
) -> Mapping[str, NDArray[np.floating]]:
    """As torch starts such layers: the embedding normal, each linear layer uniform in ±1/√inputs."""
    found: dict[str, NDArray[np.floating]] = {EMBEDDING: rng.normal(size=spec.shapes[EMBEDDING])}
    for layer in ENCODER:
        shape = spec.shapes[f"{layer}.weight"]
        bound = 1 / math.sqrt(shape[1])
        found[f"{layer}.weight"] = rng.uniform(-bound, bound, shape)
        found[f"{layer}.bias"] = rng.uniform(-bound, bound, shape[0])
    return found


# -- Prefix tuning


def _prefix_spec(base: BaseModel, settings: AdapterSettings) -> Spec:
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or _hidden(base) // config.num_attention_heads
    n = settings.virtual_tokens
    shape = (n, config.num_hidden_layers, 2, heads, size)
    return Spec(method=Method.PREFIX, base=base.fingerprint, rank=n, shapes={PREFIX: shape})


def prefix_config(spec: Spec) -> Any:
    """peft's config of a prefix spec; peft calls the key-value heads attention heads here."""
    n, layers, _, heads, size = spec.shapes[PREFIX]
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=n,
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * size,
        encoder_hidden_size=heads * size,
        num_transformer_submodules=1,
    )


def _prefix_parameters(model: Any, name: str, spec: Spec) -> Mapping[str, Tensor]:
    return {PREFIX: model.prompt_encoder[name].embedding.weight}


def _prefix_initial(
    base: BaseModel, settings: AdapterSettings, spec: Spec, rng: np.random.Generator
) -> Mapping[str, NDArray[np.floating]]:
    """The keys and values of tokens, which Li and Liang (2021, section 7.4) found far better than noise."""
    ids = torch.tensor([_start_tokens(base, settings, rng)], device=base.device)
    with torch.no_grad():
        layers: Any = base.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values.layers
    # Each (1, heads, tokens, size); together (tokens, layers, 2, heads, size).
    both = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
    return {PREFIX: both.permute(3, 0, 1, 2, 4).float().cpu().numpy()}


# -- What they share


def _hidden(base: BaseModel) -> int:
    size: int = base.model.get_input_embeddings().embedding_dim
    return size


def _start_tokens(base: BaseModel, settings: AdapterSettings, rng: np.random.Generator) -> list[int]:
    n = settings.virtual_tokens
    if not settings.init_text:
        special = set(base.tokenizer.all_special_ids)
        plain = [i for i in range(min(len(base.tokenizer), base.model.config.vocab_size)) if i not in special]
        return [plain[int(i)] for i in rng.choice(len(plain), size=n)]
    ids = list(base.tokenizer(settings.init_text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise InvalidRequest(f"init_text {settings.init_text!r} comes to no tokens")
    return (ids * math.ceil(n / len(ids)))[:n]


METHODS: Final[Mapping[Method, Kit]] = {
    Method.LORA: Kit(
        spec=_lora_spec,
        config=_lora_config,
        parameters=_lora_parameters,
        initial=_lora_initial,
        learning_rate=1e-3,
    ),
    Method.PROMPT: Kit(
        spec=_prompt_spec,
        config=_prompt_config,
        parameters=_prompt_parameters,
        initial=_prompt_initial,
        learning_rate=1e-2,
    ),
    Method.P_TUNING: Kit(
        spec=_p_tuning_spec,
        config=lambda base, spec, settings: p_tuning_config(spec),
        parameters=_p_tuning_parameters,
        initial=_p_tuning_initial,
        learning_rate=1e-3,
    ),
    Method.PREFIX: Kit(
        spec=_prefix_spec,
        config=lambda base, spec, settings: prefix_config(spec),
        parameters=_prefix_parameters,
        initial=_prefix_initial,
        learning_rate=1e-2,
    ),
}
"""How each method is trained."""
