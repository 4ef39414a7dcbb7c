"""Several paths behave as one backend does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agora.network.multipath import MultipathBackend
from agora.network.path import Link, Path, Technology
from agora.network.ways import Way
from agora.protocols import Backend, Capabilities, GenerateRequest
from agora.types import AdapterRef
from experts.conformance import BackendConformance
from experts.fake import FakeBackend, question_of

TIMES: dict[str, Any] = {"latency": 0.003, "seconds_per_token": 0.0005}

EVERYTHING = Capabilities(
    completion=True, score=True, logprobs=True, json_schema=True, seed=True, adapters=True, max_context=512
)


def reply(request: GenerateRequest) -> str:
    return f" {question_of(request)}" if request.json_schema is None else json.dumps({"ok": True})


def path(name: str) -> Path:
    link = Link(name=name, source="here", target="cloud", technology=Technology.WIFI)
    return Path(name=name, links=(link,), target="cloud")


def over(*backends: Backend) -> MultipathBackend:
    return MultipathBackend([Way(path=path(f"p{n}"), backend=b) for n, b in enumerate(backends)], name="cloud")


class TestTwoPaths(BackendConformance):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        backend = over(*(FakeBackend(reply, adapters=["med@v1"], capabilities=EVERYTHING, **TIMES) for _ in range(2)))
        yield backend
        await backend.aclose()

    @pytest.fixture
    def adapter(self) -> AdapterRef:
        return AdapterRef.parse("med@v1")


class TestPathsThatClaimDifferentThings(BackendConformance):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        little = FakeBackend(reply, capabilities=Capabilities(completion=True), **TIMES)
        backend = over(FakeBackend(reply, capabilities=EVERYTHING, adapters=["med@v1"], **TIMES), little)
        yield backend
        await backend.aclose()


class TestOnePath(BackendConformance):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        backend = over(FakeBackend(reply, max_running=2, capabilities=EVERYTHING, adapters=["med@v1"], **TIMES))
        yield backend
        await backend.aclose()

    @pytest.fixture
    def adapter(self) -> AdapterRef:
        return AdapterRef.parse("med@v1")
