from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from agora.errors import InvalidRequest, ModelError
from experts.engine.cache import SlotCache
from experts.engine.layout import arrange
from experts.engine.loading import load
from experts.engine.packed import PackedLinear, can_pack, pack
from experts.engine.rows import Part

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 410,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def other(tiny_model: Path, path: Path, config: PreTrainedConfig) -> Path:
    """A random model of another family, with the tiny tokenizer."""
    shutil.copytree(tiny_model, path)
    (path / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


class Fake:
    """As much of a row as a layout needs."""

    def __init__(self, place: Any) -> None:
        self.place = place
        self.job = type("Job", (), {"adapter": None})


def decode(folder: Path, prompts: list[list[int]], steps: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Greedy decoding of all prompts side by side; the logits of every token of every row."""
    runner = load(folder, dtype="float32", device="cpu").runner
    cache = SlotCache(runner.shape, lane_tokens=4)
    rows = [Fake(cache.open(len(p))) for p in prompts]
    texts = [list(p) for p in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    with torch.inference_mode():
        for step in range(steps):
            work = []
            for row, text in zip(rows, texts, strict=True):
                start = row.place.length
                # The first prompt is read in two chunks, the others at once.
                end = len(text) if step or row is not rows[0] else max(1, len(text) // 2)
                tokens = text[start:end]
                work.append((row, Part(tokens=tokens, positions=range(start, end), keep=[len(tokens) - 1])))
                cache.reserve(row.place, end)
            layout = arrange(cache, work)  # type: ignore[arg-type]
            out = runner.forward(layout.tokens, layout.positions, layout.step, layout.keep)
            for seat in layout.seats:
                seat.row.place.length += len(seat.part.tokens)
                n = rows.index(seat.row)  # type: ignore[arg-type]
                if seat.row.place.length == len(texts[n]):
                    logits[n].append(out[seat.first])
                    texts[n].append(int(out[seat.first].argmax()))
    return [torch.stack(rows) for rows in logits], texts


@pytest.mark.parametrize("copied", [False, True], ids=["heads_shared", "heads_copied"])
@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=410, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
        MistralConfig(**SMALL, sliding_window=6),
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1),
        Qwen3Config(**SMALL),
        Gemma3TextConfig(**SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    ],
    ids=lambda c: c.model_type,
)
def test_models_of_other_families_say_what_they_say_by_themselves(
    tiny_model: Path, tmp_path: Path, config: PreTrainedConfig, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned positions, transposed layers, sliding windows, biases, norms on queries: all as without the engine."""
    folder = other(tiny_model, tmp_path / "other", config)
    if copied:
        monkeypatch.setattr("experts.engine.attention.SHARED_HEADS", frozenset())
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34]]
    logits, texts = decode(folder, prompts, 10)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, text, seen in zip(prompts, texts, logits, strict=True):
        assert len(text) > len(prompt) + 5
        with torch.inference_mode():
            expected = model(torch.tensor([text[:-1]])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(seen, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Gemma2Config(**SMALL, sliding_window=64), "softcap"),
        (MambaConfig(vocab_size=410, hidden_size=16, num_hidden_layers=1, state_size=4), "key-value cache|cannot be"),
    ],
    ids=["gemma2", "mamba"],
)
def test_models_that_the_engine_does_not_compute_are_refused(
    tiny_model: Path, tmp_path: Path, config: PreTrainedConfig, said: str
) -> None:
    folder = other(tiny_model, tmp_path / "other", config)
    with pytest.raises(ModelError, match=said):
        load(folder, dtype="float32", device="cpu")


def test_what_is_known_of_a_model(tiny_model: Path) -> None:
    loaded = load(tiny_model, dtype="float32", device="cpu")
    assert loaded.facts.name == "tiny"
    assert loaded.facts.max_context == 512
    assert loaded.facts.eos == {2}
    assert loaded.facts.codec.chat
    assert loaded.runner.shape.heads == 2
    assert loaded.runner.shape.bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert load(tiny_model, dtype="float32", device="cpu", max_context=100).facts.max_context == 100
    assert load(tiny_model, dtype="float32", device="cpu", max_context=10_000).facts.max_context == 512


def test_several_end_tokens(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))
    assert load(folder, dtype="float32", device="cpu").facts.eos == {2, 7, 9}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_number_formats(tiny_model: Path, dtype: str) -> None:
    runner = load(tiny_model, dtype=dtype, device="cpu").runner
    assert runner.shape.dtype == getattr(torch, dtype)


def test_rotary_embeddings_bound_to_a_length_bind_the_context(tiny_model: Path, tmp_path: Path) -> None:
    """Past it, one long row would change the positions of all others."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    folder = other(tiny_model, tmp_path / "other", Qwen2Config(**SMALL, rope_parameters=rope))
    assert load(folder, dtype="float32", device="cpu").facts.max_context == 64


# -- Bad folders


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_family(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "no-such-model"}))


def own_code(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    path.write_text(json.dumps(values))
    (folder / "mine.py").write_text("raise SystemExit('code in a model folder was run')")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage" * 100)


def lacking_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def other_shapes(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))


def not_finite(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def pickles_only(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_config, "cannot be loaded"),
        (unknown_family, "cannot be loaded"),
        (own_code, "cannot be loaded"),
        (cut_weights, "cannot be loaded"),
        (garbage_weights, "cannot be loaded"),
        (lacking_weights, "lacks 1 of its weights, the first is model.layers.1.mlp.up_proj.weight"),
        (other_shapes, "cannot be loaded|has wrong shapes for 6 of its weights"),
        (not_finite, "not finite"),
        (no_tokenizer, "cannot be loaded"),
        (damaged_tokenizer, "cannot be loaded"),
        (pickles_only, "no weights as safetensors"),
        (no_config, "no config.json"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder: Path, damage: Any, said: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=said) as wrong:
        load(folder, dtype="float32", device="cpu")
    assert str(folder) in str(wrong.value) or "not finite" in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        load(tmp_path / "nowhere", dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int4", "device": "cpu"}, "dtype is 'int4'; allowed: float32, bfloat16, float16"),
        ({"dtype": "float32", "device": "abacus"}, "device is 'abacus'; allowed: cpu, cuda"),
        ({"dtype": "float32", "device": "cuda:99"}, "this machine has"),
    ],
)
def test_values_out_of_range(tiny_model: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        load(tiny_model, **options)


# -- Packed layers


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="this build of torch packs no weights")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 65, 200])
def test_packed_layers_compute_the_same(bias: bool, rows: int) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(48, 80, bias=bias)
    x = torch.randn(rows, 1, 48)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="this build of torch packs no weights")
def test_packing_frees_the_old_weights_and_keeps_what_peft_asks_for() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 8)))
    assert pack(model) == 2
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (32, 64)
    assert layer.weight.untyped_storage().nbytes() == 4
    assert (layer.in_features, layer.out_features) == (64, 32)


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="this build of torch packs no weights")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell which files are mapped")
def test_a_packed_model_lets_its_file_go(folder: Path) -> None:
    loaded = load(folder, dtype="float32", device="cpu")
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert loaded.facts.name == "model"


def test_a_gpu_packs_nothing() -> None:
    assert not can_pack(torch.float32, torch.device("meta"))
