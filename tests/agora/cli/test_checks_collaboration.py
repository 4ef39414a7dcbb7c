"""What the doctor says of links."""

from __future__ import annotations

from pathlib import Path

from agora.cli.checks import Finding
from agora.cli.checks_collaboration import links, own_addresses
from agora.config import parse_config

BASE = """
[nodes.edge]
kind = "fake"
[nodes.cloud]
kind = "fake"
[experts.law]
node = "edge"
description = "law"
"""


def said(more: str) -> list[Finding]:
    return list(links(parse_config(BASE + more, file=Path("/x/agora.toml"))))


def test_a_horizontal_graph_without_links_is_nothing_to_speak_of() -> None:
    assert said("") == []


def test_several_ways_are_missed_where_they_are_asked_for() -> None:
    [found] = said('[graph]\nname = "multi_access"')
    assert found.status == "note"
    assert "one way to every expert" in found.detail
    assert said('also = ["cloud"]\n[graph]\nname = "multi_access"') == []


def test_an_address_of_another_machine_fails_and_says_which_ones_are_here() -> None:
    [found] = said('[links.wifi]\ntarget = "edge"\ntechnology = "wifi"\nlocal_address = "203.0.113.7"')
    assert found.status == "fail"
    assert "links.wifi.local_address = '203.0.113.7'" in found.detail
    assert found.hint is not None
    assert "127.0.0.1" in found.hint


def test_what_is_no_address_fails_too() -> None:
    [found] = said('[links.wifi]\ntarget = "edge"\ntechnology = "wifi"\nlocal_address = "eth0"')
    assert found.status == "fail"


def test_links_to_experts_are_fine_and_a_link_to_nobody_is_told() -> None:
    good = '[links.wifi]\ntarget = "edge"\ntechnology = "wifi"\nlocal_address = "127.0.0.1"\n'
    assert [(f.status, f.detail) for f in said(good)] == [("ok", "1 link")]
    [found] = said(good + '[links.lte]\ntarget = "cloud"\ntechnology = "4g"\n')
    assert found.status == "note"
    assert "over lte" in found.detail


def test_a_trace_that_cannot_be_played_fails() -> None:
    [found] = said('[links.wifi]\ntarget = "edge"\ntechnology = "wifi"\ntrace = "gone.csv"')
    assert found.status == "fail"
    assert "links.wifi.trace: /x/gone.csv is not there" in found.detail


def test_this_machine_has_a_loopback_address() -> None:
    assert "127.0.0.1" in own_addresses()
