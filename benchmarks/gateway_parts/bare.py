"""A minimal reverse proxy with aiohttp: what forwarding costs in Python when nothing at all is added to it.

It prints its URL when it accepts requests.

    python -m benchmarks.gateway_parts.bare --upstream URL [--port 0]
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from benchmarks.gateway_parts.serving import serve

UPSTREAM = web.AppKey("upstream", str)
SESSION = web.AppKey("session", aiohttp.ClientSession)


def app(upstream: str) -> web.Application:
    """The proxy: the body goes on as it came, and the reply comes back as it is."""
    made = web.Application()
    made[UPSTREAM] = upstream
    made.cleanup_ctx.append(_session)
    made.router.add_route("*", "/{path:.*}", forward)
    return made


async def _session(of: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        of[SESSION] = session
        yield


async def forward(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    headers = {"Content-Type": request.headers.get("Content-Type", "application/json")}
    async with request.app[SESSION].request(
        request.method, request.app[UPSTREAM] + request.path, data=body or None, headers=headers
    ) as reply:
        if reply.content_type != "text/event-stream":
            return web.Response(body=await reply.read(), status=reply.status, content_type=reply.content_type)
        stream = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.headers["Content-Type"]})
        await stream.prepare(request)
        async for data in reply.content.iter_any():
            await stream.write(data)
        await stream.write_eof()
        return stream


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--upstream", required=True)
    options.add_argument("--port", type=int, default=0)
    args = options.parse_args()
    serve(app(args.upstream), args.port)
