"""Chats and completions with agora's own experts, and with a graph."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "What is six times seven?"}]
TEXT = "forty two is the answer"


async def events(gateway: Any, path: str, body: dict[str, Any]) -> list[Any]:
    """What a stream says: JSON, and `[DONE]` as text."""
    async with gateway.http.post(f"{gateway.url}{path}", json={**body, "stream": True}) as reply:
        assert reply.status == 200
        assert reply.content_type == "text/event-stream"
        lines = [line.decode().strip() async for line in reply.content]
    said = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(s) if s != "[DONE]" else s for s in said]


async def test_an_expert_answers(gateway: Any) -> None:
    status, body = await gateway.chat("one")
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "one"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


async def test_the_experts_prompt_stands_before_the_question_unless_another_is_given(gateway: Any) -> None:
    """A fake counts words: the prompt of the expert's own has four, the given one has one."""
    _, own = await gateway.chat("one")
    system = {"role": "system", "content": "Hi."}
    _, given = await gateway.post("/v1/chat/completions", {"model": "one", "messages": [system, *MESSAGES]})
    _, developer = await gateway.post(
        "/v1/chat/completions", {"model": "one", "messages": [{**system, "role": "developer"}, *MESSAGES]}
    )
    assert own["usage"]["prompt_tokens"] - given["usage"]["prompt_tokens"] == 3
    assert developer["usage"]["prompt_tokens"] == given["usage"]["prompt_tokens"]


async def test_parts_of_text_are_one_text(gateway: Any) -> None:
    parts = [{"type": "text", "text": "What is six "}, {"type": "text", "text": "times seven?"}]
    status, body = await gateway.post(
        "/v1/chat/completions", {"model": "dull", "messages": [{"role": "user", "content": parts}]}
    )
    assert status == 200
    assert body["choices"][0]["message"]["content"] == MESSAGES[0]["content"]


async def test_tokens_are_capped_at_the_cards_limit(gateway: Any) -> None:
    _, body = await gateway.chat("one", max_tokens=2)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"] == "forty two"
    _, body = await gateway.chat("one", max_completion_tokens=1000)
    assert body["usage"]["completion_tokens"] <= 8


async def test_logprobs_are_told_as_openai_tells_them(gateway: Any) -> None:
    _, body = await gateway.chat("one", logprobs=True, top_logprobs=1)
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(t["token"] for t in content) == TEXT
    assert all(t["logprob"] < 0 and bytes(t["bytes"]).decode() == t["token"] for t in content)
    assert all(len(t["top_logprobs"]) == 1 for t in content)
    _, body = await gateway.chat("one")
    assert body["choices"][0]["logprobs"] is None


async def test_a_completion_goes_on_with_the_text(gateway: Any) -> None:
    status, body = await gateway.post(
        "/v1/completions", {"model": "one", "prompt": "Six times seven is", "logprobs": 1}
    )
    assert status == 200
    assert body["object"] == "text_completion"
    choice = body["choices"][0]
    assert choice["text"] == TEXT
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT
    assert [TEXT[o : o + len(t)] for o, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)] == logprobs[
        "tokens"
    ]


async def test_a_stream_says_the_same_in_pieces(gateway: Any) -> None:
    body = {"model": "one", "messages": MESSAGES, "stream_options": {"include_usage": True}, "logprobs": True}
    said = await events(gateway, "/v1/chat/completions", body)
    assert said[-1] == "[DONE]"
    assert said[0]["choices"][0]["delta"]["role"] == "assistant"
    pieces = [e["choices"][0]["delta"].get("content", "") for e in said[:-1] if e["choices"]]
    assert "".join(pieces) == TEXT
    assert len([p for p in pieces if p]) == 5
    assert [e["choices"][0]["finish_reason"] for e in said[:-1] if e["choices"]][-1] == "stop"
    _, whole = await gateway.chat("one")
    assert said[-2]["usage"] == whole["usage"]
    assert said[-2]["choices"] == []


async def test_a_completion_is_streamed_too(gateway: Any) -> None:
    said = await events(gateway, "/v1/completions", {"model": "one", "prompt": "Six times seven is"})
    assert "".join(e["choices"][0]["text"] for e in said[:-1]) == TEXT
    assert said[-1] == "[DONE]"


async def test_a_graph_answers_and_says_how(gateway: Any) -> None:
    status, body = await gateway.chat("agora")
    assert status == 200
    assert body["choices"][0]["message"]["content"] == TEXT
    about = body["agora"]
    assert about["subtasks"] == [{"id": "t1", "question": MESSAGES[0]["content"], "experts": ["one"], "answered": True}]
    assert about["missing"] == []
    _, again = await gateway.chat("horizontal", temperature=0.7, max_tokens=5)
    assert again["agora"]["not_applied"] == ["max_tokens", "temperature"]


