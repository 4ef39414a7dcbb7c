"""`agora experts`: who is here, and who would be asked."""

from __future__ import annotations


def test_the_configured_experts_are_listed(agora, fake):
    said = agora("experts", "list")
    assert said.code == 0
    rows = [line.split()[:3] for line in said.out.splitlines()]
    assert rows == [["name", "tier", "node"], ["finance", "end", "quick"], ["education", "end", "other"]]
    assert agora("experts").out == said.out


def test_without_a_file_these_are_the_ready_ones(agora, home):
    names = [e["name"] for e in agora("experts", "list", "--json").json["experts"]]
    assert names == ["communications", "robotics", "healthcare", "finance", "education"]


def test_the_ready_ones_can_be_listed_whatever_the_file_says(agora, home):
    (home / "agora.toml").write_text("nonsense")
    lines = agora("experts", "list", "--ready").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "communications", "robotics", "healthcare", "finance", "education",
    ]  # fmt: skip


def test_one_is_shown_with_its_prompt_and_examples(agora, fake):
    said = agora("experts", "show", "finance")
    assert said.code == 0
    assert "quick (end), a script" in said.out
    assert "central bank" in said.out
    plain = agora("experts", "show", "finance", "--json").json
    assert plain["ready"] == "finance"
    assert plain["system_prompt"] in said.out


def test_an_unknown_one_is_an_error_that_names_those_there_are(agora, fake):
    said = agora("experts", "show", "law")
    assert said.code == 1
    assert "no expert 'law'; there are: finance, education" in said.error


def test_routing_is_explained_and_nobody_is_asked(agora, fake):
    fake.write_text(fake.read_text().replace('reply = "forty-three"', 'fail = "hang"'))
    said = agora("experts", "route", "How are bonds and shares taxed?")
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0].startswith("1. finance  best keyword match 0.")
    assert lines[1].startswith("2. education  keyword match 0.")
    found = agora("experts", "route", "Plan a lesson for a class", "--json").json
    assert [c["expert"] for c in found["candidates"]] == ["education", "finance"]


def test_routing_says_when_the_embedding_model_is_missing(agora, fake):
    fake.write_text(fake.read_text().replace('router = "keywords"', 'router = "embedding"'))
    said = agora("experts", "route", "What is a bond?", "--no-pull")
    assert said.code == 0
    assert "note: experts are chosen by keywords" in said.out
