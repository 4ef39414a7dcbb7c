"""`agora calibrate`: asks, grades, learns, goes on, and says what it could not do."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time

import pytest

CONFIG = """
[nodes.small]
kind = "fake"
tier = "end"
reply = "I think the answer is 0"
replies = { "easy" = "#### 4", "fair 1" = "#### 4" }

[nodes.big]
kind = "fake"
tier = "cloud"
reply = "#### 4"
replies = { "hard 9" = "#### 1", "easy 7" = "#### 9", "fair 5" = "#### 3" }

[experts.small]
node = "small"
description = "small"
price_per_mtok = 1

[experts.big]
node = "big"
description = "big"
price_per_mtok = 100

[graph]
router = "keywords"

[vertical]
policy = "policy"
"""


@pytest.fixture
def config(home):
    file = home / "agora.toml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def data(home):
    """A function that writes so many questions."""

    def write(n, name="q.jsonl"):
        rows = [{"question": f"{('easy', 'fair', 'hard')[i % 3]} {i}: 2 + 2?", "answer": 4} for i in range(n)]
        (home / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return name

    return write


def test_calibrators_policy_and_guarantee_for_people(agora, config, data):
    config.write_text(CONFIG + "max_risk = 0.05\n")
    said = agora("calibrate", "--data", data(300))
    assert said.code == 0, said.err
    head, small, big = said.out.splitlines()[:3]
    assert head.split() == [
        "expert", "n", "accuracy", "AUROC", "ECE", "AURC", "cost", "seconds", "calibrated", "by",
    ]  # fmt: skip
    assert small.split()[:4] == ["small", "300", "0.463", "1.000"]
    assert big.split()[:2] == ["big", "300"]
    assert "over small, big (top tier: big)" in said.out
    assert "150 questions, 150 held back for the guarantee" in said.out
    assert "certified: it loses at most 0.05 against always the top tier with confidence 0.95" in said.out
    assert "small: 300 of 300" in said.err


def test_what_it_wrote_is_what_answers_are_judged_by(agora, config, data, home):
    from agora.config import load_config
    from agora.square import Expert
    from experts.build import expert_cards
    from experts.fake import FakeBackend
    from graphs.calibrating import load_trust, policy_folder

    assert agora("calibrate", "--data", data(200)).code == 0
    settings = load_config(config)
    experts = [
        Expert(card=c, backend=FakeBackend(name=c.name), node=settings.experts[c.name].node)
        for c in expert_cards(settings)
    ]
    trust = load_trust(policy_folder(settings), experts, config=settings)
    assert trust.notes == ()
    assert trust.models == ("small", "big")
    assert trust.policy() is not None
    assert trust.confidence("small", {"ends_marked": 1.0}) > trust.confidence("small", {"ends_marked": 0.0})


def test_json_is_one_object_and_nothing_certified_is_said(agora, config, data):
    # The small one is always wrong and the big one never, so that nothing can be saved.
    always = CONFIG.replace('replies = { "hard 9" = "#### 1", "easy 7" = "#### 9", "fair 5" = "#### 3" }', "")
    config.write_text(always.replace("#### 4", "four", 2) + "max_risk = 0.02\n")
    plain = agora("calibrate", "--data", data(500), "--json").json
    assert plain["questions"] == 500
    assert [e["version"]["expert"] for e in plain["experts"]] == ["small", "big"]
    assert "none of 500 answers are right" in plain["experts"][0]["why"]
    assert plain["policy"]["kind"] == "always_top"
    assert plain["policy"]["certificate"]["chosen"] is None
    assert plain["policy"]["guarantee"].startswith("nothing certified")


def test_a_second_start_goes_on_and_a_fresh_one_does_not(agora, config, data, home):
    name = data(60)
    assert agora("calibrate", "--data", name, "--limit", "40").code == 0
    journal = home / "policy" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 80
    said = agora("calibrate", "--data", name)
    assert said.code == 0
    assert len(journal.read_text().splitlines()) == 120
    assert "small: 40 of 60 answered before" in said.err
    assert agora("calibrate", "--data", name, "--resume", "--json").json["experts"][0]["n"] == 60
    assert len(journal.read_text().splitlines()) == 120
    assert agora("calibrate", "--data", name, "--fresh").code == 0
    assert len(journal.read_text().splitlines()) == 120
    assert (home / "policy" / "journal.jsonl.old").exists()


def test_another_adapter_is_asked_again(agora, config, data, home):
    from graphs.calibration_folder import current

    name = data(40)
    assert agora("calibrate", "--data", name).code == 0
    config.write_text(CONFIG.replace("[experts.small]", '[experts.small]\nadapter.name = "a@v2"'))
    said = agora("calibrate", "--data", name)
    assert said.code == 0
    assert "small: 40 of 40 answered before" not in said.err
    assert "big: 40 of 40 answered before" in said.err
    assert len(list((current(home / "policy") / "calibrators").glob("small~*.json"))) == 2


def test_a_price_that_is_given_later_counts_without_asking_again(agora, config, data, home):
    config.write_text(CONFIG.replace("price_per_mtok = 100\n", "").replace("price_per_mtok = 1\n", ""))
    name = data(120)
    assert "all experts cost nothing" in agora("calibrate", "--data", name).out
    config.write_text(CONFIG)
    said = agora("calibrate", "--data", name, "--json")
    assert said.json["policy"]["models"] == ["small", "big"]
    assert "all experts" not in str(said.json["notes"])
    assert said.json["experts"][1]["cost"] > 20 * said.json["experts"][0]["cost"] > 0
    assert len((home / "policy" / "journal.jsonl").read_text().splitlines()) == 240


def test_who_is_spoken_to_otherwise_is_asked_again(agora, config, data):
    name = data(40)
    assert agora("calibrate", "--data", name).code == 0
    config.write_text(CONFIG.replace("[experts.big]", '[experts.big]\nsystem_prompt = "Be a pirate."'))
    said = agora("calibrate", "--data", name)
    assert said.code == 0
    assert "small: 40 of 40 answered before" in said.err
    assert "big: 40 of 40 answered before" not in said.err


def test_more_experts_than_a_policy_takes_is_told_and_costs_nothing(agora, config, data):
    more = "".join(f'\n[experts.e{i}]\nnode = "small"\ndescription = "one more"\n' for i in range(7))
    config.write_text(CONFIG.replace("\n[graph]", f"{more}\n[graph]"))
    said = agora("calibrate", "--data", data(40))
    assert said.code == 0
    assert "no policy: 9 experts, and a policy chooses among 8 at most" in said.err
    assert "no policy: 9 experts" in said.out and "small" in said.out


def test_stopped_with_ctrl_c_it_goes_on(agora, config, data, home, start):
    config.write_text(CONFIG.replace('reply = "#### 4"', 'reply = "#### 4"\nlatency_s = 0.15'))
    name = data(150)
    process = start("calibrate", "--data", name)
    journal = home / "policy" / "journal.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and (not journal.exists() or journal.read_text().count('"big"') < 10):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    before = journal.read_text().splitlines()
    assert 10 <= len(before) < 300
    assert all(json.loads(line) for line in before)
    config.write_text(CONFIG)
    assert agora("calibrate", "--data", name, "--json").json["experts"][1]["n"] == 150
    after = journal.read_text().splitlines()
    assert len(after) == 300
    assert after[: len(before)] == before


def test_in_a_terminal_there_is_a_bar_for_each_expert(config, data, start):
    config.write_text(CONFIG.replace('reply = "#### 4"', 'reply = "#### 4"\nlatency_s = 0.05'))
    terminal, inside = pty.openpty()
    process = start("calibrate", "--data", data(60), stderr=inside)
    os.close(inside)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:
        pass  # the terminal's other end is closed
    process.communicate(timeout=30)
    os.close(terminal)
    assert process.returncode == 0
    assert b"/60" in shown and b"big" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "none.jsonl"], "there is no file 'none.jsonl'"),
        (["--data", "empty.jsonl"], "empty.jsonl has no questions"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2 has no 'answer'; it has 'question'"),
        (["--data", "few.jsonl"], "29 questions of few.jsonl; at least 30 are needed"),
        (["--data", "fine.jsonl", "--limit", "10"], "10 questions of fine.jsonl; at least 30 are needed"),
        (["--data", "fine.jsonl", "--experts", "small,nobody"], "no expert 'nobody' in the configuration"),
        (["--data", "fine.jsonl", "--experts", ","], "--experts names nobody"),
        (["--data", "fine.jsonl", "--reach", "mars"], "--reach is 'mars'; allowed: local, edge, cloud"),
        (
            ["--data", "fine.jsonl", "--experts", "big", "--reach", "edge"],
            "big cannot be calibrated: it is on a machine",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anybody_is_asked(agora, config, data, home, arguments, said):
    (home / "empty.jsonl").write_text("")
    (home / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c"}\n')
    data(29, "few.jsonl")
    data(40, "fine.jsonl")
    outcome = agora("calibrate", *arguments)
    assert outcome.code == 1
    assert said in outcome.error
    assert not (home / "policy").exists() or not list((home / "policy").rglob("*~*.json"))
    assert not (home / "policy" / "current.json").exists()
    told = agora("calibrate", *arguments, "--json")
    assert said in told.json["error"]["message"]


def test_only_those_named_are_asked(agora, config, data):
    plain = agora("calibrate", "--data", data(40), "--experts", "small", "--json").json
    assert [e["version"]["expert"] for e in plain["experts"]] == ["small"]
    assert plain["policy"] is None
    assert "at least two experts" in plain["notes"][-1]


def test_an_expert_that_fails_is_reported_and_left_out(agora, config, data):
    broken = (
        '\n[nodes.broken]\nkind = "fake"\nfail = "rejected"\n[experts.broken]\nnode = "broken"\ndescription = "b"\n'
    )
    config.write_text(CONFIG + broken)
    said = agora("calibrate", "--data", data(60))
    assert said.code == 0
    assert "broken: no answer to 60 of 60 questions" in said.out
    assert "broken is not in the policy: it gave no answer to 100% of the questions" in said.out
    assert "broken: not calibrated: 0 labelled answers" in said.out
    assert "over small, big" in said.out


def test_unknown_signals_are_told_before_anybody_is_asked(agora, config, data):
    config.write_text(CONFIG + 'signals = ["magic"]\n')
    outcome = agora("calibrate", "--data", data(40))
    assert outcome.code == 1
    assert "magic" in outcome.error


def test_two_at_once_do_not_write_into_each_other(agora, config, data, home):
    from graphs.calibration_journal import Journal

    with Journal(home / "policy" / "journal.jsonl"):
        outcome = agora("calibrate", "--data", data(40))
    assert outcome.code == 1
    assert "another calibration is writing" in outcome.error


def test_the_help_names_the_graders(start):
    process = start("calibrate", "--help", stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "exact, number, choice" in " ".join(out.split())


def test_questions_that_may_not_leave_are_asked_of_those_at_home_alone(agora, config, data):
    plain = agora("calibrate", "--data", data(40), "--reach", "local", "--json").json
    assert [e["version"]["expert"] for e in plain["experts"]] == ["small"]


def test_more_at_once_is_quicker_and_says_what_its_seconds_are(agora, config, data, home):
    name = data(40)
    assert "include waiting" not in agora("calibrate", "--data", name).out
    said = agora("calibrate", "--data", name, "--at-once", "4", "--fresh")
    assert "note: big: the seconds of 40 of 40 answers include waiting: up to 4 questions" in said.out
    assert agora("calibrate", "--data", name, "--at-once", "0").code == 2


def test_another_number_of_samples_and_what_leaves_are_asked_anew(agora, config, data, home):
    journal, name = home / "policy" / "journal.jsonl", data(40)
    sampled = CONFIG + 'signals = ["self_consistency"]\n'
    config.write_text(sampled)
    assert agora("calibrate", "--data", name).code == 0
    config.write_text(sampled + "samples = 3\n")
    assert "answered before" not in agora("calibrate", "--data", name).err
    assert len(journal.read_text().splitlines()) == 160
    # Those of the end tier see what they saw before.
    config.write_text(sampled + 'samples = 3\nredact = ["email"]\n')
    said = agora("calibrate", "--data", name).err
    assert "small: 40 of 40 answered before" in said and "big: 40 of 40 answered before" not in said