async def test_a_graph_is_streamed_with_comments_on_the_way(gateway: Any) -> None:
    body = {"model": "agora", "messages": MESSAGES, "stream_options": {"include_usage": True}}
    said = await events(gateway, "/v1/chat/completions", body)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in said[:-1] if e["choices"]) == TEXT
    assert said[-2]["usage"]["completion_tokens"] > 0
    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions", json={"model": "agora", "messages": MESSAGES, "stream": True}
    ) as reply:
        text = await reply.text()
    assert ": t1: asking one" in text


RULES = """
[nodes.echo]
kind = "fake"

[experts.parrot]
node = "echo"
description = "everything"

[graph]
planner = "rules"
router = "keywords"
"""

TIMES = """
[nodes.steady]
kind = "fake"
reply = "one two three four five six seven eight nine ten"
seconds_per_token = 0.1

[nodes.quick]
kind = "fake"
reply = "here it is"

[nodes.never]
kind = "fake"
latency_s = 60.0

[experts.steady]
node = "steady"
description = "numbers"

[experts.quick]
node = "quick"
description = "speed"

[experts.never]
node = "never"
description = "silence"

[graph]
planner = "static"
router = "keywords"

[[graph.subtasks]]
id = "t1"
question = "{question}"
expert = "quick"

[[graph.subtasks]]
id = "t2"
question = "{question}"
expert = "never"
"""


async def test_a_graph_plans_over_the_last_message_and_tells_experts_what_was_said_before(start: Any) -> None:
    """Most clients send a system message or the turns before: what stands in them is not asked again."""
    gateway = await start(experts=RULES)
    messages = [
        {"role": "system", "content": "You are a guide. Be brief. What you do not know you leave out."},
        {"role": "user", "content": "What is the capital of France? Who built it?"},
        {"role": "assistant", "content": "Paris. Do you want more?"},
        {"role": "user", "content": "Where is Rome? Who founded Athens?"},
    ]
    _, body = await gateway.post("/v1/chat/completions", {"model": "agora", "messages": messages})
    assert [s["question"] for s in body["agora"]["subtasks"]] == ["Where is Rome?", "Who founded Athens?"]
    told = (
        "You are a guide. Be brief. What you do not know you leave out.\n\nWhat was said before:\n"
        "user: What is the capital of France? Who built it?\nassistant: Paris. Do you want more?\n\n"
    )
    text = body["choices"][0]["message"]["content"]
    assert text.startswith("Where is Rome?\n")
    assert told + "Where is Rome?" in text
    assert told + "Who founded Athens?" in text


async def test_a_graph_answers_with_what_it_has_when_the_time_is_up(start: Any) -> None:
    gateway = await start("[server]\nrequest_timeout_s = 1.0", experts=TIMES)
    status, body = await gateway.chat("agora")
    assert status == 200
    assert body["choices"][0]["message"]["content"].startswith("here it is")
    assert body["agora"]["missing"] == ["t2"]


async def test_a_graph_can_be_asked_under_any_id_that_a_request_may_have(gateway: Any) -> None:
    for request_id in ("trace:1.a_b", "x" * 128):
        status, body = await gateway.post(
            "/v1/chat/completions", {"model": "agora", "messages": MESSAGES}, **{"X-Request-Id": request_id}
        )
        assert status == 200, body
        assert body["id"] == f"chatcmpl-{request_id}"


async def test_a_streamed_question_that_cannot_be_asked_is_refused_too(gateway: Any) -> None:
    status, body = await gateway.chat("agora", "  ", stream=True)
    assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_a_stream_whose_time_is_up_says_so_in_its_own_frame(start: Any) -> None:
    """Not with a second head in the middle of its body, which the client would read as part of it."""
    gateway = await start("[server]\nrequest_timeout_s = 0.35", experts=TIMES)
    for _ in range(2):
        async with gateway.http.post(
            f"{gateway.url}/v1/chat/completions", json={"model": "steady", "messages": MESSAGES, "stream": True}
        ) as reply:
            text = await reply.text()
        assert "HTTP/1.1" not in text
        said = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert len(said) >= 2
        assert json.loads(said[0])["choices"][0]["delta"]["role"] == "assistant"
        assert json.loads(said[-1])["error"]["code"] == "timeout"
    async with gateway.http.get(f"{gateway.url}/metrics") as reply:
        assert 'model="steady",route="/v1/chat/completions",status="200"} 2.0' in await reply.text()
    assert gateway.node.square.get("steady").backend.load.total == 0
    assert gateway.node.admission.load.total == 0


