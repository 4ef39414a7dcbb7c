"""`agora ask`: an answer and its trace, within the limits, or one clear error."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import termios

import pytest

from agora.errors import StoreError
from agora.types import MAX_QUESTION_CHARS, RunResult

TWO = "What is a bond? Explain photosynthesis to a school class."


def test_the_answer_goes_to_stdout_and_what_happens_to_stderr(agora, fake):
    said = agora("ask", TWO)
    assert said.code == 0
    assert "A loan one can sell." in said.out
    assert "forty-three" in said.out
    assert re.search(r"2 of 2 subtasks answered · 2 calls · [\d,]+ tokens \(.*\) · \d", said.out)
    assert "plan by rules: 2 subtasks" in said.err
    assert "t1: asking finance (best keyword match" in said.err
    assert "t2: education answered in" in said.err


def test_without_a_terminal_there_are_no_control_codes(agora, fake):
    fake.write_text(fake.read_text().replace("A loan one can sell.", "\\u001b[31mred\\u0007"))
    said = agora("ask", TWO)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said.out + said.err)
    assert "�[31mred�" in said.out


def test_in_a_terminal_the_subtasks_are_a_live_tree(fake, start):
    fake.write_text(fake.read_text().replace('reply = "forty-three"', 'reply = "forty-three"\nlatency_s = 0.4'))
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (40, 120))
    process = start("ask", TWO, "--run-id", "r", stdout=inside)
    os.close(inside)
    drawn = b""
    with contextlib.suppress(OSError):  # what Linux raises once the other end is closed
        while piece := os.read(terminal, 65536):
            drawn += piece
    os.close(terminal)
    assert process.wait(30) == 0
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode()).replace("\r", "")
    assert "1 of 2 subtasks answered · plan by rules" in screen
    last = screen[screen.rindex("2 of 2 subtasks answered · plan by rules") :]
    assert "├── ✓ t1  What is a bond?" in last
    assert "└── ✓ t2  Explain photosynthesis to a school class." in last
    assert last.index("t2  Explain") < last.index("\nA loan one can sell.") < last.index("run r")
    assert b"\x1b[?25h" in drawn, "the cursor is shown again"


def test_json_is_the_whole_result_and_nothing_else(agora, fake):
    said = agora("ask", TWO, "--json", "--run-id", "mine")
    assert said.code == 0
    assert said.err == ""
    result = RunResult.from_dict(said.json)
    assert result.complete
    assert result.run == "mine"
    assert result.question == TWO
    assert [result.attempts[s.id][-1].expert for s in result.graph] == ["finance", "education"]


def test_a_question_can_come_from_standard_input(agora, fake):
    said = agora("ask", "-", "--json", stdin="﻿What is a bond?\n".encode())
    assert said.json["question"] == "What is a bond?"


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        (b"", "question is empty"),
        (b" \n\t", "question is empty"),
        (b"what is \xff\xfe?", "standard input is not valid UTF-8: byte 0xff at position 8"),
        (b"x" * (4 * MAX_QUESTION_CHARS + 1), "more than 400,000 bytes"),
        (b"x" * (MAX_QUESTION_CHARS + 1), "question has 100,001 characters; at most 100,000 are allowed"),
        (b"a\x00b", "NUL"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(agora, fake, stdin, told):
    said = agora("ask", "-", stdin=stdin)
    assert said.code == 1
    assert told in said.error
    assert said.out == ""
    assert agora("ask", "-", "--json", stdin=stdin).json["error"]["code"] == "invalid_request"


def test_an_argument_that_is_not_utf8_is_one_clear_error(agora, fake):
    said = agora("ask", "what is \udcff?")
    assert said.code == 1
    assert "not valid Unicode" in said.error


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--deadline", "-1", "--deadline is -1.0; it must be a positive number"),
        ("--deadline", "nan", "--deadline is nan"),
        ("--cost", "0", "--cost is 0.0"),
        ("--tokens", "-5", "--tokens is -5"),
        ("--planner", "rule", "--planner 'rule' is unknown; allowed: rules, none, llm, static"),
        ("--graph", "diagonal", "--graph 'diagonal' is unknown; allowed: horizontal"),
        ("--planner", "llm", 'graph.planner_expert: is required for planner = "llm"; allowed: finance, education'),
        ("--planner", "static", "graph.subtasks: a fixed plan needs both"),
        ("--run-id", "../x", "run id '../x' must match"),
        ("--config", "nowhere.toml", "nowhere.toml does not exist"),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_one_clear_error(agora, fake, option, value, told):
    said = agora("ask", "What is a bond?", f"{option}={value}")
    assert said.code == 1
    assert told in said.error


def test_every_problem_of_the_configuration_is_told(agora, home):
    (home / "agora.toml").write_text(
        '[nodes.n]\nkind = "fake"\n[experts.a]\nnode = "m"\nready = "finanse"\n[graph]\nplanner = "rule"\n'
    )
    said = agora("ask", "q?")
    assert said.code == 1
    assert "agora.toml: 3 problems" in said.error
    assert 'experts.a.ready = "finanse": did you mean "finance"?' in said.err
    assert 'graph.planner = "rule": did you mean "rules"?' in said.err
    assert 'experts.a.node = "m": not in [nodes]' in said.err


def test_at_the_deadline_it_returns_what_it_has_and_says_what_is_missing(agora, fake):
    fake.write_text(fake.read_text().replace('reply = "forty-three"', 'fail = "hang"'))
    said = agora("ask", TWO, "--deadline", "0.3")
    assert said.code == 3
    assert "A loan one can sell." in said.out
    assert "Missing from this answer:" in said.out
    assert "photosynthesis" in said.out
    assert "1 of 2 subtasks answered" in said.out


def test_a_failing_expert_is_replaced_by_another_and_this_is_told(agora, fake):
    fake.write_text(fake.read_text().replace('reply = "forty-three"', 'fail = "unavailable"'))
    said = agora("ask", TWO)
    assert said.code == 0
    assert "Plants eat light." in said.out
    assert "t2: education failed" in said.err
    assert "t2: asking finance, attempt 2 (education failed;" in said.err


def test_when_nobody_can_answer_the_result_says_so(agora, fake):
    fake.write_text(
        '[nodes.n]\nkind = "fake"\nfail = "rejected"\n[experts.a]\nnode = "n"\ndescription = "d"\n'
        '[graph]\nrouter = "keywords"\n[store]\npath = "runs.sqlite"\n'
    )
    said = agora("ask", "What is a bond?", "--json")
    assert said.code == 3
    assert said.json["missing"] == ["t1"]
    assert not said.json["complete"]


def test_a_run_is_written_down_before_any_work_begins(agora, home):
    (home / "agora.toml").write_text(
        '[models.m]\nsource = "./nothing"\n[nodes.n]\nkind = "local"\nmodel = "m"\n'
        '[experts.a]\nnode = "n"\ndescription = "d"\n[graph]\nrouter = "keywords"\n[store]\npath = "runs.sqlite"\n'
    )
    said = agora("ask", "What is a bond?", "--run-id", "r", "--no-pull")
    assert said.code == 1
    assert "nothing" in said.error
    record = agora("runs", "show", "r", "--json").json
    assert record["question"] == "What is a bond?"
    assert record["status"] == "failed"
    assert "nothing" in record["error"]


def test_a_run_id_is_used_once(agora, fake):
    assert agora("ask", "What is a bond?", "--run-id", "r").code == 0
    said = agora("ask", "What is a bond?", "--run-id", "r")
    assert said.code == 1
    assert "'r' is already in the store" in said.error


def test_no_store_keeps_nothing(agora, fake):
    assert agora("ask", "What is a bond?", "--no-store").code == 0
    assert not (fake.parent / "runs.sqlite").exists()


def test_a_store_that_is_none_is_one_clear_error(agora, fake):
    (fake.parent / "runs.sqlite").write_bytes(b"no database " * 100)
    said = agora("ask", "What is a bond?", "--json")
    assert said.code == 1
    assert said.json["error"]["code"] == "store"
    assert "runs.sqlite" in said.error
    assert agora("ask", "What is a bond?", "--no-store").code == 0


def test_a_full_disk_under_the_store_is_one_clear_error_and_the_next_run_works(agora, fake, start):
    assert agora("ask", "What is a bond?", "--run-id", "before").code == 0
    full = (fake.parent / "runs.sqlite").stat().st_size + 4096
    process = start(
        "ask",
        "What is a bond? " + "Explain photosynthesis. " * 1000,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (full, full)),
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "run store" in errors[0]
    assert "Traceback" not in err
    assert agora("runs", "show", "before").code == 0
    assert agora("ask", "What is a bond?").code == 0


def test_the_planner_can_be_changed_for_one_question(agora, fake):
    fake.write_text(
        fake.read_text().replace("[graph]\n", '[graph]\nplanner_expert = "finance"\nsynthesiser = "sections"\n')
    )
    said = agora("ask", TWO, "--planner", "llm", "--json")
    assert said.code == 0
    assert said.json["planner"] == "rules"
    assert any("rules" in note for note in said.json["notes"]), said.json["notes"]


def test_where_the_embedding_model_is_missing_keywords_choose_and_the_result_says_so(agora, fake):
    fake.write_text(fake.read_text().replace('router = "keywords"', 'router = "embedding"'))
    said = agora("ask", "What is a bond?", "--no-pull", "--json")
    assert said.code == 0
    assert "experts are chosen by keywords" in said.json["notes"][0]
    assert "agora models pull minilm-l6" in said.json["notes"][0]
    assert "note: experts are chosen by keywords" in agora("ask", "What is a bond?", "--no-pull").out


def test_a_missing_api_key_is_told_by_its_variable(agora, fake):
    fake.write_text(
        '[nodes.n]\nkind = "openai"\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\napi_key_env = "THE_KEY"\n'
        '[experts.a]\nnode = "n"\ndescription = "d"\n[store]\npath = "runs.sqlite"\n'
    )
    said = agora("ask", "q?")
    assert said.code == 1
    assert "nodes.n.api_key_env: the environment variable THE_KEY is not set" in said.error


def test_a_key_never_shows(agora, fake, monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-verysecret")
    fake.write_text(
        '[nodes.n]\nkind = "openai"\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\napi_key_env = "THE_KEY"\n'
        'connect_timeout_s = 1\n[experts.a]\nnode = "n"\ndescription = "d"\n'
        '[graph]\nrouter = "keywords"\nmax_attempts = 1\n[store]\npath = "runs.sqlite"\n'
    )
    said = agora("--debug", "ask", "q?", "--deadline", "1")
    everything = said.out + said.err + agora("--debug", "doctor").out + agora("experts", "show", "a").out
    assert "127.0.0.1:9" in said.out
    assert "verysecret" not in everything


def test_a_result_that_cannot_be_written_down_is_told_with_the_answer(agora, fake, monkeypatch):
    from graphs.store import RunStore

    async def full(self, *args, **options):
        raise StoreError("the disk is full")

    monkeypatch.setattr(RunStore, "finish", full)
    said = agora("ask", "What is a bond?", "--json")
    assert said.code == 0
    assert said.json["text"] == "A loan one can sell."
    assert said.json["notes"] == ["the result could not be written down: the disk is full"]
    assert "note: the result could not be written down: the disk is full" in agora("ask", "What is a bond?").out


def test_an_error_after_the_run_was_written_down_names_the_run(agora, home, monkeypatch):
    (home / "agora.toml").write_text(
        '[models.m]\nsource = "./nothing"\n[nodes.n]\nkind = "local"\nmodel = "m"\n'
        '[experts.a]\nnode = "n"\ndescription = "d"\n[graph]\nrouter = "keywords"\n[store]\npath = "runs.sqlite"\n'
    )
    assert agora("ask", "What is a bond?", "--run-id", "r", "--json").json["error"]["run"] == "r"
    said = agora("ask", "What is a bond?", "--run-id", "s")
    assert "agora runs resume s" in said.err.splitlines()[-1]
    assert "run" not in agora("ask", "What is a bond?", "--run-id", "s", "--json").json["error"]  # the id is taken

    from graphs.store import RunStore

    async def full(self, *args, **options):
        raise StoreError("the disk is full")

    monkeypatch.setattr(RunStore, "finish", full)
    notes = agora("ask", "What is a bond?", "--run-id", "t", "--json").json["error"]["notes"]
    assert notes == ["and this could not be written down: the disk is full"]
