"""The upstream of the gateway benchmark speaks OpenAI's protocol: agora's own backend and the real client read it."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError

from agora.protocols import GenerateRequest, Message
from benchmarks.gateway_parts import mock
from experts.openai import OpenAIBackend

CHAT = (Message(role="user", content="Where did Paris begin?"),)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    listening, at = await mock.start()
    yield at
    listening.close()
    await listening.wait_closed()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
async def test_agoras_backend_reads_it(url: str, streaming: bool, prompt: bool) -> None:
    from agora.protocols import Capabilities

    can = Capabilities(completion=True)
    backend = OpenAIBackend(url, mock.MODEL, streaming=streaming, capabilities=can)
    request = GenerateRequest(prompt="Paris began") if prompt else GenerateRequest(messages=CHAT)
    answer = await backend.generate(request)
    await backend.aclose()
    assert answer.text == mock.ANSWER and answer.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(mock.TOKENS)


async def test_the_openai_client_reads_it(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model=mock.MODEL, messages=[{"role": "user", "content": "?"}])
        assert whole.choices[0].message.content == mock.ANSWER
        stream = await client.chat.completions.create(
            model=mock.PACED, messages=[{"role": "user", "content": "?"}], stream=True
        )
        pieces = [c.choices[0].delta.content or "" async for c in stream]
        assert "".join(pieces) == mock.ANSWER and len([p for p in pieces if p]) == len(mock.TOKENS)
        with pytest.raises(NotFoundError, match="'other' is not served"):
            await client.chat.completions.create(model="other", messages=[])
        assert [m.id async for m in client.models.list()] == [mock.MODEL, mock.PACED]


async def test_only_answers_are_counted(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        asked = {"model": mock.MODEL, "messages": []}
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=asked | {"stream": True})).status_code == 200
        assert (await client.post("/v1/chat/completions", json=[])).status_code == 400
        assert (await client.post("/v1/embeddings", json=asked)).status_code == 404
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/answered")).json() == {"answered": 2}


async def test_requests_in_any_pieces_are_answered_in_order(url: str) -> None:
    body = b'{"model":"mock"}'
    one = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    paced = b'{"model":"mock-paced","stream":true}'
    two = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(paced), paced)
    at = httpx.URL(url)
    reader, writer = await asyncio.open_connection(at.host, at.port)
    data = two + one + b"GET /nowhere HTTP/1.1\r\n\r\n"
    for start in range(0, len(data), 7):
        writer.write(data[start : start + 7])
        await asyncio.sleep(0)
    said = await asyncio.wait_for(reader.readuntil(b"nowhere here"), 5.0)
    assert said.index(b"[DONE]") < said.index(b'"text":"Lutetia lies') < said.index(b"404 Not Found")
    writer.close()
    await writer.wait_closed()


async def test_a_body_of_unknown_length_is_refused_not_misread(url: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{}"

    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/v1/completions", content=pieces())).status_code == 411