@pytest.mark.parametrize("model", ["one", "agora"])
async def test_what_clients_write_out_by_default_is_taken(gateway: Any, model: str) -> None:
    """Fields without effect, and null for fields unknown here, as LangChain, LiteLLM and OpenAI's own client send."""
    _, first = await gateway.chat(model)
    messages = [*MESSAGES, first["choices"][0]["message"], {"role": "user", "content": "Why?", "name": None}]
    messages[1] |= {"annotations": [], "tool_calls": None, "function_call": None, "audio": None}
    status, body = await gateway.post(
        "/v1/chat/completions",
        {
            "model": model,
            "messages": messages,
            "temperature": 1,
            "top_p": 1,
            "n": 1,
            "stop": None,
            "logprobs": False,
            "top_logprobs": 0,
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "parallel_tool_calls": True,
            "service_tier": "auto",
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "store": False,
            "metadata": None,
            "tools": None,
            "tool_choice": None,
            "reasoning_effort": None,
            "stream_options": None,
        },
    )
    assert status == 200, body


async def test_one_prompt_may_stand_in_a_list(gateway: Any) -> None:
    status, body = await gateway.post("/v1/completions", {"model": "one", "prompt": ["Six times"], "suffix": None})
    assert status == 200
    assert body["choices"][0]["text"] == TEXT
    status, body = await gateway.post("/v1/completions", {"model": "one", "prompt": ["a", "b"]})
    assert (status, body["error"]["param"]) == (400, "prompt")


async def test_a_graph_keeps_to_the_budget_it_is_given(gateway: Any) -> None:
    status, body = await gateway.chat("agora", budget={"tokens": 1})
    assert status == 502
    assert "tokens are left" in body["error"]["message"]


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [("down", 502, "unavailable"), ("full", 429, "overloaded"), ("nobody", 404, "model_not_found")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_an_expert_fails_of_has_its_own_status(
    gateway: Any, model: str, status: int, code: str, stream: bool
) -> None:
    """Also of a stream: nothing was sent before the first token."""
    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions", json={"model": model, "messages": MESSAGES, "stream": stream}
    ) as reply:
        body = await reply.json()
        assert reply.status == status
        assert body["error"]["code"] == code
        assert ("Retry-After" in reply.headers) == (status == 429)
    assert (await gateway.chat("one"))[0] == 200


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"stream": "yes"}, "stream"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"tools": []}, "tools"),
        ({"temprature": 1}, "temprature"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
async def test_a_wrong_field_is_named(gateway: Any, more: dict[str, Any], param: str) -> None:
    status, body = await gateway.post("/v1/chat/completions", {"model": "one", "messages": MESSAGES, **more})
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"].startswith(param)
    assert param.split(".")[0] in body["error"]["message"]


@pytest.mark.parametrize("more", [{"logprobs": True}, {"response_format": {"type": "json_object"}}])
async def test_what_an_expert_does_not_claim_is_refused(gateway: Any, more: dict[str, Any]) -> None:
    status, body = await gateway.chat("dull", **more)
    assert status == 400
    assert body["error"]["code"] == "unsupported"


async def test_a_question_that_cannot_be_asked_is_refused(gateway: Any) -> None:
    for content in ("", "  ", "a\x00b", "x" * 100_001):
        status, body = await gateway.chat("dull", content)
        assert status == 400, content[:10]
        assert body["error"]["message"]


async def test_a_client_that_hangs_up_frees_the_expert(gateway: Any) -> None:
    backend = gateway.node.square.get("slow").backend
    for model, stream in (("slow", False), ("slow", True)):
        asked = asyncio.ensure_future(gateway.chat(model, stream=stream))
        while not backend.load.running:
            await asyncio.sleep(0.01)
        asked.cancel()
        while backend.load.total:
            await asyncio.sleep(0.01)
        assert gateway.node.admission.load.total == 0


async def test_the_time_of_a_request_is_bounded(start: Any) -> None:
    gateway = await start("[server]\nrequest_timeout_s = 0.2")
    status, body = await gateway.chat("slow")
    assert status == 504
    assert body["error"]["code"] == "timeout"
    assert gateway.node.square.get("slow").backend.load.total == 0


async def test_a_request_has_an_id_which_the_client_may_give(gateway: Any) -> None:
    body = {"model": "one", "messages": MESSAGES}
    for given, taken in (("abc-1", True), ("a b", False), ("x" * 200, False)):
        async with gateway.http.post(
            f"{gateway.url}/v1/chat/completions", json=body, headers={"X-Request-Id": given}
        ) as reply:
            assert (reply.headers["X-Request-Id"] == given) is taken
            assert (await reply.json())["id"].endswith(reply.headers["X-Request-Id"])
