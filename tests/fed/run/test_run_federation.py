"""A run from a configuration: what it writes, what it tells, and what it refuses before training starts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agora.errors import AgoraError, ConfigError, InvalidRequest
from fed.config import FedConfig, load_config, parse_config
from fed.peft_folder import read_folder
from fed.run import NothingLearned, run
from fed.runs.told import Begun, Judged, Made, Noted, Stepped, Told

Project = Callable[..., FedConfig]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loaded(base: Path, adapter: Path) -> Any:
    """The adapter as its users load it, with peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        # peft and transformers warn of each other's words.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def notes(told: list[Told]) -> str:
    return "\n".join(t.text for t in told if isinstance(t, Noted))


def test_a_run_writes_all_that_its_user_needs_and_tells_it_on_the_way(project: Project, llama: Path) -> None:
    config = project()
    told: list[Told] = []
    outcome = run(config, config.run.out, progress=told.append)
    folder = outcome.folder
    assert outcome.finished
    assert outcome.result["versions"] == 6
    record = lines(folder / "record.jsonl")
    assert [row["version"] for row in record] == [1, 2, 3, 4, 5, 6]
    assert [t.row["version"] for t in told if isinstance(t, Made)] == [1, 2, 3, 4, 5, 6]
    judged = lines(folder / "evaluations.jsonl")
    assert [row["version"] for row in judged] == [0, 1, 2, 3, 4, 5, 6]
    assert judged == [t.row for t in told if isinstance(t, Judged)]
    assert all(row["rows"] == 16 and 0 <= row["accuracy"] <= 1 and row["own_rows"] == 12 for row in judged)
    assert judged[-1]["loss"] < judged[0]["loss"], "it learns"
    assert [row["at"] for row in judged[1:]] == [row["at"] for row in record]
    begun = next(t for t in told if isinstance(t, Begun))
    assert len(begun.clients) == 4 and not begun.resumed
    assert sum(isinstance(t, Stepped) for t in told) >= 12
    clients = json.loads((folder / "clients.json").read_text())["clients"]
    # Of 120 rows 16 are judged on, and 3 of each client's.
    assert sum(c["rows"] for c in clients) == 120 - 16 - 12
    assert sum(c["share"] for c in clients) == pytest.approx(1)
    assert sum(c["updates"] for c in clients) == 12
    assert parse_config((folder / "config.toml").read_text(), file=None) == config
    adapter = read_folder(outcome.adapters["all"])
    assert adapter.spec.rank == 2
    assert any(b.any() for _, b, _ in adapter.factors())
    assert loaded(llama, outcome.adapters["all"]).peft_config["default"].r == 2


def test_no_data_is_in_anything_that_a_run_writes(project: Project) -> None:
    config = project(more="[[chain]]\nkind = 'int8'\n")
    folder = run(config, config.run.out).folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    marker = b"zyxwvut-private-marker"
    assert marker in (folder.parent / "rows.jsonl").read_bytes()
    assert not [path for path in files if marker in path.read_bytes()]


def test_the_same_run_again_gives_the_same_bytes_and_another_seed_others(project: Project, tmp_path: Path) -> None:
    config = project()
    digests = [
        run(c, tmp_path / f"out{n}").result["models"]["all"]["sha256"]
        for n, c in enumerate((config, config, replace(config, run=replace(config.run, seed=4))))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("method", "kind"), [("prefix", "prefix_tuning"), ("p_tuning", "p_tuning"), ("prompt", "prompt_tuning")]
)
def test_every_method_runs_and_leaves_a_folder_for_peft(project: Project, llama: Path, method: str, kind: str) -> None:
    config = project(("rank = 2", f'method = "{method}"\nvirtual_tokens = 4'), ("publications = 6", "publications = 2"))
    outcome = run(config, config.run.out)
    assert outcome.result["models"]["all"]["version"] == 2
    assert str(loaded(llama, outcome.adapters["all"]).peft_config["default"].peft_type).lower().endswith(kind)


def test_clients_of_other_ranks_train_at_theirs(project: Project) -> None:
    config = project(("loss = 0.1", "ranks = [1, 3]"))
    outcome = run(config, config.run.out)
    clients = json.loads((outcome.folder / "clients.json").read_text())["clients"]
    assert [c["rank"] for c in clients] == [1, 3, 1, 3]
    assert outcome.result["models"]["all"]["rank"] == 2
    assert outcome.result["refused"] == 0


