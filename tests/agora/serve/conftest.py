"""A gateway in the test's own process, on a free loopback port, with experts that need no model."""

from __future__ import annotations

import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agora.config import Config, parse_config
from agora.serve.node import Node, open_node
from agora.serve.server import listening

EXPERTS = """
[nodes.fast]
kind = "fake"
reply = "forty two is the answer"

[nodes.slow]
kind = "fake"
reply = "at last"
latency_s = 30.0

[nodes.down]
kind = "fake"
fail = "unavailable"

[nodes.full]
kind = "fake"
fail = "overloaded"

[nodes.dull]
kind = "fake"
capabilities = { logprobs = false, completion = false, seed = false }

[experts.one]
node = "fast"
description = "numbers"
system_prompt = "You are a calculator."
max_tokens = 8

[experts.slow]
node = "slow"
description = "patience"

[experts.down]
node = "down"
description = "absence"

[experts.full]
node = "full"
description = "crowds"

[experts.dull]
node = "dull"
description = "little"

[graph]
planner = "static"
router = "keywords"

[[graph.subtasks]]
id = "t1"
question = "{question}"
expert = "one"
"""


@dataclass(kw_only=True)
class Gateway:
    """A node that serves, and a client."""

    node: Node
    url: str
    http: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        async with self.http.post(f"{self.url}{path}", json=body, headers=headers) as reply:
            return reply.status, await reply.json()

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a GET."""
        async with self.http.get(f"{self.url}{path}", headers=headers) as reply:
            return reply.status, await reply.json()

    async def chat(self, model: str, content: str = "What is six times seven?", **more: Any) -> tuple[int, Any]:
        """Status and JSON of a chat with one message."""
        return await self.post(
            "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": content}], **more}
        )


Start = Callable[..., Awaitable[Gateway]]


def config_of(text: str, folder: Path) -> Config:
    """The configuration in a text, its run store in a folder."""
    text = f'{text}\n[store]\npath = "{folder}/runs.sqlite"\n'
    tomllib.loads(text)
    return parse_config(text, file=folder / "agora.toml")


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts gateways: `await start("[server]…", experts=…)`."""
    async with AsyncExitStack() as stack:

        async def begin(server: str = "", *, experts: str = EXPERTS) -> Gateway:
            config = config_of(f"{server}\n{experts}", tmp_path)
            node = await stack.enter_async_context(open_node(config))
            url = await stack.enter_async_context(listening(node, host="127.0.0.1", port=0))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            return Gateway(node=node, url=url, http=http)

        yield begin


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway as the configuration has it by default."""
    return await start()
