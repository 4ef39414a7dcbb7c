"""The gateway does what its OpenAPI document says: requests made from it by schemathesis, every response checked.

Checked are: no 5xx, only statuses, content types, headers and bodies that the document tells, and no request accepted
that the document forbids.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from agora.serve.keys import new_key
from agora.serve.openapi import document
from benchmarks.gateway_parts.fleet import Fleet

TOML = """
[server]
keys = "keys.json"

[nodes.echo]
kind = "fake"

[experts.echo]
node = "echo"
description = "Says it again."

[graph]
planner = "static"
router = "keywords"

[[graph.subtasks]]
id = "here"
question = "{question}"
expert = "echo"

[store]
path = "runs.sqlite"
"""

# The same requests each time: a run that others wait for should not fail by luck. Raise `max_examples` to hunt.
quickly = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

schema = schemathesis.openapi.from_dict(document())


@dataclass(frozen=True)
class Gateway:
    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("schema")
    key = new_key(folder / "keys.json", "tests")
    (folder / "agora.toml").write_text(TOML)
    program = Path(sys.executable).with_name("agora")
    command = [str(program), "serve", "--config", str(folder / "agora.toml"), "--port", "0"]
    with Fleet(folder) as fleet:
        server = fleet.start("gateway", [*command, "--log", str(folder / "log.jsonl")])
        yield Gateway(url=asyncio.run(server.listening()), key=key)
        assert server.process.poll() is None, server.said()


def ask(case: Any, gateway: Gateway) -> int:
    """Sends the request and holds the response to the document; gives its status."""
    # Some fields rule out others, and some models take less than others do: no schema of the body tells that.
    excluded = [positive_data_acceptance] if case.operation.body else []
    response = case.call_and_validate(
        base_url=gateway.url, headers=gateway.headers, timeout=20, excluded_checks=excluded
    )
    return int(response.status_code)


def test_the_document_served_is_the_one_tested(gateway: Gateway) -> None:
    served = httpx.get(f"{gateway.url}/openapi.json", headers=gateway.headers)
    assert served.status_code == 200 and served.json() == document()


@schema.parametrize()
@quickly
def test_every_response_is_as_documented(case: Any, gateway: Gateway) -> None:
    ask(case, gateway)


@pytest.mark.parametrize("model", ["echo", "agora"])
@schema.include(method="POST", path_regex="completions$").parametrize()
@quickly
def test_so_are_the_answers_of_those_who_exist(case: Any, gateway: Gateway, model: str) -> None:
    # Only in requests that are right otherwise: in others the model's name may be what is wrong.
    if isinstance(case.body, dict) and case.meta.generation.mode.is_positive:
        case.body["model"] = model
    ask(case, gateway)


MESSAGES = [{"role": "user", "content": "Where does the river run?"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "echo", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 5}),
        ("/v1/chat/completions", {"model": "echo", "messages": MESSAGES, "stream": True}),
        ("/v1/chat/completions", {"model": "agora", "messages": MESSAGES}),
        ("/v1/chat/completions", {"model": "agora", "messages": MESSAGES, "stream": True}),
        ("/v1/completions", {"model": "echo", "prompt": "Once upon a time"}),
    ],
)
def test_right_requests_are_answered_as_documented(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    """What is drawn at random may hit none of them."""
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    assert ask(case, gateway) == 200


@pytest.fixture(scope="module")
def run_id(gateway: Gateway) -> str:
    """A run that has ended."""
    with httpx.Client(base_url=gateway.url, headers=gateway.headers) as client:
        made = client.post("/v1/runs", json={"question": "Where does the river run?"})
        assert made.status_code == 202, made.text
        told = client.get(f"/v1/runs/{made.json()['id']}/events", headers={"Accept": "text/event-stream"})
        assert told.status_code == 200
        return str(made.json()["id"])


@schema.include(path_regex=r"\{id\}").parametrize()
@quickly
def test_so_is_what_is_told_of_a_run_that_exists(case: Any, gateway: Gateway, run_id: str) -> None:
    case.path_parameters = {"id": run_id}
    ask(case, gateway)


@schema.exclude(path=["/healthz", "/readyz"]).parametrize()
@settings(quickly, max_examples=5)
def test_without_a_key_everything_is_refused_as_documented(case: Any, gateway: Gateway) -> None:
    response = case.call(base_url=gateway.url, headers={"Authorization": "Bearer agora-wrong"}, timeout=20)
    # 405 and the like come of methods that the document does not know.
    assert response.status_code == 401
    case.validate_response(response)
