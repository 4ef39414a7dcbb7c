"""`agora fed`: a file that runs as it stands, mistakes told in one line, and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fed.config import load_config


def test_init_writes_a_file_that_is_accepted_and_says_what_to_do_next(agora, home):
    said = agora("fed", "init", "try")
    assert said.code == 0
    config = load_config(home / "try" / "fed.toml")
    assert config.model.source == "smollm2-135m"
    rows = [json.loads(line) for line in (home / "try" / "example.jsonl").read_text().splitlines()]
    assert len(rows) > 500 and {row["label"] for row in rows} == {"good", "bad"}
    assert "agora fed run try/fed.toml" in said.out
    assert "an example and no data set" in said.out


def test_init_keeps_what_is_there_unless_told_otherwise(agora, home):
    (home / "example.jsonl").write_text("mine")
    said = agora("fed", "init")
    assert said.code == 1
    assert "example.jsonl is already there" in said.error
    assert not (home / "fed.toml").exists()
    assert agora("fed", "init", "--force").code == 0
    assert (home / "example.jsonl").read_text() != "mine"


def test_a_run_without_a_file_says_how_to_get_one(agora, home):
    said = agora("fed", "run")
    assert said.code == 1
    assert "fed.toml does not exist" in said.error
    assert "agora fed init" in said.err


def test_a_mistake_in_the_file_is_told_with_its_line_before_anything_is_loaded(agora, home):
    agora("fed", "init")
    text = (home / "fed.toml").read_text()
    line = text.split("rank = 8")[0].count("\n") + 1
    (home / "fed.toml").write_text(text.replace("rank = 8", "rank = 0", 1))
    said = agora("fed", "run")
    assert said.code == 1
    assert f"line {line}: adapter.rank = 0: allowed: whole numbers from 1" in said.error
    said = agora("fed", "run", "--json")
    assert said.json["error"]["code"] == "config"


def test_a_model_that_is_not_here_is_told_and_not_fetched(agora, home):
    agora("fed", "init")
    said = agora("fed", "run", "--no-pull")
    assert said.code == 1
    assert "smollm2-135m" in said.error
    assert not (home / "fed-run").exists()


def test_options_that_contradict_each_other_are_told(agora, home):
    said = agora("fed", "run", "--resume", "--fresh")
    assert said.code == 1
    assert "give one of them" in said.err


def test_a_folder_that_is_no_runs_has_no_report(agora, home):
    said = agora("fed", "report", ".")
    assert said.code == 1
    assert "is no folder of a run" in said.error


@pytest.fixture
def folder(home):
    row = {
        **{"at": 5.0, "model": "all", "version": 1, "updates": 2, "clients": 2, "staleness_mean": 0.5},
        **{"staleness_max": 1, "norm_mean": 1.0, "loss": 0.5, "assigned": 4, "absorbed": 2, "refused": 1, "lost": 1},
        **{"cancelled": 0, "bytes_down": 2000, "bytes_up": 1000, "of": [["a", 0, 3.0], ["b", 1, 1.0]], "notes": {}},
        "problems": ["the update of job 3 by 'b' was refused: too late"],
    }
    place = home / "run"
    place.mkdir()
    (place / "config.toml").write_text('[run]\nname = "one"\n')
    (place / "record.jsonl").write_text(json.dumps(row) + "\n")
    clients = [{"name": n, "rows": 5, "model": "all", "note": None, "left_out": None} for n in "ab"]
    clients.append({"name": "c", "left_out": "it has no rows"})
    (place / "clients.json").write_text(json.dumps({"clients": clients}))
    judged = [
        {"at": 5.0 * v, "model": "all", "version": v, "loss": 0.9 - v / 2, "accuracy": 0.5 + v / 4} for v in (0, 1)
    ]
    (place / "evaluations.jsonl").write_text("".join(json.dumps(j) + "\n" for j in judged))
    return place


def test_a_report_of_a_run_that_was_killed_has_its_tables(agora, folder):
    said = agora("fed", "report", "run")
    assert said.code == 0
    assert "run: stopped" in said.out
    assert "4 jobs: 2 used, 1 lost, 1 refused" in said.out
    assert "0.9000 → 0.4000" in said.out and "50.0 % → 75.0 %" in said.out
    assert "75.0 %" in said.out
    assert "left out: it has no rows" in said.out
    assert "was refused: too late" in said.out


def test_a_report_for_programs_and_as_a_page(agora, home, folder):
    said = agora("fed", "report", "run", "--json", "--html", "out/page.html", "--plots", "plots")
    assert said.code == 0
    assert said.json["absorbed"] == 2 and said.json["clients"][0]["share"] == 0.75
    assert "<img" in (home / "out" / "page.html").read_text()
    assert {"loss.svg", "shares.svg"} <= {p.name for p in (home / "plots").iterdir()}
    assert str(home / "out" / "page.html").endswith(said.json["written"][-1])


def test_the_command_line_starts_without_torch(home):
    code = "import sys; import agora.cli.app; sys.exit('torch' in sys.modules or 'fed.run' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


@pytest.mark.model
def test_the_written_file_runs_on_the_real_model(tmp_path, monkeypatch):
    from agora.cli.app import run

    monkeypatch.chdir(tmp_path)
    assert run(["fed", "init"]) == 0
    text = (tmp_path / "fed.toml").read_text()
    few = (("publications = 8", "publications = 2"), ("eval_rows = 48", "eval_rows = 6"), ("steps = 4", "steps = 1"))
    for old, new in (*few, ("batch = 8", "batch = 4"), ("# threads = 2", "threads = 1")):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "fed.toml").write_text(text.replace("evaluate_every = 2", "evaluate_every = 0"))
    assert run(["fed", "run", "--quiet"]) == 0
    result = json.loads((tmp_path / "fed-run" / "result.json").read_text())
    assert result["versions"] == 2
    assert result["models"]["all"]["last"]["loss"] != result["models"]["all"]["first"]["loss"]
    assert (tmp_path / "fed-run" / "adapters" / "all" / "adapter_model.safetensors").is_file()
    assert run(["fed", "report", "fed-run", "--html", "page.html"]) == 0
