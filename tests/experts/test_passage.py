"""The headers that a request carries from node to node: strict when read, exact when written."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from agora.errors import AgoraError, InvalidRequest, LoopDetected, TooManyHops
from experts.passage import (
    MOST_HOPS,
    Passage,
    current_passage,
    is_node_id,
    is_request_id,
    new_node_id,
    passing,
)

A, B, C = "a" * 16, "b" * 16, "c" * 16


def sent(**headers: str) -> CIMultiDict[str]:
    return CIMultiDict({k.replace("_", "-"): v for k, v in headers.items()})


def test_node_ids_differ_and_are_recognised() -> None:
    ids = {new_node_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(map(is_node_id, ids))
    assert not any(map(is_node_id, ("", "A" * 16, "a" * 15, "a" * 17, "a" * 16 + "\n")))


async def test_an_ordinary_client_has_no_passage() -> None:
    assert Passage.read(sent(X_Request_Id="r1", Agora_Timeout="3"), node=A, max_hops=3) is None
    assert Passage.read({}, node=A, max_hops=3) is None


@pytest.mark.looptime
async def test_what_one_node_writes_the_next_one_reads() -> None:
    begun = Passage.begin(node=A, max_hops=3, request_id="r-1", timeout_s=10)
    await asyncio.sleep(4)
    there = Passage.read(CIMultiDict(begun.headers()), node=B, max_hops=9)
    assert there is not None
    assert (there.hops, there.path, there.request_id) == (2, (A, B), "r-1")
    assert there.left_s == pytest.approx(6)
    onward = Passage.read(CIMultiDict(there.headers(timeout_s=1.5)), node=C, max_hops=9)
    assert onward is not None
    assert (onward.hops, onward.path) == (1, (A, B, C))
    assert onward.left_s == pytest.approx(1.5)


@pytest.mark.looptime
async def test_header_names_are_read_in_any_case_and_time_runs_on() -> None:
    passage = Passage.read(
        CIMultiDict({"agora-hops": "2", "AGORA-PATH": f"{A}, {B}", "agora-timeout": "0.5"}), node=C, max_hops=3
    )
    assert passage is not None
    assert passage.path == (A, B, C)
    await asyncio.sleep(1)
    assert passage.left_s == 0.0


async def test_without_a_time_limit_none_is_sent() -> None:
    passage = Passage.begin(node=A, max_hops=1)
    assert passage.deadline == math.inf
    assert set(passage.headers()) == {"Agora-Hops", "Agora-Path"}


async def test_a_node_grants_no_more_hops_than_its_own_limit() -> None:
    passage = Passage.read(sent(Agora_Hops="16", Agora_Path=A), node=B, max_hops=2)
    assert passage is not None
    assert passage.hops == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"Agora-Hops": "1"},
        {"Agora-Path": A},
        {"Agora-Hops": "", "Agora-Path": A},
        {"Agora-Hops": "-1", "Agora-Path": A},
        {"Agora-Hops": "1.0", "Agora-Path": A},
        {"Agora-Hops": "17", "Agora-Path": A},
        {"Agora-Hops": "٣", "Agora-Path": A},
        {"Agora-Hops": "9" * 5000, "Agora-Path": A},
        {"Agora-Hops": "1", "Agora-Path": ""},
        {"Agora-Hops": "1", "Agora-Path": "somebody"},
        {"Agora-Hops": "1", "Agora-Path": f"{A},"},
        {"Agora-Hops": "1", "Agora-Path": ",".join(new_node_id() for _ in range(MOST_HOPS + 1))},
        {"Agora-Hops": "1", "Agora-Path": "," * 100_000},
        {"Agora-Hops": "1", "Agora-Path": A, "Agora-Timeout": "soon"},
        {"Agora-Hops": "1", "Agora-Path": A, "Agora-Timeout": "-1"},
        {"Agora-Hops": "1", "Agora-Path": A, "Agora-Timeout": "0"},
        {"Agora-Hops": "1", "Agora-Path": A, "Agora-Timeout": "nan"},
        {"Agora-Hops": "1", "Agora-Path": A, "Agora-Timeout": "1e9"},
        {"Agora-Hops": "1", "Agora-Path": A, "Agora-Timeout": "9999999"},
        {"Agora-Hops": "1", "Agora-Path": A, "X-Request-Id": "two words"},
        {"Agora-Hops": "1", "Agora-Path": A, "X-Request-Id": "r" * 129},
    ],
)
async def test_malformed_headers_are_refused_in_a_bounded_error(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Passage.read(CIMultiDict(headers), node=B, max_hops=3)
    assert len(str(refused.value)) < 300


async def test_a_header_may_not_come_twice() -> None:
    headers = CIMultiDict([("Agora-Hops", "1"), ("Agora-Hops", "9"), ("Agora-Path", A)])
    with pytest.raises(InvalidRequest, match="came 2 times"):
        Passage.read(headers, node=B, max_hops=3)


async def test_who_sees_itself_in_the_path_ends_the_loop() -> None:
    with pytest.raises(LoopDetected, match=f"{A} → {B} → {A}") as found:
        Passage.read(sent(Agora_Hops="5", Agora_Path=f"{A},{B}"), node=A, max_hops=9)
    assert found.value.code == "loop_detected"
    assert not found.value.transient


async def test_a_request_passes_only_as_many_machines_as_it_may() -> None:
    passage = Passage(hops=1, path=(A,))
    passage.allow((B,))
    with pytest.raises(TooManyHops, match="pass 2 more machines, and may pass 1") as refused:
        passage.allow((B, C))
    assert refused.value.code == "too_many_hops"
    with pytest.raises(TooManyHops):
        Passage(hops=0, path=(A,)).allow((B,))
    with pytest.raises(LoopDetected):
        Passage(hops=5, path=(A, B)).allow((C, A))


async def test_the_passage_belongs_to_a_block_and_the_tasks_begun_in_it() -> None:
    passage = Passage.begin(node=A, max_hops=1)

    async def seen() -> Passage | None:
        await asyncio.sleep(0)
        return current_passage()

    with passing(passage):
        inside = asyncio.create_task(seen())
    outside = asyncio.create_task(seen())
    assert await inside is passage
    assert await outside is None


@given(st.dictionaries(st.sampled_from(["Agora-Hops", "Agora-Path", "Agora-Timeout", "X-Request-Id"]), st.text()))
def test_whatever_is_sent_is_read_or_refused(headers: dict[str, str]) -> None:
    async def read() -> None:
        try:
            Passage.read(CIMultiDict(headers), node=B, max_hops=3)
        except AgoraError as e:
            assert e.code in {"invalid_request", "loop_detected"}

    asyncio.run(read())


def test_request_ids_are_safe_in_logs() -> None:
    assert is_request_id("req-1.2_3:4")
    assert not any(map(is_request_id, ("", "-x", "a b", "a\n", "é", "a" * 129)))
