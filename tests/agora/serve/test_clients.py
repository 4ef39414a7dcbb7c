"""The clients that people have, unchanged, against a gateway in a process of its own: openai, LangChain's, LiteLLM's.

Each is asked twice: for an expert that the gateway answers for itself, and for one behind another OpenAI-compatible
server, whose replies are passed on (that server is a second gateway).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from agora.serve.keys import new_key
from benchmarks.gateway_parts.fleet import Fleet

ROOT = Path(__file__).parents[3]
PEERS = ROOT / ".venv-peers" / "bin" / "python"

WORDS = "the river runs past the old town"
QUESTION: list[Any] = [{"role": "user", "content": WORDS}]
EXPERTS = ("echo", "far")
"""Both say again what they are told, one here and one behind another server."""

BEHIND = """
[server]
keys = "keys.json"

[nodes.echo]
kind = "fake"

[experts.echo]
node = "echo"
description = "Says it again."

[store]
path = "behind.sqlite"
"""

GATEWAY = """
[server]
keys = "keys.json"

[nodes.echo]
kind = "fake"

[nodes.behind]
kind = "openai"
url = "{behind}/v1"
model = "echo"
api_key_env = "BEHIND_KEY"
server = "openai"
capabilities = {{ completion = true }}

[nodes.small]
kind = "fake"
capabilities = {{ max_context = 20 }}

[nodes.busy]
kind = "fake"
fail = "overloaded"

[nodes.busy_once]
kind = "fake"
fail = "overloaded"
fail_first = 1

[nodes.down]
kind = "fake"
fail = "unavailable"

[nodes.slow]
kind = "fake"
reply = "one two three four five six seven eight nine ten"
seconds_per_token = 0.5
max_running = 1
max_waiting = 0

[experts.echo]
node = "echo"
description = "Says it again."

[experts.far]
node = "behind"
description = "Says it again, from afar."

[experts.small]
node = "small"
description = "Remembers 20 words."

[experts.busy]
node = "busy"
description = "Has no time."

[experts.busy-once]
node = "busy_once"
description = "Has no time at first."

[experts.down]
node = "down"
description = "Is not there."

[experts.slow]
node = "slow"
description = "Takes its time, for one at a time."

[graph]
planner = "static"
router = "keywords"

[[graph.subtasks]]
id = "here"
question = "{{question}}"
expert = "echo"

[[graph.subtasks]]
id = "there"
question = "{{question}}"
expert = "far"

[store]
path = "gateway.sqlite"
"""


@dataclass(frozen=True)
class Gateway:
    url: str
    key: str

    @property
    def base(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    key = new_key(folder / "keys.json", "tests")

    def start(name: str, toml: str) -> str:
        config = folder / f"{name}.toml"
        config.write_text(toml)
        program = Path(sys.executable).with_name("agora")
        command = [str(program), "serve", "--config", str(config), "--port", "0", "--log", str(folder / f"{name}.log")]
        return asyncio.run(fleet.start(name, command, env={"BEHIND_KEY": key}).listening())

    with Fleet(folder) as fleet:
        yield Gateway(url=start("front", GATEWAY.format(behind=start("behind", BEHIND))), key=key)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=gateway.base, api_key=gateway.key, max_retries=0, timeout=30) as made:
        yield made


class ChatModel(Protocol):
    def __call__(self, model: str, **more: Any) -> ChatOpenAI: ...


@pytest.fixture
async def chat_model(gateway: Gateway) -> AsyncIterator[ChatModel]:
    """Makes LangChain's chat model, with connections of its own: by itself it keeps one pool for the whole process."""
    async with openai.DefaultAsyncHttpxClient() as http_async:
        with openai.DefaultHttpxClient() as http:
            known = {"base_url": gateway.base, "api_key": gateway.key, "max_retries": 0, "timeout": 30}
            known |= {"http_client": http, "http_async_client": http_async}
            yield lambda model, **more: ChatOpenAI(model=model, **known, **more)


# openai: what there is


def test_models_are_listed_and_looked_up(client: OpenAI) -> None:
    listed = {m.id: m for m in client.models.list()}
    assert {"agora", "horizontal", "echo", "far", "small", "busy", "busy-once", "down", "slow"} == set(listed)
    assert all(m.object == "model" for m in listed.values())
    assert client.models.retrieve("echo").id == "echo" and client.models.retrieve("agora").id == "agora"
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


# openai: chats


@pytest.mark.parametrize("model", EXPERTS)
def test_a_chat_is_answered_and_counted(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION)
    assert answer.object == "chat.completion" and answer.created > 1_600_000_000 and answer.id
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == WORDS and choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage is not None
    counted = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counted == (7, 7, 14)


