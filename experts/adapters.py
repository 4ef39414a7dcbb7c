"""LoRA adapters on disk: read without trust, and checked against the base model before anything touches it.

An adapter is a folder as peft saves it, of which two files count: `adapter_config.json` and
`adapter_model.safetensors`.
It computes W·x + s·B·A·x with s = α/r, or α/√r for rank-stabilised LoRA (Hu et al., 2021; Kalajdzievski, 2023).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agora.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

MAX_CONFIG_BYTES: Final = 2**20
"""Size of adapter_config.json; peft writes about 1 KB."""

MAX_WEIGHTS_BYTES: Final = 4 * 2**30
"""Size of the weights; rank 256 on every layer of an 8B model is 2.7 GB in bfloat16."""

MAX_RANK: Final = 256
"""Highest rank; past it an adapter costs more than it saves, and vLLM serves at most 512."""

PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
"""File endings of formats that can run code when they are read."""

UNSUPPORTED: Final = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""Settings of peft that must be unset: they change more than s·B·A, or cannot differ from row to row of a batch."""

CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of starting the training that change the base weights too, so that B·A alone is not the adapter."""

DIFFERENCES_TOLD: Final = 3
"""Layers named in an error about an adapter that does not fit."""

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A linear layer's size; `transposed` if it keeps its weight as (inputs, outputs), as GPT-2 does."""

    inputs: int
    outputs: int
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What an adapter is.

    Attributes:
        rank: Highest rank of its layers.
        modules: Names of the layers it changes, in the base model's words.
        parameters: Numbers in it.
        sha256: Of the weights file.
        config_sha256: Of the config file: α and r are part of what an adapter does.
        base_model: The base model it says it was trained on; told, not trusted.
    """

    rank: int
    modules: tuple[str, ...]
    parameters: int
    sha256: str
    config_sha256: str
    base_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The part of peft's config that says what the weights mean.

    Attributes:
        rank: r, where `rank_pattern` says nothing else.
        alpha: α, where `alpha_pattern` says nothing else.
        rslora: Whether s is α/√r instead of α/r.
        rank_pattern: r by regular expression over layer names.
        alpha_pattern: α by regular expression over layer names.
        fan_in_fan_out: Whether the layers keep their weight as (inputs, outputs).
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def rank_of(self, module: str) -> int:
        """r of a layer, by peft's own rule: the first pattern that matches the end of its name."""
        for pattern, rank in self.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return rank
        return self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """A checked adapter in memory; `tensors` are named as in its file."""

    info: AdapterInfo
    settings: LoraSettings
    tensors: Mapping[str, Tensor]


