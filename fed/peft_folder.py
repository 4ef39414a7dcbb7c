"""Adapters as folders that `PeftModel.from_pretrained` loads, and back.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as peft writes them. For prefix, P- and prompt
tuning peft keeps only what the model reads in the end. P-tuning's encoder, which made it and is what is trained, goes
into a file of its own beside them, which peft passes over.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import AdapterError
from experts.adapters import CONFIG_FILE, MAX_CONFIG_BYTES, PICKLES, WEIGHTS_FILE, LoadedAdapter, read_adapter
from experts.integrity import sync_folder
from fed.adapter import A, Adapter, B, LayerSize, Method, Spec
from fed.trainer.methods import EMBEDDING, ENCODER, PREFIX, PROMPT, natural, p_tuning_config, prefix_config

ENCODER_FILE: Final = "prompt_encoder.safetensors"
"""P-tuning's encoder."""

SOFT_PROMPT: Final = "prompt_embeddings"
"""peft's one tensor of prefix, P- and prompt tuning."""

FINGERPRINT_KEY: Final = "agora_base"
"""Metadata of the weights' file: the fingerprint of the base model."""

MAX_PROMPT_BYTES: Final = 2**30
"""Size of prefix, P- and prompt tuning's files; 1,024 virtual tokens on an 8B model are 0.27 GB."""

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest safetensors header; the limit of the format's own reader."""

KINDS: Final[Mapping[Method, str]] = {
    Method.LORA: "LORA",
    Method.PREFIX: "PREFIX_TUNING",
    Method.P_TUNING: "P_TUNING",
    Method.PROMPT: "PROMPT_TUNING",
}
"""peft's word for each method."""

_PREFIX_OF_KEYS: Final = "base_model.model."

Tensors = dict[str, NDArray[np.float32]]


def write_folder(adapter: Adapter, folder: Path, *, base: str | Path | None = None, transposed: bool = False) -> Path:
    """Writes an adapter as a folder for peft; all of it or nothing.

    Args:
        adapter: Of any method but plain tensors.
        folder: Which must not be there yet, or be empty: what is published is not changed.
        base: What the folder says its base model is: a folder or a hub id; None for nothing.
        transposed: Whether LoRA's layers keep their weight as (inputs, outputs), as GPT-2 does.

    Returns:
        The folder.

    Raises:
        AdapterError: If the adapter is of plain tensors or not finite, or the folder is not empty or cannot be written.
    """
    if adapter.spec.method not in KINDS:
        raise AdapterError(f"an adapter of {adapter.spec.method} tensors has no form in peft")
    if not np.isfinite(adapter.flat).all():
        raise AdapterError("the adapter holds a value that is not finite", hint="train it again")
    tensors, config = _WRITERS[adapter.spec.method](adapter)
    config |= {"base_model_name_or_path": None if base is None else str(base), "inference_mode": True}
    if transposed:
        config["fan_in_fan_out"] = True
    files = {WEIGHTS_FILE: tensors}
    if adapter.spec.method is Method.P_TUNING:
        files[ENCODER_FILE] = dict(adapter.tensors())
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise AdapterError(f"{folder} is there already", hint="write to another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _save(work, files, config, adapter.spec.base)
            work.chmod(0o755)
            work.replace(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except OSError as e:
        raise AdapterError(f"{folder} cannot be written: {e.strerror}") from None
    return folder


def read_folder(folder: Path, *, like: Spec | None = None) -> Adapter:
    """Reads a folder that peft or `write_folder` wrote.

    Args:
        folder: Where it is.
        like: What it must be; None for whatever it is. A folder that does not tell its base model passes for any.

    Raises:
        AdapterError: If files are missing, too large, damaged, pickles, or hold what is not finite; if LoRA has several
            ranks or scalings; if P-tuning's encoder is not there; or it is not what `like` says.
    """
    kind = _config(folder).get("peft_type")
    methods = {told: method for method, told in KINDS.items()}
    if kind not in methods:
        raise AdapterError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}; allowed: {', '.join(methods)}")
    adapter = _READERS[methods[kind]](folder)
    if like is None:
        return adapter
    spec = adapter.spec
    if not spec.base:
        spec = Spec.from_json(spec.to_json() | {"base": like.base})
    if spec != like:
        for what in ("method", "base", "rank", "alpha", "rslora"):
            if getattr(spec, what) != getattr(like, what):
                raise AdapterError(
                    f"{folder}: {what} is {str(getattr(spec, what))!r}; expected {str(getattr(like, what))!r}"
                )
        odd = sorted(n for n in {*spec.shapes, *like.shapes} if spec.shapes.get(n) != like.shapes.get(n))[0]
        raise AdapterError(f"{folder}: {odd!r} is {spec.shapes.get(odd)}; expected {like.shapes.get(odd)}")
    return Adapter.from_tensors(like, dict(adapter.tensors()))


# -- Writing


def _save(work: Path, files: Mapping[str, Tensors], config: Mapping[str, Any], base: str) -> None:
    from safetensors.numpy import save

    for name, tensors in files.items():
        whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        (work / name).write_bytes(_ordered(save(whole, metadata={"format": "pt", FINGERPRINT_KEY: base})))
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (work / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    sync_folder(work)


def _ordered(data: bytes) -> bytes:
    """The same file with its free words in order: safetensors writes them in another one each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _plain(value: object) -> Any:
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} in peft's config")


def _write_lora(adapter: Adapter) -> tuple[Tensors, dict[str, Any]]:
    from peft import LoraConfig

    spec = adapter.spec
    tensors = {f"{_PREFIX_OF_KEYS}{name}.weight": value for name, value in adapter.tensors()}
    alpha = int(spec.alpha) if spec.alpha.is_integer() else spec.alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=alpha,  # type: ignore[arg-type, unused-ignore]
        use_rslora=spec.rslora,
        target_modules=list(spec.layers),
    ).to_dict()
    # A set has no order of its own, and the same adapter should give the same file.
    return tensors, config | {"target_modules": list(spec.layers)}


def _write_prompt(adapter: Adapter) -> tuple[Tensors, dict[str, Any]]:
    from peft import PromptTuningConfig

    n, hidden = adapter.spec.shapes[PROMPT]
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=n, token_dim=hidden, num_transformer_submodules=1
    )
    return {SOFT_PROMPT: adapter[PROMPT]}, config.to_dict()


def _write_p_tuning(adapter: Adapter) -> tuple[Tensors, dict[str, Any]]:
    """What the encoder makes of its embedding, by peft's own encoder."""
    import torch
    from peft import PromptEncoder

    config = p_tuning_config(adapter.spec)
    with torch.random.fork_rng(devices=[]):
        encoder = PromptEncoder(config)
    encoder.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in adapter.tensors()})
    with torch.no_grad():
        made = encoder(torch.arange(config.num_virtual_tokens)[None])[0].numpy()
    return {SOFT_PROMPT: made}, config.to_dict()