@pytest.mark.parametrize("model", EXPERTS)
def test_a_request_has_an_id_the_client_can_tell(client: OpenAI, model: str) -> None:
    one = client.chat.completions.create(model=model, messages=QUESTION)
    two = client.chat.completions.create(model=model, messages=QUESTION)
    assert one._request_id and two._request_id and one._request_id != two._request_id
    mine = client.chat.completions.create(model=model, messages=QUESTION, extra_headers={"X-Request-Id": "mine-1"})
    assert mine._request_id == "mine-1"


@pytest.mark.parametrize("model", EXPERTS)
@pytest.mark.parametrize("stream", [False, True])
def test_sampling_options_reach_the_expert(client: OpenAI, model: str, stream: bool) -> None:
    def ask(**options: Any) -> tuple[str, str]:
        said = client.chat.completions.create(model=model, messages=QUESTION, stream=stream, **options)
        if not stream:
            return said.choices[0].message.content, said.choices[0].finish_reason
        pieces = [c for c in said if c.choices]
        return "".join(c.choices[0].delta.content or "" for c in pieces), pieces[-1].choices[0].finish_reason

    assert ask(max_tokens=2) == ("the river", "length")
    assert ask(max_completion_tokens=3) == ("the river runs", "length")
    assert ask(stop=" past") == ("the river runs", "stop")
    assert ask(stop=[" town", " runs"]) == ("the river", "stop")
    assert ask(seed=7, temperature=0.5, top_p=0.9) == (WORDS, "stop")


@pytest.mark.parametrize("model", EXPERTS)
def test_messages_of_every_role_and_in_parts_are_taken(client: OpenAI, model: str) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You repeat."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "naïve "}, {"type": "text", "text": "“日本” 🗼"}]},
    ]
    answer = client.chat.completions.create(model=model, messages=messages)
    assert answer.choices[0].message.content == "naïve “日本” 🗼"


@pytest.mark.parametrize("model", EXPERTS)
def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI, model: str) -> None:
    with client.chat.completions.create(model=model, messages=QUESTION, stream=True) as stream:
        pieces = list(stream)
    assert len({p.id for p in pieces}) == 1 and {p.object for p in pieces} == {"chat.completion.chunk"}
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [p.choices[0].delta.content for p in pieces if p.choices and p.choices[0].delta.content]
    assert "".join(texts) == WORDS and len(texts) == 7
    assert [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason] == ["stop"]
    assert all(p.usage is None for p in pieces)


@pytest.mark.parametrize("model", (*EXPERTS, "agora"))
def test_a_stream_ends_with_its_counts_if_asked_for(client: OpenAI, model: str) -> None:
    with client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *before, last = list(stream)
    assert last.choices == [] and last.usage is not None and all(p.usage is None for p in before)
    counted = (last.usage.prompt_tokens, last.usage.completion_tokens)
    assert counted == ((14, 14) if model == "agora" else (7, 7))


def test_the_clients_own_accumulation_of_a_stream_works(client: OpenAI) -> None:
    with client.chat.completions.stream(model="echo", messages=QUESTION) as stream:
        deltas = [e.delta for e in stream if e.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == WORDS == final.choices[0].message.content


@pytest.mark.parametrize("model", EXPERTS)
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_belong_to_the_tokens(client: OpenAI, model: str, stream: bool) -> None:
    said: Any = client.chat.completions.create(
        model=model, messages=QUESTION, logprobs=True, top_logprobs=2, stream=stream
    )
    parts = [said] if not stream else [p for p in said if p.choices and p.choices[0].logprobs]
    tokens = [t for p in parts for t in p.choices[0].logprobs.content]
    assert "".join(t.token for t in tokens) == WORDS and len(tokens) == 7
    for t in tokens:
        assert t.logprob < 0 and bytes(t.bytes).decode() == t.token
        assert len(t.top_logprobs) == 2 and t.top_logprobs[0].token == t.token
        assert math.isclose(t.top_logprobs[0].logprob, t.logprob)


def test_a_graph_answers_like_a_model(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="agora", messages=QUESTION)
    text = answer.choices[0].message.content
    # Both subtasks of the plan were answered, each by its expert.
    assert text is not None and text.count(WORDS) >= 2 and answer.model == "agora"
    assert answer.usage is not None and answer.usage.total_tokens == 28
    with client.chat.completions.create(model="agora", messages=QUESTION, stream=True) as stream:
        assert "".join(p.choices[0].delta.content or "" for p in stream if p.choices) == text


# openai: raw text


@pytest.mark.parametrize("model", EXPERTS)
def test_a_text_is_gone_on_with(client: OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=WORDS, max_tokens=3, seed=1)
    assert answer.object == "text_completion" and answer.choices[0].text == "the river runs"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    with client.completions.create(model=model, prompt=WORDS, stream=True) as stream:
        assert "".join(p.choices[0].text for p in stream if p.choices) == WORDS


@pytest.mark.parametrize("model", EXPERTS)
def test_a_text_has_log_probabilities_too(client: OpenAI, model: str) -> None:
    told = client.completions.create(model=model, prompt=WORDS, logprobs=1).choices[0].logprobs
    assert told is not None and told.tokens is not None and told.token_logprobs is not None
    assert "".join(told.tokens) == WORDS and len(told.token_logprobs) == 7 and max(told.token_logprobs) < 0
    assert told.text_offset == [0, 3, 9, 14, 19, 23, 27]
    assert told.top_logprobs is not None and set(told.top_logprobs[1]) == {" river"}


# openai: errors


def test_without_a_right_key_nobody_is_answered(gateway: Gateway) -> None:
    with OpenAI(base_url=gateway.base, api_key="agora-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as wrong:
            client.chat.completions.create(model="echo", messages=QUESTION)
        assert wrong.value.status_code == 401 and wrong.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="echo", messages=QUESTION, stream=True)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_an_unknown_model_is_not_found_and_told_which_there_are(client: OpenAI) -> None:
    for ask in (
        lambda: client.chat.completions.create(model="gpt-9", messages=QUESTION),
        lambda: client.chat.completions.create(model="gpt-9", messages=QUESTION, stream=True),
        lambda: client.completions.create(model="gpt-9", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError, match=r"gpt-9") as unknown:
            ask()
        assert unknown.value.code == "model_not_found" and unknown.value.status_code == 404
        assert "echo" in str(unknown.value)


BAD: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 3},
    "max_tokens": {"max_tokens": 0},
    "messages": {"messages": []},
    "messages.0.role": {"messages": [{"role": "king", "content": "x"}]},
    "top_logprobs": {"logprobs": True, "top_logprobs": 1000},
    "n": {"n": 2},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
}