def layer_shapes(model: nn.Module) -> dict[str, LayerShape]:
    """The linear layers of a model that an adapter may change, by name, adapters already on it looked through.

    The output head is not among them: it runs on fewer tokens than the rest.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    shapes = {}
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")
        if module is head or ".lora_" in name:
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = LayerShape(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = LayerShape(module.nx, module.nf, transposed=True)
    return shapes


def check_adapter(folder: Path, model: nn.Module | Mapping[str, LayerShape] | None) -> AdapterInfo:
    """Checks that a folder holds an adapter for this base model, all of it finite; see `read_adapter`.

    Args:
        folder: Where the adapter is.
        model: The base model, or its `layer_shapes`; None where it is elsewhere, so that the fit cannot be checked.

    Raises:
        AdapterError: If anything is wrong with it.
    """
    return read_adapter(folder, model).info


def read_adapter(folder: Path, model: nn.Module | Mapping[str, LayerShape] | None) -> LoadedAdapter:
    """Reads an adapter and checks it against its base model.

    What is checked is what is returned: the files are read once.

    Args:
        folder: Where the adapter is.
        model: The base model, or its `layer_shapes`; None where it is elsewhere, so that the fit cannot be checked.

    Raises:
        AdapterError: If files are missing, too large, damaged or pickles; if the adapter is of another kind than plain
            LoRA; if its layers, shapes or ranks are not the base model's; if a weight is not finite.
    """
    shapes = model if model is None or isinstance(model, Mapping) else layer_shapes(model)
    config_bytes, weight_bytes = _read(folder)
    config = _parse(folder, config_bytes)
    settings = _settings(folder, config)
    tensors = _tensors(folder, weight_bytes)
    modules = _modules(folder, tensors)
    _check_fit(folder, modules, settings, shapes, config)
    _check_values(folder, tensors)
    info = AdapterInfo(
        rank=max(pair["A"].shape[0] for pair in modules.values()),
        modules=tuple(sorted(modules)),
        parameters=sum(t.numel() for t in tensors.values()),
        sha256=hashlib.sha256(weight_bytes).hexdigest(),
        config_sha256=hashlib.sha256(config_bytes).hexdigest(),
        base_model=str(config.get("base_model_name_or_path") or ""),
    )
    return LoadedAdapter(info=info, settings=settings, tensors=tensors)


def _read(folder: Path) -> tuple[bytes, bytes]:
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as e:
        raise AdapterError(f"adapter folder {folder} cannot be read: {e.strerror}") from None
    if pickled := [n for n in names if Path(n).suffix.lower() in PICKLES]:
        raise AdapterError(
            f"{folder} holds {pickled[0]}, a format that can run code when it is read",
            hint=f"keep only {CONFIG_FILE} and {WEIGHTS_FILE}; peft saves them with safe_serialization=True",
        )
    if missing := [n for n in (CONFIG_FILE, WEIGHTS_FILE) if n not in names]:
        raise AdapterError(
            f"{folder} holds no {' and no '.join(missing)}",
            hint="an adapter is a folder as peft's save_pretrained writes it",
        )
    return _bounded(folder / CONFIG_FILE, MAX_CONFIG_BYTES), _bounded(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES)


def _bounded(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():
            raise AdapterError(f"{path} is no file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as e:
        raise AdapterError(f"{path} cannot be read: {e.strerror}") from None
    if len(data) > limit:
        raise AdapterError(f"{path} is larger than {limit:,} bytes, the most that is read")
    return data


def _parse(folder: Path, data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"{folder / CONFIG_FILE} is not JSON: {e}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG_FILE} must hold an object, not {type(config).__name__}")
    return config


def _settings(folder: Path, config: Mapping[str, Any]) -> LoraSettings:
    where = folder / CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type is {config.get('peft_type')!r}; allowed: 'LORA'")
    if odd := [name for name in UNSUPPORTED if config.get(name)]:
        raise AdapterError(f"{where} sets {', '.join(odd)}, which cannot be served", hint="train plain LoRA")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{where}: bias is {config['bias']!r}; allowed: 'none'")
    start = str(config.get("init_lora_weights", "")).lower().replace("-", "_")
    if start.startswith(CHANGES_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base model too",
            hint="save it with peft's path_initial_model_for_weight_conversion",
        )
    return LoraSettings(
        rank=_rank(where, "r", config.get("r")),
        alpha=_number(where, "lora_alpha", config.get("lora_alpha")),
        rslora=bool(config.get("use_rslora")),
        rank_pattern={k: _rank(where, f"rank_pattern[{k!r}]", v) for k, v in _pattern(where, config, "rank_pattern")},
        alpha_pattern={
            k: _number(where, f"alpha_pattern[{k!r}]", v) for k, v in _pattern(where, config, "alpha_pattern")
        },
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _rank(where: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{where}: {key} is {value!r}; allowed: whole numbers from 1 to {MAX_RANK}")
    return value


def _number(where: Path, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(f"{where}: {key} is {value!r}; allowed: finite numbers")
    return value


def _pattern(where: Path, config: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{where}: {key} is {pattern!r}; allowed: an object")
    for expression in pattern:
        # peft reads the keys as regular expressions; a wild one could take for ever on every layer's name.
        if not re.fullmatch(r"\^?[A-Za-z0-9_.\\|()\[\]-]{1,200}\$?", expression):
            raise AdapterError(f"{where}: {key} has the key {expression!r}; allowed: names of layers")
        try:
            re.compile(expression)
        except re.error as e:
            raise AdapterError(f"{where}: {key} has the key {expression!r}: {e}") from None
    return list(pattern.items())


def _tensors(folder: Path, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise AdapterError(f"{folder / WEIGHTS_FILE} is damaged: {e}", hint="copy or train the adapter again") from None
    if not tensors:
        raise AdapterError(f"{folder / WEIGHTS_FILE} holds no weights")
    return tensors


def _modules(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The A and B of each layer."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None or tensor.ndim != 2:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE} holds {key!r} of shape {list(tensor.shape)}; "
                "allowed: '<layer>.lora_A.weight' and '<layer>.lora_B.weight', two-dimensional"
            )
        modules.setdefault(found["module"], {})[found["side"]] = tensor
    for module, pair in modules.items():
        if len(pair) != 2:
            raise AdapterError(f"{folder / WEIGHTS_FILE} holds only one half of the adapter of {module!r}")
    return modules


def _check_fit(
    folder: Path,
    modules: Mapping[str, Mapping[str, Tensor]],
    settings: LoraSettings,
    shapes: Mapping[str, LayerShape] | None,
    config: Mapping[str, Any],
) -> None:
    differences = []
    for module, pair in sorted(modules.items()):
        (rank, inputs), (outputs, rank_b) = pair["A"].shape, pair["B"].shape
        if rank != rank_b or rank != settings.rank_of(module):
            raise AdapterError(
                f"{folder}: rank of {module!r} is {rank} in lora_A and {rank_b} in lora_B, but "
                f"{settings.rank_of(module)} by {CONFIG_FILE}",
                hint="config and weights belong to different adapters",
            )
        if shapes is None:
            continue
        base = shapes.get(module)
        if base is None:
            differences.append(f"the base model has no layer {module!r} that an adapter may change")
        elif (base.inputs, base.outputs) != (inputs, outputs):
            differences.append(f"{module!r} is {inputs}→{outputs} here and {base.inputs}→{base.outputs} there")
        elif base.transposed != settings.fan_in_fan_out:
            differences.append(f"{module!r} needs fan_in_fan_out={base.transposed} here")
    if differences:
        said = config.get("base_model_name_or_path")
        told = "; ".join(differences[:DIFFERENCES_TOLD])
        more = f"; and {len(differences) - DIFFERENCES_TOLD} more" if len(differences) > DIFFERENCES_TOLD else ""
        raise AdapterError(
            f"the adapter in {folder} is for another base model: {told}{more}",
            hint=f"it says it was trained on {said!r}" if said else "use it with the model it was trained on",
        )


def _check_values(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    import torch

    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{folder}: {key!r} has type {tensor.dtype}; allowed: floating point")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{folder}: {key!r} holds a value that is not finite", hint="train the adapter again")