def _write_prefix(adapter: Adapter) -> tuple[Tensors, dict[str, Any]]:
    prefix = adapter[PREFIX]
    return {SOFT_PROMPT: prefix.reshape(len(prefix), -1)}, prefix_config(adapter.spec).to_dict()


_WRITERS: Final[Mapping[Method, Callable[[Adapter], tuple[Tensors, dict[str, Any]]]]] = {
    Method.LORA: _write_lora,
    Method.PROMPT: _write_prompt,
    Method.P_TUNING: _write_p_tuning,
    Method.PREFIX: _write_prefix,
}


# -- Reading


def _read_lora(folder: Path) -> Adapter:
    loaded = read_adapter(folder, None)
    settings = loaded.settings
    _check_uniform(folder, loaded)
    found: Tensors = {}
    layers: dict[str, LayerSize] = {}
    for key, tensor in loaded.tensors.items():
        name = key.removeprefix(_PREFIX_OF_KEYS).removesuffix(".weight")
        found[name] = tensor.float().numpy()
    for layer in sorted({name.rpartition(".")[0] for name in found}, key=natural):
        layers[layer] = LayerSize(found[f"{layer}.{A}"].shape[1], found[f"{layer}.{B}"].shape[0])
    spec = Spec.lora(
        layers,
        rank=loaded.info.rank,
        alpha=float(settings.alpha),
        rslora=settings.rslora,
        base=_metadata(folder / WEIGHTS_FILE).get(FINGERPRINT_KEY, ""),
    )
    return Adapter.from_tensors(spec, found)


def _check_uniform(folder: Path, loaded: LoadedAdapter) -> None:
    ranks = {loaded.settings.rank_of(module) for module in loaded.info.modules}
    alphas = {loaded.settings.alpha, *loaded.settings.alpha_pattern.values()}
    for what, values in (("rank", ranks), ("alpha", alphas)):
        if len(values) > 1:
            raise AdapterError(
                f"{folder} has layers of {what} {', '.join(f'{v:g}' for v in sorted(values))}; "
                f"a federation's adapter has one {what}",
                hint=f"train it without {what}_pattern",
            )


def _read_prompt(folder: Path) -> Adapter:
    prompt, base = _soft_prompt(folder)
    return Adapter.from_tensors(
        Spec(method=Method.PROMPT, base=base, rank=len(prompt), shapes={PROMPT: prompt.shape}), {PROMPT: prompt}
    )


