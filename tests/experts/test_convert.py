"""Conversion of a tiny random Llama, written as GGUF by the rules of the format and compared with the original."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from agora.errors import ModelError
from experts import convert
from experts.convert import convert_gguf, convert_here
from experts.models import ModelStore

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bytes_to_unicode() -> list[str]:
    """The 256 letters that stand for bytes in a byte-level vocabulary (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [letters[b] for b in range(256)]


def original(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL) + 2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in GGUF's order: rotary pairs side by side, not in halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: LlamaForCausalLM, *, template: str | None = CHATML, pre: str = "smollm") -> Path:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = [*SPECIAL, *bytes_to_unicode(), "12", "th"]
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * 258
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["1 2", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                weight = np.ascontiguousarray(permuted(weight, heads[ours]))
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_is_the_original(tmp_path: Path, target: Path, tied: bool) -> None:
    source = original(tied=tied)
    convert_here(write_gguf(tmp_path / "tiny.gguf", source), target, dtype="float32", pre_tokenizer="smollm")
    loaded, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(loaded.config, "quantization_config")
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) is tied
    ids = torch.tensor([[1, 5, 80, 99, 2]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)


def test_tokenizer_template_and_end_of_text_come_along(tmp_path: Path, target: Path) -> None:
    gguf_file = write_gguf(tmp_path / "tiny.gguf", original(tied=True))
    convert_here(gguf_file, target, dtype="bfloat16", pre_tokenizer="smollm")
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert [ids[0], ids.count(1), ids.count(2)] == [1, 2, 1]  # specials are one token each, none is added in front
    assert tokenizer.decode(tokenizer("th 12 é\n").input_ids) == "th 12 é\n"
    assert tokenizer.tokenize("th12") == ["th", "1", "2"]  # by its rules every digit stands alone
    assert tokenizer.model_max_length == 512
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2


def test_unicode_is_composed_for_qwen(tmp_path: Path, target: Path) -> None:
    gguf_file = write_gguf(tmp_path / "tiny.gguf", original(tied=True), pre="qwen2")
    convert_here(gguf_file, target, dtype="float32", pre_tokenizer="qwen2")
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


def test_in_a_process_of_its_own(
    tmp_path: Path, target: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a package of the same name where the user happens to be must not be run
    (tmp_path / "cwd" / "experts").mkdir(parents=True)
    (tmp_path / "cwd" / "experts" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path / "cwd")
    source = original(tied=True)
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", source), target, dtype="float32", pre_tokenizer="smollm")
    assert {p.name for p in target.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert capfd.readouterr() == ("", "")  # progress bars would break into the caller's own


def test_what_is_no_gguf(tmp_path: Path, target: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="is no GGUF file"):
        convert_gguf(tmp_path / "a.gguf", target, dtype="float32")


def test_error_in_the_process_arrives_whole(tmp_path: Path, target: Path) -> None:
    gguf_file = write_gguf(tmp_path / "tiny.gguf", original(tied=True), template=None)
    with pytest.raises(ModelError, match="holds no chat template"):
        convert_gguf(gguf_file, target, dtype="float32")


def test_damaged_gguf(tmp_path: Path, target: Path) -> None:
    gguf_file = write_gguf(tmp_path / "tiny.gguf", original(tied=True))
    gguf_file.write_bytes(gguf_file.read_bytes()[:9000])
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be converted"):
        convert_here(gguf_file, target, dtype="float32")


@pytest.mark.parametrize(
    ("code", "out", "err", "told"),
    [
        (-signal.SIGKILL, "", "", "out of memory"),
        (-signal.SIGSEGV, "", "", "status -11, no reason given"),
        (1, "not json", "Traceback\n  x\nOSError: No space left on device\n", "No space left"),
        (1, json.dumps({"message": "told", "hint": "do this"}), "", r"told \(do this\)"),
    ],
)
def test_every_end_of_the_process_is_told(code: int, out: str, err: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        raise convert._child_error(Path("a.gguf"), code, out, err)


def test_converter_ends_with_its_parent(tmp_path: Path, target: Path) -> None:
    command = [sys.executable, "-m", "experts.convert", str(tmp_path / "a.gguf"), str(target), "--dtype", "float32"]
    os.mkfifo(tmp_path / "a.gguf")  # reading it never ends
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=60) == 1
        assert child.stderr is not None
        assert child.stderr.read() == b""  # it ended quietly, not by an error of its own
        assert list(target.iterdir()) == []


CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.model
def test_smollm2_answers_and_stops(model_store: ModelStore) -> None:
    folder = model_store.path("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    inputs = tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = tokenizer.decode(inputs["input_ids"][0])
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0])
    assert "Paris" in answer.removeprefix(prompt)
    assert answer.endswith("<|im_end|>")  # it stopped by itself


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_is_what_its_gguf_is(model_store: ModelStore) -> None:
    folder = model_store.path("smollm2-135m")
    gguf_file = model_store.gguf_path("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weight, state[name]) for name, weight in theirs.state_dict().items())
    inputs = tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = [m.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist() for m in (ours, theirs)]
    assert answers[0] == answers[1]


@pytest.fixture
def model_store() -> ModelStore:
    store = ModelStore()
    store.resolve("smollm2-135m", pull=True)
    return store


def test_repairs_are_what_the_catalogue_may_ask_for() -> None:
    store = ModelStore()
    wanted: set[str] = {spec.pre_tokenizer for spec in store._catalogue.values()}
    assert wanted <= set(convert.TOKENIZER_REPAIRS)