def test_clusters_get_an_adapter_each_and_their_history_is_kept(project: Project) -> None:
    kind = 'label = ""\n'
    opposite = [
        {"text": f"number {i}", "label": "bad" if k == "food" else "good", "kind": k}
        for i in range(80)
        for k in ("film", "food")
    ]
    config = project(
        ('group = "{kind}"', f'group = "{{kind}}"\n{kind}'),
        ("publications = 6", "publications = 16"),
        ('speeds = "lognormal"', 'speeds = "constant"'),
        ("steps = 1", "steps = 3"),
        ("loss = 0.1", "loss = 0.0"),
        more='[data.partition]\nkind = "group"\n[clusters]\nclusters = 2\nupdates = 1\n',
        data=opposite,
    )
    outcome = run(config, config.run.out)
    groups = lines(outcome.folder / "clusters.jsonl")[-1]["groups"]
    assert sorted(c for members in groups.values() for c in members) == [f"client-{i}" for i in range(4)]
    assert len(groups) == 2
    assert set(groups) <= set(outcome.adapters)
    assert all(path.is_dir() for path in outcome.adapters.values())
    first, second = (read_folder(outcome.adapters[name]) for name in groups)
    assert not (first.flat == second.flat).all()
    clients = json.loads((outcome.folder / "clients.json").read_text())["clients"]
    assert {c["name"]: c["model"] for c in clients} == {c: name for name, cs in groups.items() for c in cs}
    assert {row["model"] for row in lines(outcome.folder / "evaluations.jsonl")} >= set(groups)


# What is refused before anything is trained.


@pytest.mark.parametrize(
    ("changes", "more", "told"),
    [
        ((("rank = 2", "rank = 64"),), "", "rank 64 on"),
        ((("rank = 2", 'targets = ["q_prj"]'),), "", "no linear layer 'q_prj'; allowed: down_proj"),
        ((("loss = 0.1", "ranks = [2, 60]"),), "", "rank 60 on"),
        ((("clients = 4", "clients = 400"),), "", "rows for 400 clients"),
        ((("{text} is", "{words} is"),), "", "line 1: no field 'words'; the row has 'text', 'label', 'kind'"),
        ((("max_tokens = 128", "max_tokens = 400"),), "", "for a model that reads 256"),
        ((("max_tokens = 128", "max_tokens = 3"),), "", "none of"),
        ((("loss = 0.1", 'loss_of = { "nobody" = 1.0 }'),), "", "client 'nobody', who is not there"),
        (
            (("loss = 0.1", "ranks = [1, 2]"), ("steps = 1", "steps = 1\nfreeze_a = true")),
            '[aggregate]\nrule = "freeze_a"\n',
            "clients of rank 1",
        ),
        (
            (("clients = 4\n", ""),),
            '[data.partition]\nkind = "group"\n[clusters]\nclusters = 3\n',
            "3 clusters were asked for, of 2 clients",
        ),
    ],
)
def test_what_cannot_be_is_told_before_training(
    project: Project, changes: tuple[tuple[str, str], ...], more: str, told: str
) -> None:
    config = project(*changes, more=more)
    seen: list[Told] = []
    with pytest.raises(AgoraError) as caught:
        run(config, config.run.out, progress=seen.append)
    assert isinstance(caught.value, ConfigError | InvalidRequest)
    assert told in caught.value.message
    assert not any(isinstance(t, Begun | Stepped) for t in seen)
    assert not (config.run.out / "record.jsonl").exists()


def test_data_of_one_class_only_is_refused(project: Project) -> None:
    config = project(data=[{"text": f"row {i}", "label": "good", "kind": "film"} for i in range(40)])
    with pytest.raises(InvalidRequest, match="same label"):
        run(config, config.run.out)


def test_a_client_that_cannot_train_is_left_out_and_told(project: Project) -> None:
    data = [{"text": f"row {i}", "label": ("good", "bad")[i % 2], "kind": "film"} for i in range(60)]
    data += [{"text": "long " * 200, "label": ("good", "bad")[i % 2], "kind": "book"} for i in range(20)]
    config = project(
        ("clients = 4\n", ""),
        ("eval_rows = 16", "eval_rows = 0"),
        ("max_tokens = 128", "max_tokens = 100"),
        more='[data.partition]\nkind = "group"\n',
        data=data,
    )
    told: list[Told] = []
    outcome = run(config, config.run.out, progress=told.append)
    assert "client 'book' is left out" in notes(told)
    assert "1 jobs at once, not 4" in notes(told)
    clients = {c["name"]: c for c in json.loads((outcome.folder / "clients.json").read_text())["clients"]}
    assert "100 tokens or more" in clients["book"]["left_out"]
    assert clients["film"]["updates"] == 12