@pytest.mark.parametrize("param", BAD)
@pytest.mark.parametrize("model", ("echo", "agora"))
def test_bad_requests_name_the_field(client: OpenAI, param: str, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{"model": model, "messages": QUESTION, **BAD[param]})
    assert bad.value.type == "invalid_request_error" and bad.value.param == param
    assert param.rpartition(".")[2] in bad.value.message


def test_what_the_server_behind_refuses_is_refused_here(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="far", messages=QUESTION, temperature=3)


def test_a_question_too_long_is_a_bad_request(client: OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "word " * 100}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="20"):
            client.chat.completions.create(model="small", messages=long, max_tokens=5, stream=stream)


def test_an_overloaded_expert_is_a_rate_limit_with_a_time_to_wait(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as busy:
            client.chat.completions.create(model="busy", messages=QUESTION, stream=stream)
        assert busy.value.status_code == 429 and int(busy.value.response.headers["Retry-After"]) >= 1


def test_the_client_waits_as_told_and_asks_again(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", waited.append)
    with OpenAI(base_url=gateway.base, api_key=gateway.key, max_retries=2) as client:
        answer = client.chat.completions.create(model="busy-once", messages=QUESTION)
    assert answer.choices[0].message.content == WORDS and waited == [1.0]


def test_an_expert_that_is_down_is_a_server_error(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as down:
        client.chat.completions.create(model="down", messages=QUESTION)
    assert down.value.status_code in (502, 503) and down.value.type == "server_error"


def test_what_openai_has_and_agora_has_not_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="echo", input="x")


def test_a_stream_left_early_frees_the_expert(client: OpenAI) -> None:
    # It answers one at a time, five seconds long, and nobody may wait.
    for _ in range(2):
        with client.chat.completions.create(model="slow", messages=QUESTION, stream=True) as stream:
            assert any(p.choices[0].delta.content == "one" for p in stream)
        # The connection's end travels on its own, so the expert is free a moment later.
        for _ in range(100):
            with contextlib.suppress(openai.RateLimitError):
                client.chat.completions.create(model="slow", messages=QUESTION, max_tokens=1)
                break
            time.sleep(0.01)
        else:
            pytest.fail("the stream that was left still holds the expert")


async def test_the_async_client_asks_many_at_once(gateway: Gateway) -> None:
    async with AsyncOpenAI(base_url=gateway.base, api_key=gateway.key, max_retries=0) as client:

        async def whole(n: int) -> str | None:
            said = await client.chat.completions.create(
                model=EXPERTS[n % 2], messages=[{"role": "user", "content": f"number {n}"}]
            )
            return said.choices[0].message.content

        async def streamed(n: int) -> str:
            stream = await client.chat.completions.create(
                model=EXPERTS[n % 2], messages=[{"role": "user", "content": f"number {n}"}], stream=True
            )
            return "".join([p.choices[0].delta.content or "" async for p in stream if p.choices])

        said = await asyncio.gather(*(whole(n) if n % 3 else streamed(n) for n in range(24)))
        assert said == [f"number {n}" for n in range(24)]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nobody", messages=QUESTION)
        assert "echo" in [m.id async for m in client.models.list()]


# LangChain


@pytest.mark.parametrize("model", EXPERTS)
def test_langchain_invokes_and_streams(chat_model: ChatModel, model: str) -> None:
    chat = chat_model(model, temperature=0, seed=1)
    answer = chat.invoke(WORDS)
    assert answer.content == WORDS and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None and answer.usage_metadata["total_tokens"] == 14
    pieces = list(chat.stream([("system", "Repeat."), ("user", WORDS)], stream_usage=True))
    assert "".join(str(p.content) for p in pieces) == WORDS
    whole = pieces[0]
    for p in pieces[1:]:
        whole += p
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] == 7


@pytest.mark.parametrize("model", EXPERTS)
async def test_langchain_does_so_asynchronously(chat_model: ChatModel, model: str) -> None:
    chat = chat_model(model, max_tokens=2)
    assert [a.content for a in await chat.abatch([WORDS, "a b c"])] == ["the river", "a b"]
    assert "".join([str(p.content) async for p in chat.astream(WORDS)]) == "the river"
    assert (await chat.ainvoke(WORDS, stop=[" river"])).content == "the"


@pytest.mark.parametrize("model", EXPERTS)
def test_langchain_gets_log_probabilities(chat_model: ChatModel, model: str) -> None:
    answer = chat_model(model, logprobs=True, top_logprobs=1).invoke(WORDS)
    assert "".join(t["token"] for t in answer.response_metadata["logprobs"]["content"]) == WORDS


def test_langchain_asks_a_graph(chat_model: ChatModel) -> None:
    assert str(chat_model("agora").invoke(WORDS).content).count(WORDS) >= 2


def test_langchain_tells_the_error(chat_model: ChatModel) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat_model("nobody").invoke(WORDS)
    with pytest.raises(openai.RateLimitError):
        list(chat_model("busy").stream(WORDS))


# LiteLLM

LITELLM = """
import asyncio, json, sys
import litellm

base, key, words = sys.argv[1:]
litellm.suppress_debug_info = True
litellm.num_retries = 0
asked = dict(api_base=base, api_key=key, messages=[{"role": "user", "content": words}], max_retries=0, timeout=30)
told = {}
for name in ("echo", "far", "agora"):
    model = f"openai/{name}"
    answer = litellm.completion(model=model, **asked)
    pieces = list(litellm.completion(model=model, stream=True, stream_options={"include_usage": True}, **asked))
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    later = asyncio.run(litellm.acompletion(model=model, **asked))
    told[name] = {
        "text": answer.choices[0].message.content,
        "finish_reason": answer.choices[0].finish_reason,
        "tokens": answer.usage.total_tokens,
        "streamed": text,
        "streamed_tokens": [p.usage.total_tokens for p in pieces if getattr(p, "usage", None)],
        "async": later.choices[0].message.content,
    }
    if name != "agora":
        some = litellm.completion(model=model, max_tokens=2, stop=[" town"], temperature=0.1, seed=3, **asked)
        told[name]["cut"] = some.choices[0].message.content
errors = {
    "nobody": dict(asked, model="openai/nobody"),
    "busy": dict(asked, model="openai/busy"),
    "key": dict(asked, model="openai/echo", api_key="agora-wrong"),
    "temperature": dict(asked, model="openai/echo", temperature=3),
}
told["errors"] = {}
for name, options in errors.items():
    try:
        litellm.completion(**options)
    except Exception as e:
        told["errors"][name] = [type(e).__name__, getattr(e, "status_code", None)]
print(json.dumps(told))
"""
"""Run by the interpreter of `make peers`: LiteLLM's pins fight with agora's."""


def test_litellm_asks_the_gateway(gateway: Gateway) -> None:
    if not PEERS.is_file():
        pytest.skip("LiteLLM is not installed: make peers")
    ended = subprocess.run(
        [str(PEERS), "-c", LITELLM, gateway.base, gateway.key, WORDS],
        capture_output=True,
        text=True,
        timeout=120,
        # It would fetch its price list from the web.
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PATH": ""},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    for name in EXPERTS:
        assert told[name] == {
            "text": WORDS,
            "finish_reason": "stop",
            "tokens": 14,
            "streamed": WORDS,
            "streamed_tokens": [14],
            "async": WORDS,
            "cut": "the river",
        }
    assert told["agora"]["text"] == told["agora"]["streamed"] == told["agora"]["async"]
    assert told["agora"]["text"].count(WORDS) >= 2 and told["agora"]["streamed_tokens"] == [28]
    assert told["errors"] == {
        "nobody": ["NotFoundError", 404],
        "busy": ["RateLimitError", 429],
        "key": ["AuthenticationError", 401],
        "temperature": ["BadRequestError", 400],
    }
