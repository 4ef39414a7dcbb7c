"""`agora ask --reach`: how far a question may go."""

from __future__ import annotations

import pytest

TWO = "What is a bond? Explain photosynthesis to a school class."


@pytest.fixture
def climbing(fake):
    """One expert on this machine, one in the cloud."""
    text = fake.read_text()
    fake.write_text(text.replace('reply = "forty-three"', 'reply = "forty-three"\ntier = "cloud"'))
    return fake


def test_nobody_above_the_label_is_asked_and_the_run_remembers_it(agora, climbing):
    assert {a["expert"] for a in attempts(agora("ask", TWO, "--json").json)} == {"finance", "education"}
    result = agora("ask", TWO, "--json", "--reach", "local", "--run-id", "r1").json
    assert {a["expert"] for a in attempts(result)} == {"finance"}
    assert {s["reach"] for s in result["graph"]["subtasks"]} == {"local"}
    assert agora("runs", "show", "r1", "--json").json["reach"] == "local"
    assert "no further than local" in agora("runs", "show", "r1").out


def attempts(result):
    """All attempts of a result."""
    return [a for many in result["attempts"].values() for a in many]


def test_an_unknown_label_is_one_clear_error(agora, climbing):
    said = agora("ask", TWO, "--reach", "mars")
    assert said.code == 1
    assert said.error == "error: --reach is 'mars'; allowed: local, edge, cloud"


def test_a_fixed_plan_labels_its_subtasks(agora, climbing):
    climbing.write_text(
        climbing.read_text().replace('router = "keywords"', 'router = "keywords"\nplanner = "static"')
        + """
[[graph.subtasks]]
id = "facts"
question = "Which facts matter to photosynthesis here? {question}"
reach = "local"

[[graph.subtasks]]
id = "use"
question = "Explain photosynthesis with #facts"
inputs = ["facts"]

[[graph.subtasks]]
id = "free"
question = "What is photosynthesis?"
"""
    )
    result = agora("ask", "leaves", "--json").json
    assert {s["id"]: s["reach"] for s in result["graph"]["subtasks"]} == {
        "facts": "local",
        "use": "local",
        "free": "cloud",
    }
    assert {i: many[-1]["expert"] for i, many in result["attempts"].items()} == {
        "facts": "finance",
        "use": "finance",
        "free": "education",
    }


def test_a_named_expert_out_of_reach_says_so(agora, climbing):
    plan = '\n[[graph.subtasks]]\nid = "t"\nquestion = "{question}"\nexpert = "education"\nreach = "end"\n'
    climbing.write_text(
        climbing.read_text().replace('router = "keywords"', 'router = "keywords"\nplanner = "static"') + plan
    )
    said = agora("ask", "leaves")
    assert said.code == 3
    assert "names expert 'education', which may not see it" in said.out


def test_a_wrong_label_in_the_configuration_is_told_with_those_allowed(agora, climbing):
    plan = '\n[[graph.subtasks]]\nid = "t"\nquestion = "q"\nreach = "mars"\n'
    climbing.write_text(climbing.read_text().replace("[graph]", '[graph]\nplanner = "static"') + plan)
    said = agora("ask", "leaves")
    assert said.code == 1
    assert "reach" in said.err and "must be one of local, edge, cloud" in said.err and "mars" in said.err
