"""The same proxy as a LangGraph `StateGraph` of three nodes: reads the request, asks the upstream, writes the reply.

What a graph costs that someone builds with LangGraph as its documentation shows, compiled once and without a
checkpointer. It prints its URL when it accepts requests.

    python -m benchmarks.gateway_parts.stategraph --upstream URL [--port 0]
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, TypedDict

import aiohttp
from aiohttp import web
from langgraph.graph import END, START, StateGraph

from benchmarks.gateway_parts.serving import serve

UPSTREAM = web.AppKey("upstream", str)
SESSION = web.AppKey("session", aiohttp.ClientSession)
GRAPH = web.AppKey("graph", object)


class State(TypedDict, total=False):
    body: bytes
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    answer: str
    usage: dict[str, Any]
    reply: bytes


def app(upstream: str) -> web.Application:
    """The proxy."""
    made = web.Application()
    made[UPSTREAM] = upstream
    made.cleanup_ctx.append(_opened)
    made.router.add_post("/v1/chat/completions", chat)
    return made


async def _opened(of: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        of[SESSION] = session
        of[GRAPH] = graph(session, of[UPSTREAM] + "/v1/chat/completions")
        yield


def graph(session: aiohttp.ClientSession, url: str) -> Any:
    """Three nodes in a row."""

    async def read(state: State) -> State:
        asked = json.loads(state["body"])
        return {"messages": asked["messages"], "options": {"model": asked["model"], "max_tokens": asked["max_tokens"]}}

    async def ask(state: State) -> State:
        async with session.post(url, json={**state["options"], "messages": state["messages"]}) as reply:
            reply.raise_for_status()
            said = await reply.json()
        return {"answer": said["choices"][0]["message"]["content"], "usage": said["usage"]}

    async def write(state: State) -> State:
        message = {"role": "assistant", "content": state["answer"]}
        reply = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": state["options"]["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": state["usage"],
        }
        return {"reply": json.dumps(reply).encode()}

    builder = StateGraph(State)
    builder.add_node("read", read)
    builder.add_node("ask", ask)
    builder.add_node("write", write)
    builder.add_edge(START, "read")
    builder.add_edge("read", "ask")
    builder.add_edge("ask", "write")
    builder.add_edge("write", END)
    return builder.compile()


async def chat(request: web.Request) -> web.Response:
    compiled: Any = request.app[GRAPH]
    state = await compiled.ainvoke({"body": await request.read()})
    return web.Response(body=state["reply"], content_type="application/json")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--upstream", required=True)
    options.add_argument("--port", type=int, default=0)
    args = options.parse_args()
    serve(app(args.upstream), args.port)