def test_if_all_clients_are_dead_the_run_says_so(project: Project) -> None:
    config = project(("loss = 0.1", "loss = 1.0"))
    with pytest.raises(NothingLearned, match="no version was made: "):
        run(config, config.run.out)


def test_few_rows_to_judge_on_are_held_back_and_told(project: Project) -> None:
    config = project(("eval_rows = 16", "eval_rows = 100"))
    told: list[Told] = []
    run(config, config.run.out, progress=told.append)
    assert "24 rows are held back to judge on, not 100: a fifth of 120" in notes(told)


def test_rows_to_judge_on_may_come_from_a_file_of_their_own(project: Project) -> None:
    config = project(("eval_rows = 16", 'eval_rows = 7\neval_path = "rows.jsonl"'))
    outcome = run(config, config.run.out)
    assert outcome.result["models"]["all"]["last"]["rows"] == 7


def test_whoever_gives_no_time_for_judging_gets_the_first_and_the_last(project: Project) -> None:
    config = project(("seed = 3", "seed = 3\nevaluate_every = 0"))
    outcome = run(config, config.run.out)
    assert [row["version"] for row in lines(outcome.folder / "evaluations.jsonl")] == [0, 6]


@pytest.mark.parametrize("over", [1.0, 1.5])
def test_a_synchronous_run_of_more_than_there_are_takes_all_of_them(project: Project, over: float) -> None:
    config = project(("cohort = 4\nbuffer = 2", f'preset = "synchronous"\ncohort = 9\nover_select = {over}'))
    outcome = run(config, config.run.out)
    assert outcome.result["versions"] == 6
    assert max(row["updates"] for row in lines(outcome.folder / "record.jsonl")) == 4


# The folder.


def test_a_folder_is_not_used_twice_unless_asked(project: Project) -> None:
    config = project()
    first = run(config, config.run.out)
    digest = first.result["models"]["all"]["sha256"]
    with pytest.raises(ConfigError, match="--resume goes on with it, --fresh begins anew"):
        run(config, config.run.out)
    told: list[Told] = []
    again = run(config, config.run.out, resume=True, progress=told.append)
    assert again.result == first.result and not told, "a run that has ended is not run again"
    other = replace(config, adapter=replace(config.adapter, rank=3))
    with pytest.raises(ConfigError, match=r"another configuration: adapter\.rank is 3, and was 2"):
        run(other, config.run.out, resume=True)
    (config.run.out / "mine.txt").write_text("keep")
    assert run(other, config.run.out, fresh=True).result["models"]["all"]["rank"] == 3
    assert (config.run.out / "mine.txt").read_text() == "keep"
    assert run(config, config.run.out, fresh=True).result["models"]["all"]["sha256"] == digest


def test_a_folder_that_is_no_runs_is_left_alone(project: Project, tmp_path: Path) -> None:
    config = project()
    (tmp_path / "adapters").mkdir()
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="this is no run's folder"):
            run(config, tmp_path, fresh=fresh)
    assert load_config(tmp_path / "fed.toml") == config


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(project: Project, tmp_path: Path) -> None:
    config = project()
    whole = run(config, tmp_path / "whole")
    told: list[Told] = []

    def progress(one: Told) -> None:
        told.append(one)

    stopped = run(
        config, tmp_path / "parts", progress=progress, stop=lambda: sum(isinstance(t, Made) for t in told) >= 3
    )
    assert not stopped.finished and not stopped.adapters
    assert stopped.result["versions"] == 3
    assert not (tmp_path / "parts" / "result.json").exists()
    changed = replace(config, run=replace(config.run, checkpoint_every=None, out=tmp_path / "elsewhere"))
    again: list[Told] = []
    ended = run(changed, tmp_path / "parts", resume=True, progress=again.append)
    begun = next(t for t in again if isinstance(t, Begun))
    assert begun.resumed and [row["version"] for row in begun.rows] == [1, 2, 3]
    assert ended.result == whole.result
    for name in ("record.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rows_that_changed_meanwhile_are_noticed(project: Project, tmp_path: Path) -> None:
    config = project()
    run(config, config.run.out, stop=lambda: True)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "new", "label": "good", "kind": "film"}\n')
    with pytest.raises(ConfigError, match=r"about\.data"):
        run(config, config.run.out, resume=True)
