"""Runs an aiohttp application that tells its URL on standard output."""

from __future__ import annotations

import asyncio
import signal

from aiohttp import web


def serve(app: web.Application, port: int) -> None:
    """Serves on 127.0.0.1 until SIGTERM or SIGINT."""
    asyncio.run(_serve(app, port))


async def _serve(app: web.Application, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()
