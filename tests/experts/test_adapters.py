from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from agora.errors import AdapterError
from experts.adapters import (
    CONFIG_FILE,
    MAX_RANK,
    WEIGHTS_FILE,
    LayerShape,
    check_adapter,
    layer_shapes,
    read_adapter,
)

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def shapes(tiny_model: Path) -> dict[str, LayerShape]:
    return layer_shapes(AutoModelForCausalLM.from_pretrained(tiny_model))


@pytest.fixture
def folder(tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tiny_adapters["red@v1"], tmp_path / "adapter")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors = {k: t.clone() for k, t in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def test_says_what_an_adapter_is(folder: Path, shapes: dict[str, LayerShape], tiny_model: Path) -> None:
    info = check_adapter(folder, shapes)
    assert info.rank == 4
    assert info.modules == tuple(
        f"model.layers.{n}.self_attn.{which}" for n in (0, 1) for which in ("q_proj", "v_proj")
    )
    assert info.parameters == 2 * (4 * 64 + 64 * 4 + 4 * 64 + 32 * 4)
    assert info.sha256 == hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert info.config_sha256 == hashlib.sha256((folder / CONFIG_FILE).read_bytes()).hexdigest()
    assert info.base_model == str(tiny_model)


def test_takes_a_model_as_well_as_its_shapes(folder: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert check_adapter(folder, model) == check_adapter(folder, layer_shapes(model))


def test_patterns_of_rank_and_scaling(tiny_adapters: dict[str, Path], shapes: dict[str, LayerShape]) -> None:
    adapter = read_adapter(tiny_adapters["blue@v1"], shapes)
    assert adapter.info.rank == 8
    assert adapter.settings.rank_of("model.layers.1.self_attn.k_proj") == 2
    assert adapter.settings.rank_of("model.layers.1.self_attn.q_proj") == 8
    assert adapter.settings.rslora


def test_readme_and_the_like_do_no_harm(folder: Path, shapes: dict[str, LayerShape]) -> None:
    (folder / "README.md").write_text("An adapter.")
    check_adapter(folder, shapes)


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.PT", "rng_state.pth", "x.pkl"])
def test_pickles_are_refused_even_beside_safetensors(folder: Path, shapes: Any, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x04")
    with pytest.raises(AdapterError, match=r"can run code when it is read"):
        check_adapter(folder, shapes)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder: Path, shapes: Any, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=f"holds no {name}"):
        check_adapter(folder, shapes)


def test_a_folder_that_is_not_there(tmp_path: Path, shapes: Any) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        check_adapter(tmp_path / "nowhere", shapes)


def test_a_directory_in_place_of_a_file(folder: Path, shapes: Any) -> None:
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).mkdir()
    with pytest.raises(AdapterError, match="is no file"):
        check_adapter(folder, shapes)


def test_reading_is_bounded(folder: Path, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.adapters.MAX_WEIGHTS_BYTES", 100)
    with pytest.raises(AdapterError, match="larger than 100 bytes"):
        check_adapter(folder, shapes)


@pytest.mark.parametrize("text", ["{", "[1]", '"LORA"', "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")])
def test_a_config_that_is_no_object(folder: Path, shapes: Any, text: str | bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterError, match=r"is not JSON|must hold an object"):
        check_adapter(folder, shapes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'; allowed: 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "sets use_dora"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"bias": "all"}, "bias is 'all'; allowed: 'none'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model too"),
        ({"r": 0}, f"r is 0; allowed: whole numbers from 1 to {MAX_RANK}"),
        ({"r": MAX_RANK + 1}, f"r is {MAX_RANK + 1}"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; allowed: finite numbers"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\]; allowed: an object"),
        ({"rank_pattern": {"q_proj": 1e9}}, r"rank_pattern\['q_proj'\] is 1000000000.0"),
        ({"rank_pattern": {"(a+)+": 4}}, "allowed: names of layers"),
        ({"alpha_pattern": {"(": 4}}, r"alpha_pattern has the key '\('"),
        ({"r": 8}, "rank of .* is 4 in lora_A and 4 in lora_B, but 8 by adapter_config.json"),
        ({"fan_in_fan_out": True}, "needs fan_in_fan_out=False here"),
    ],
)
def test_settings_that_cannot_be_served(folder: Path, shapes: Any, changes: dict[str, Any], said: str) -> None:
    edit(folder, **changes)
    with pytest.raises(AdapterError, match=said):
        check_adapter(folder, shapes)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "long_header"])
def test_damaged_weights(folder: Path, shapes: Any, damage: str) -> None:
    path = folder / WEIGHTS_FILE
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[: len(data) // 2], "garbage": b"\x00" * 64, "empty": b"", "long_header": b"\xff" * 8 + data[8:]}[
            damage
        ]
    )
    with pytest.raises(AdapterError, match="is damaged"):
        check_adapter(folder, shapes)


def test_no_weights_at_all(folder: Path, shapes: Any) -> None:
    edit_weights(folder, lambda t: t.clear())
    with pytest.raises(AdapterError, match="holds no weights"):
        check_adapter(folder, shapes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(folder: Path, shapes: Any, value: float) -> None:
    edit_weights(folder, lambda t: t[f"{Q}.lora_B.weight"][0, 0].fill_(value))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight' holds a value that is not finite"):
        check_adapter(folder, shapes)


def test_values_must_be_floats(folder: Path, shapes: Any) -> None:
    edit_weights(folder, lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.int8)}))
    with pytest.raises(AdapterError, match="allowed: floating point"):
        check_adapter(folder, shapes)


def test_half_an_adapter(folder: Path, shapes: Any) -> None:
    edit_weights(folder, lambda t: t.pop(f"{Q}.lora_B.weight"))
    with pytest.raises(AdapterError, match="only one half"):
        check_adapter(folder, shapes)


def test_weights_that_are_no_lora(folder: Path, shapes: Any) -> None:
    edit_weights(folder, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(4)}))
    with pytest.raises(AdapterError, match="lora_magnitude_vector"):
        check_adapter(folder, shapes)


def test_halves_of_different_rank(folder: Path, shapes: Any) -> None:
    edit_weights(folder, lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 3)}))
    with pytest.raises(AdapterError, match=r"rank of .* is 4 in lora_A and 3 in lora_B"):
        check_adapter(folder, shapes)


def test_another_base_model_is_one_clear_error(folder: Path, shapes: dict[str, LayerShape]) -> None:
    """It names what differs, and is not told once per layer."""
    wider = {k: LayerShape(s.inputs * 2, s.outputs) for k, s in shapes.items()}
    with pytest.raises(AdapterError) as wrong:
        check_adapter(folder, wider)
    assert "is for another base model" in wrong.value.message
    assert "'model.layers.0.self_attn.q_proj' is 64→64 here and 128→64 there" in wrong.value.message
    assert "and 1 more" in wrong.value.message
    assert "it says it was trained on" in str(wrong.value)
    other_names = {k.replace("model.layers", "transformer.h"): s for k, s in shapes.items()}
    with pytest.raises(AdapterError, match=r"the base model has no layer 'model.layers.0.self_attn.q_proj'"):
        check_adapter(folder, other_names)


def test_the_output_head_is_not_adapted(shapes: dict[str, LayerShape]) -> None:
    assert "lm_head" not in shapes
    assert "model.layers.0.mlp.down_proj" in shapes


def test_transposed_layers_are_known() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    assert layer_shapes(model)["transformer.h.0.attn.c_attn"] == LayerShape(8, 24, transposed=True)
