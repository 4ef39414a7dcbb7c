"""`agora runs`: what was asked is kept, and what was interrupted goes on."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from contextlib import closing, suppress

import pytest

from agora.types import RunResult

SLOW = """
[nodes.quick]
kind = "fake"
reply = "quick answer"
[nodes.slow]
kind = "fake"
reply = "slow answer"
latency_s = 600
[experts.finance]
node = "quick"
ready = "finance"
[experts.education]
node = "slow"
ready = "education"
[graph]
router = "keywords"
[store]
path = "runs.sqlite"
"""

TWO = "What is a bond? Explain photosynthesis to a school class."


def begun(process) -> list[str]:
    """Reads what a run says until its first subtask is answered and its second one is being answered."""
    told = []
    for line in process.stderr:
        told.append(line)
        if "finance answered" in line:
            return told
    raise AssertionError(told)


def until_written(store, text: bytes) -> None:
    """Waits until a checkpoint holds that text: an answer is told some milliseconds before it is on disk."""
    until = time.monotonic() + 10
    with closing(sqlite3.connect(store)) as db:
        while time.monotonic() < until:
            with suppress(sqlite3.OperationalError):  # there is no table yet
                if any(text in value for (value,) in db.execute("SELECT value FROM writes")):
                    return
            time.sleep(0.01)
    raise AssertionError("the answer never reached the checkpoint")


def test_runs_are_listed_newest_first(agora, fake):
    for name in ("first", "second"):
        agora("ask", "What is a bond?", "--run-id", name)
        time.sleep(0.01)
    lines = agora("runs", "list").out.splitlines()
    assert lines[0].split() == ["id", "status", "began", "took", "question"]
    assert [line.split()[:2] for line in lines[1:]] == [["second", "done"], ["first", "done"]]
    assert agora("runs").out.splitlines()[1].startswith("second")
    runs = agora("runs", "list", "--limit", "1", "--json").json["runs"]
    assert [r["id"] for r in runs] == ["second"]
    assert runs[0]["status"] == "done"


def test_without_runs_the_list_is_empty_and_says_what_to_do(agora, fake):
    said = agora("runs", "list")
    assert (said.code, said.out) == (0, "")
    assert "agora ask" in said.err
    assert agora("runs", "list", "--json").json == {"runs": []}


def test_a_run_is_shown_with_all_its_attempts(agora, fake):
    fake.write_text(fake.read_text().replace('reply = "forty-three"', 'fail = "unavailable"'))
    agora("ask", TWO, "--run-id", "r")
    said = agora("runs", "show", "r")
    assert said.code == 0
    assert "r  done" in said.out
    assert "1. education · " in said.out
    assert "unavailable" in said.out
    assert "2. finance · " in said.out
    assert "Plants eat light." in said.out
    assert "2 of 2 subtasks answered" in said.out
    assert RunResult.from_dict(agora("runs", "show", "r", "--json").json["result"]).run == "r"


@pytest.mark.parametrize("command", ["show", "resume"])
def test_an_unknown_run_is_one_clear_error(agora, fake, command):
    said = agora("runs", command, "nothing")
    assert said.code == 1
    assert "no run 'nothing' is in the store" in said.error
    assert "agora runs list" in said.err


def test_a_finished_run_cannot_be_resumed(agora, fake):
    agora("ask", "What is a bond?", "--run-id", "r")
    said = agora("runs", "resume", "r")
    assert said.code == 1
    assert "run 'r' already came to its end: done" in said.error
    assert "agora runs show r" in said.err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_run_goes_on_without_asking_again_what_was_answered(agora, home, start, sent, code):
    config = home / "agora.toml"
    config.write_text(SLOW)
    process = start("ask", TWO, "--run-id", "r")
    begun(process)
    until_written(home / "runs.sqlite", b"quick answer")
    os.kill(process.pid, sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    if sent == signal.SIGINT:
        assert "go on with: agora runs resume r" in err
    record = agora("runs", "show", "r", "--json").json
    assert record["status"] == "interrupted"
    assert record["result"] is None
    assert "go on with: agora runs resume r" in agora("runs", "show", "r").err

    # Were the answered part asked again, the answer would now be another one.
    config.write_text(SLOW.replace("latency_s = 600\n", "").replace("quick answer", "another answer"))
    said = agora("runs", "resume", "r")
    assert said.code == 0
    assert "quick answer" in said.out
    assert "slow answer" in said.out
    assert "another answer" not in said.out
    assert agora("runs", "show", "r", "--json").json["status"] == "done"


def test_a_run_that_is_being_worked_on_is_not_resumed_by_another_process(agora, home, start):
    (home / "agora.toml").write_text(SLOW)
    process = start("ask", TWO, "--run-id", "r")
    begun(process)
    said = agora("runs", "resume", "r")
    assert said.code == 1
    assert "being worked on" in said.error
    assert process.poll() is None


def test_a_run_that_failed_before_it_began_starts_from_its_question(agora, home):
    config = home / "agora.toml"
    config.write_text(
        '[models.m]\nsource = "./nothing"\n[nodes.quick]\nkind = "local"\nmodel = "m"\n'
        '[experts.finance]\nnode = "quick"\nready = "finance"\n'
        '[graph]\nrouter = "keywords"\n[store]\npath = "runs.sqlite"\n'
    )
    assert agora("ask", "What is a bond?", "--run-id", "r").code == 1
    config.write_text(config.read_text().replace('kind = "local"\nmodel = "m"', 'kind = "fake"\nreply = "a loan"'))
    said = agora("runs", "resume", "r", "--json")
    assert said.code == 0
    assert said.json["text"] == "a loan"
    assert said.json["question"] == "What is a bond?"


def test_a_run_goes_on_with_the_configuration_it_began_with(agora, home, tmp_path):
    other = tmp_path / "other.toml"
    text = SLOW.replace("latency_s = 600\n", "").replace('path = "runs.sqlite"', f'path = "{home / "runs.sqlite"}"')
    other.write_text(
        text.replace('kind = "fake"\nreply = "quick answer"', 'kind = "local"\nmodel = "m"')
        + ('[models.m]\nsource = "./nothing"\n')
    )
    assert agora("ask", "What is a bond?", "--run-id", "r", "--config", str(other)).code == 1
    other.write_text(text)
    # The folder's own configuration has nobody but a failing expert; it only tells where the store is.
    (home / "agora.toml").write_text(SLOW.replace('reply = "quick answer"', 'fail = "rejected"'))
    said = agora("runs", "resume", "r")
    assert said.code == 0
    assert "quick answer" in said.out


def test_without_its_configuration_a_run_says_what_is_missing(agora, home, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(
        '[nodes.n]\nkind = "openai"\nurl = "http://h/v1"\nmodel = "m"\napi_key_env = "THE_KEY"\n'
        '[experts.a]\nnode = "n"\ndescription = "d"\n[store]\npath = "work/runs.sqlite"\n'
    )
    (home / "agora.toml").write_text(SLOW)
    assert agora("ask", "What is a bond?", "--run-id", "r", "--config", str(other)).code == 1
    other.unlink()
    said = agora("runs", "resume", "r")
    assert said.code == 1
    assert f"{other} does not exist" in said.error


def test_a_run_that_was_stopped_before_its_result_was_written_down_still_has_it(agora, fake):
    assert agora("ask", "What is a bond?", "--run-id", "r").code == 0
    with closing(sqlite3.connect(fake.parent / "runs.sqlite")) as db:
        db.execute("UPDATE runs SET status = 'interrupted', result = NULL, finished_at = NULL, owner = NULL")
        db.commit()
    fake.write_text(fake.read_text().replace("A loan one can sell.", "Something else."))
    said = agora("runs", "resume", "r")
    assert said.code == 0
    assert "A loan one can sell." in said.out
    assert agora("runs", "show", "r", "--json").json["result"]["text"] == "A loan one can sell."


def test_ctrl_c_is_one_json_object_where_json_was_asked_for(home, start):
    (home / "agora.toml").write_text(SLOW)
    process = start("ask", TWO, "--run-id", "r", "--json")
    until_written(home / "runs.sqlite", b"quick answer")
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out) == {
        "error": {
            "code": "interrupted",
            "message": "stopped by Ctrl-C",
            "hint": "agora runs resume r",
            "run": "r",
        }
    }


@pytest.mark.parametrize("limit", ["0", "-1", "10001", "9999999999999999999999"])
def test_a_limit_out_of_range_is_one_clear_error(agora, fake, limit):
    said = agora("runs", "list", f"--limit={limit}")
    assert said.code == 1
    assert said.error == f"error: --limit is {limit}; it must be from 1 to 10000"


@pytest.mark.parametrize("command", ["show", "resume"])
@pytest.mark.parametrize("run_id", ["a\udcff", "a b", ""])
def test_what_can_be_no_id_is_one_clear_error(agora, fake, command, run_id):
    said = agora("runs", command, run_id)
    assert said.code == 1
    assert "must match" in said.error


def test_an_interrupted_run_says_that_its_answers_are_shown_later(agora, fake):
    assert agora("ask", "What is a bond?", "--run-id", "r").code == 0
    with closing(sqlite3.connect(fake.parent / "runs.sqlite")) as db:
        db.execute("UPDATE runs SET status = 'interrupted', result = NULL, finished_at = NULL, owner = NULL")
        db.commit()
    assert "it is shown when the run is done" in agora("runs", "show", "r").err


def test_what_happened_in_a_run_is_shown_event_by_event(agora, fake):
    agora("ask", TWO, "--run-id", "r")
    said = agora("runs", "show", "r", "--events")
    assert said.code == 0
    head, *lines = said.out.splitlines()
    assert head == "r  done"
    whole = "\n".join(lines)
    for part in (
        "run r",
        "plan by rules: 2 subtasks",
        "asking finance",
        "finance answered in",
        "ended: 2 of 2 subtasks",
    ):
        assert part in whole, part
    numbers = [int(line.split()[0]) for line in lines if line.strip()[0].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1))
    events = agora("runs", "show", "r", "--events", "--json").json["events"]
    assert [e["seq"] for e in events] == numbers
    assert [e["type"] for e in events][:2] == ["RunStarted", "Planned"]
    assert events[-1]["type"] == "RunFinished"
    assert "events" not in agora("runs", "show", "r", "--json").json


def test_a_failed_run_tells_why_among_its_events_and_goes_on_in_the_next_leg(agora, home):
    config = home / "agora.toml"
    config.write_text(
        '[models.m]\nsource = "./nothing"\n[nodes.quick]\nkind = "local"\nmodel = "m"\n'
        '[experts.finance]\nnode = "quick"\nready = "finance"\n'
        '[graph]\nrouter = "keywords"\n[store]\npath = "runs.sqlite"\n'
    )
    assert agora("ask", "What is a bond?", "--run-id", "r").code == 1
    config.write_text(config.read_text().replace('kind = "local"\nmodel = "m"', 'kind = "fake"\nreply = "a loan"'))
    assert "failed: " in agora("runs", "show", "r", "--events").out
    assert agora("runs", "resume", "r").code == 0
    types = [e["type"] for e in agora("runs", "show", "r", "--events", "--json").json["events"]]
    assert types == ["RunFailed", "RunStarted", "Planned", "AttemptStarted", "AttemptEnded", "RunFinished"]


def test_a_run_goes_on_with_the_planner_and_the_limits_of_its_first_call(agora, home):
    config = home / "agora.toml"
    static = SLOW.replace("latency_s = 600\n", "").replace(
        "[graph]\n",
        '[[graph.subtasks]]\nid = "only"\nquestion = "What is a bond?"\nexpert = "finance"\n'
        '[graph]\nplanner = "static"\ntokens = 5000\n',
    )
    # Without its expert's model the run ends before its first checkpoint.
    config.write_text(
        static.replace('kind = "fake"\nreply = "quick answer"', 'kind = "local"\nmodel = "m"')
        + '[models.m]\nsource = "./nothing"\n'
    )
    assert agora("ask", TWO, "--run-id", "r", "--planner", "rules", "--tokens", "9").code == 1
    record = agora("runs", "show", "r", "--json").json
    assert (record["planner"], record["budget"]["tokens"]) == ("rules", 9)
    config.write_text(static)
    said = agora("runs", "resume", "r", "--json")
    assert said.json["planner"] == "rules"
    assert len(said.json["graph"]["subtasks"]) == 2
    # Nine tokens do not even pay for a prompt.
    assert said.code == 3
    assert {a[-1]["outcome"]["code"] for a in said.json["attempts"].values()} == {"budget"}


def test_a_cancelled_run_is_shown_as_such_and_not_gone_on_with(agora, fake):
    assert agora("ask", "What is a bond?", "--run-id", "r").code == 0
    with closing(sqlite3.connect(fake.parent / "runs.sqlite")) as db:
        db.execute("UPDATE runs SET status = 'cancelled', result = NULL, error = 'enough', owner = NULL")
        db.commit()
    assert agora("runs", "list").out.splitlines()[1].split()[:2] == ["r", "cancelled"]
    said = agora("runs", "show", "r")
    assert said.out.startswith("r  cancelled")
    assert "error: enough" in said.out
    assert "go on with" not in said.err
    said = agora("runs", "resume", "r")
    assert said.code == 1
    assert "run 'r' was cancelled" in said.error