def _read_p_tuning(folder: Path) -> Adapter:
    made, _ = _soft_prompt(folder)
    path = folder / ENCODER_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} holds no {ENCODER_FILE}, without which P-tuning cannot be gone on with",
            hint="peft keeps only what the encoder made; that can be used, and trained further as prompt tuning",
        )
    found = _load(path)
    names = [EMBEDDING, *(f"{layer}.{kind}" for layer in ENCODER for kind in ("weight", "bias"))]
    if set(found) != set(names):
        raise AdapterError(f"{path} holds other tensors than an encoder of three layers has")
    first, second, third = (f"{layer}.weight" for layer in ENCODER)
    n, hidden = made.shape
    width = len(found[f"{ENCODER[0]}.bias"])
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (n, hidden)}
    expected |= {first: (width, hidden), second: (width, width), third: (hidden, width)}
    expected |= {f"{ENCODER[0]}.bias": (width,), f"{ENCODER[1]}.bias": (width,), f"{ENCODER[2]}.bias": (hidden,)}
    for name in names:
        if found[name].shape != expected[name]:
            raise AdapterError(f"{path}: {name!r} is {found[name].shape}; expected {expected[name]}")
    spec = Spec(
        method=Method.P_TUNING,
        base=_metadata(path).get(FINGERPRINT_KEY, ""),
        rank=n,
        shapes={name: found[name].shape for name in names},
    )
    return Adapter.from_tensors(spec, found)


def _read_prefix(folder: Path) -> Adapter:
    prompt, base = _soft_prompt(folder)
    config = _config(folder)
    layers, heads = (_count(folder, config, key) for key in ("num_layers", "num_attention_heads"))
    if prompt.shape[1] % (2 * layers * heads):
        raise AdapterError(
            f"{folder}: a prefix of {prompt.shape[1]} numbers a token is no {layers} layers of keys and values with "
            f"{heads} heads"
        )
    shape = (len(prompt), layers, 2, heads, prompt.shape[1] // (2 * layers * heads))
    spec = Spec(method=Method.PREFIX, base=base, rank=len(prompt), shapes={PREFIX: shape})
    return Adapter.from_tensors(spec, {PREFIX: prompt.reshape(shape)})


_READERS: Final[Mapping[Method, Callable[[Path], Adapter]]] = {
    Method.LORA: _read_lora,
    Method.PROMPT: _read_prompt,
    Method.P_TUNING: _read_p_tuning,
    Method.PREFIX: _read_prefix,
}


def _soft_prompt(folder: Path) -> tuple[NDArray[np.float32], str]:
    """The one tensor of a soft prompt, shape (virtual tokens, numbers a token), and its base model's fingerprint."""
    found = _load(folder / WEIGHTS_FILE)
    if set(found) != {SOFT_PROMPT} or found[SOFT_PROMPT].ndim != 2:
        told = ", ".join(f"{name!r} of shape {value.shape}" for name, value in list(found.items())[:3])
        raise AdapterError(f"{folder / WEIGHTS_FILE} holds {told}; allowed: {SOFT_PROMPT!r}, two-dimensional")
    prompt = found[SOFT_PROMPT]
    if (n := _count(folder, _config(folder), "num_virtual_tokens")) != len(prompt):
        raise AdapterError(f"{folder}: {len(prompt)} virtual tokens in {WEIGHTS_FILE}, but {n} by {CONFIG_FILE}")
    return prompt, _metadata(folder / WEIGHTS_FILE).get(FINGERPRINT_KEY, "")


def _config(folder: Path) -> dict[str, Any]:
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as e:
        raise AdapterError(f"adapter folder {folder} cannot be read: {e.strerror}") from None
    if pickled := [n for n in names if Path(n).suffix.lower() in PICKLES]:
        raise AdapterError(f"{folder} holds {pickled[0]}, a format that can run code when it is read")
    path = folder / CONFIG_FILE
    try:
        config = json.loads(_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"{path} is not JSON: {e}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold an object, not {type(config).__name__}")
    return config


def _count(folder: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{folder / CONFIG_FILE}: {key} is {value!r}; allowed: whole numbers from 1")
    return value


def _load(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(_bounded(path, MAX_PROMPT_BYTES))
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise AdapterError(f"{path} is damaged: {e}", hint="copy or train the adapter again") from None
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{path}: {name!r} has type {tensor.dtype}; allowed: floating point")
        found[name] = tensor.float().numpy()
        if not np.isfinite(found[name]).all():
            raise AdapterError(f"{path}: {name!r} holds a value that is not finite", hint="train the adapter again")
    return found


def _bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as e:
        raise AdapterError(f"{path} cannot be read: {e.strerror}") from None
    if len(data) > limit:
        raise AdapterError(f"{path} is larger than {limit:,} bytes, the most that is read")
    return data


def _metadata(path: Path) -> Mapping[str, str]:
    """The free words in a safetensors header; the file itself was read and found sound."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise AdapterError(f"{path} is damaged: a header of {size:,} bytes")
        told = json.loads(file.read(size)).get("__metadata__")
    return told if isinstance(told, dict) else {}
