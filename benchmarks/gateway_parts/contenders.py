"""The servers compared, each as it would be run: how it is started, and what it is asked.

Every one forwards to the same upstream. agora checks an API key, keeps its limits and writes its log to a file;
LiteLLM's proxy checks its master key and runs as its documentation recommends for production, logging errors only. The
two proxies that are the yardstick check nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from agora.serve.keys import new_key
from benchmarks.gateway_parts.fleet import Fleet, Server, free_port
from benchmarks.gateway_parts.load import Request
from benchmarks.gateway_parts.mock import FIRST, LAST, MODEL, PACED

CHAT: Final = "/v1/chat/completions"
QUESTION: Final = "Where did Paris begin, and what was the place called in those days?"
GRAPH: Final = "agora"
"""The name under which agora serves its graph."""

EXPERT, PACED_EXPERT = "historian", "slow-historian"

LITELLM: Final = "litellm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that was started.

    Attributes:
        server: Its process.
        key: The API key it checks, if any.
    """

    server: Server
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One line of the result.

    Attributes:
        server: Which of `SERVERS` is asked.
        model: What is asked for.
        streams: Whether it can stream.
    """

    server: str
    model: str
    streams: bool = True


CONTENDERS: Final[Mapping[str, Contender]] = MappingProxyType(
    {
        "agora_expert": Contender(server="agora", model=EXPERT),
        "agora_graph": Contender(server="agora", model=GRAPH),
        "bare_proxy": Contender(server="bare", model=MODEL),
        "stategraph_proxy": Contender(server="stategraph", model=MODEL, streams=False),
        "litellm": Contender(server=LITELLM, model=EXPERT),
    }
)
"""The lines of the result, by the name they have there."""


def request(url: str, model: str, *, key: str | None = None, stream: bool = False) -> Request:
    """The question to a server, and how a right answer is told."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}
    if stream:
        body["stream"] = True
    return Request.post(url, CHAT, body, first=FIRST, last=(LAST, "[DONE]") if stream else (LAST,), key=key)


def has_litellm(peers: Path) -> bool:
    """Whether the environment of `make peers` is there and has LiteLLM's proxy."""
    return (peers / "bin" / "litellm").is_file()


def litellm_version(peers: Path) -> str | None:
    """Its version, as its installation tells it."""
    found = sorted(peers.glob("lib/python*/site-packages/litellm-[0-9]*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").partition("-")[2] if found else None


def _bare(fleet: Fleet, folder: Path, upstream: str, peers: Path) -> Running:
    return _module("bare", fleet, upstream)


def _stategraph(fleet: Fleet, folder: Path, upstream: str, peers: Path) -> Running:
    return _module("stategraph", fleet, upstream)


def _module(name: str, fleet: Fleet, upstream: str) -> Running:
    command = [sys.executable, "-m", f"benchmarks.gateway_parts.{name}", "--upstream", upstream]
    return Running(server=fleet.start(name, command))


AGORA_TOML: Final = """
[server]
keys = "keys.json"
requests_per_minute = 1000000000

[nodes.upstream]
kind = "openai"
url = "{upstream}/v1"
model = "{model}"

[nodes.paced]
kind = "openai"
url = "{upstream}/v1"
model = "{paced}"

[experts.{expert}]
node = "upstream"
description = "Knows the history of cities."
keywords = ["history", "city"]

[experts.{paced_expert}]
node = "paced"
description = "Knows the same, and takes its time."

[graph]
planner = "static"
router = "keywords"

[[graph.subtasks]]
id = "answer"
question = "{{question}}"
expert = "{expert}"

[store]
path = "runs.sqlite"
"""
"""Its defaults, with keys, and a rate limit that counts every request and refuses none."""


def _agora(fleet: Fleet, folder: Path, upstream: str, peers: Path) -> Running:
    config = folder / "agora.toml"
    names = {"model": MODEL, "paced": PACED, "expert": EXPERT, "paced_expert": PACED_EXPERT}
    config.write_text(AGORA_TOML.format(upstream=upstream, **names))
    key = new_key(folder / "keys.json", "benchmark")
    program = Path(sys.executable).with_name("agora")
    command = [str(program), "serve", "--config", str(config), "--port", "0", "--log", str(folder / "agora.jsonl")]
    return Running(server=fleet.start("agora", command), key=key)


def _litellm(fleet: Fleet, folder: Path, upstream: str, peers: Path) -> Running:
    key, port = "sk-of-the-benchmark", free_port()
    config = folder / "litellm.yaml"
    upstream_model = {"model": f"openai/{MODEL}", "api_base": f"{upstream}/v1", "api_key": "none"}
    # JSON is YAML, too.
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": EXPERT, "litellm_params": upstream_model}],
                "general_settings": {"master_key": key},
                "litellm_settings": {"set_verbose": False},
            }
        )
    )
    command = [str(peers / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    env = {
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        # It would fetch its price list from the web at start.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    server = fleet.start(LITELLM, command, url=f"http://127.0.0.1:{port}", env=env)
    return Running(server=server, key=key)


Starter = Callable[[Fleet, Path, str, Path], Running]

SERVERS: Final[Mapping[str, Starter]] = MappingProxyType(
    {"agora": _agora, "bare": _bare, "stategraph": _stategraph, LITELLM: _litellm}
)
"""How each server is started: fleet, folder for its files, the upstream's URL, the environment of peers."""
