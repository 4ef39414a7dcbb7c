"""`agora serve`: the gateway, until it is told to end."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from agora.cli.invocation import ExitCode, Invocation, of, run_async
from agora.cli.options import ConfigOption, NoPullOption
from agora.errors import ConfigError

if TYPE_CHECKING:
    from agora.config import Config
    from agora.serve.log import JsonLog

COLLECT_AFTER: Final = 20_000
"""Objects made before the collector looks for circles among them (Python's own choice is 700): some 30 requests' worth
at a time. With what `_settle` freezes it makes the gateway answer 15 % more requests per second of CPU."""


def serve(
    context: typer.Context,
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", "-p", metavar="N", min=0, max=65535, help="TCP port; 0 for a free one.")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="Append the log to a file; by default it goes to stderr."),
    ] = None,
    no_pull: NoPullOption = False,
) -> None:
    """Answer over HTTP: OpenAI's API for graphs and experts, runs that outlive the connection, and other nodes.

    Prints one line with the URL when it accepts requests. Ctrl-C or SIGTERM ends it: what is in flight may finish
    first, a second signal cuts it off. The log has one JSON object a line.
    """
    from agora.cli.settings import read_config

    invocation = of(context)
    settings = read_config(config)
    with _log(log) as lines:
        raise typer.Exit(
            run_async(
                _serve(
                    invocation,
                    settings,
                    host=host or settings.server.host,
                    port=settings.server.port if port is None else port,
                    pull=not no_pull,
                    log=lines,
                )
            )
        )


async def _serve(invocation: Invocation, config: Config, *, host: str, port: int, pull: bool, log: JsonLog) -> ExitCode:
    from agora.cli.progress import pulls
    from agora.serve.node import open_node
    from agora.serve.server import serve as serve_node

    def ready(url: str) -> None:
        invocation.say(f"agora serves on {url}/v1  (Ctrl-C ends it)")
        sys.stdout.flush()

    def drain(many: int) -> None:
        invocation.note(f"ending: waiting for {many} requests in flight, at most {config.server.drain_s:g} s")

    async with contextlib.AsyncExitStack() as stack:
        with pulls(invocation) as view:
            view.doing("opening the experts")
            node = await stack.enter_async_context(open_node(config, host=host, pull=pull, progress=view, requests=log))
        _settle()
        await serve_node(node, host=host, port=port, on_ready=ready, on_drain=drain)
    return ExitCode.OK


def _settle() -> None:
    """Takes what is there for good, the objects of imported libraries, out of the collector's rounds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


@contextlib.contextmanager
def _log(file: Path | None) -> Iterator[JsonLog]:
    from agora.serve.log import JsonLog

    with contextlib.ExitStack() as stack:
        # Unbuffered: JsonLog writes many lines at once, and a buffer that a full disk leaves behind cannot be closed.
        out = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(file.open("ab", buffering=0))
            except OSError as e:
                raise ConfigError(f"cannot write the log {file}: {e.strerror}", hint="choose another file") from e
        yield stack.enter_context(JsonLog(out))
