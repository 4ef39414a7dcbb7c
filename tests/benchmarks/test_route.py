"""The routing benchmark counts right: on questions whose answers are known, without a model."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agora.errors import InvalidRequest
from benchmarks import route
from benchmarks.common import data_dir, facts, parser, read_jsonl, run, show


class Hashed:
    """Embeds by counting words in 512 buckets."""

    async def embed(self, texts: Sequence[str]) -> Any:
        rows = np.full((len(texts), 512), 1e-3, dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[sum(map(ord, word)) % 512] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "mmlu").mkdir()
    subjects = [s for of_field in route.FIELDS.values() for s in of_field] + ["world_religions"]
    rows = [
        {"subject": s, "question": f"question {n} on {s}", "choices": ["a", "b", "c", "d"], "answer": "A"}
        for s in subjects
        for n in range(4)
    ]
    with gzip.open(tmp_path / "mmlu" / "test.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(r) + "\n" for r in rows)
    return tmp_path


def test_the_mapping_names_every_ready_expert_and_no_subject_twice() -> None:
    assert set(route.FIELDS) == {e.name for e in route.five_experts()}
    subjects = [s for of_field in route.FIELDS.values() for s in of_field]
    assert len(subjects) == len(set(subjects))


def test_only_mapped_subjects_are_asked_and_at_most_so_many_of_each(data: Path) -> None:
    every = route.items(data, per_subject=None, seed=0)
    assert len(every) == 4 * len({i.subject for i in every}) and "world_religions" not in {i.subject for i in every}
    some = route.items(data, per_subject=2, seed=0)
    assert len(some) == len(every) // 2
    assert some == route.items(data, per_subject=2, seed=0) != route.items(data, per_subject=2, seed=1)
    assert every[0].text.endswith("\na\nb\nc\nd")
    assert "\n" not in route.items(data, per_subject=1, seed=0, choices=False)[0].text


def test_accuracy_is_that_of_the_choices_made(data: Path) -> None:
    asked = route.items(data, per_subject=None, seed=0)
    perfect = route.Routed(chosen=tuple(i.field for i in asked), close=(True,) * len(asked))
    finance = route.Routed(chosen=("finance",) * len(asked), close=(False,) * len(asked))
    best, one = route.scores(asked, perfect, seed=0), route.scores(asked, finance, seed=0)
    assert best["micro"] == best["macro"] == 1.0 and best["macro_ci95"] == [1.0, 1.0]
    assert one["macro"] == 0.2 and one["fields"]["finance"] == 1.0 and one["fields"]["robotics"] == 0.0
    assert one["micro"] == pytest.approx(len(route.FIELDS["finance"]) / 27, abs=1e-3)
    assert one["confusion"]["robotics"] == {"finance": 16} and one["no_close_match"] == 1.0
    assert route.gain(asked, perfect, finance, seed=0) == {"macro": 0.8, "macro_ci95": [0.8, 0.8]}


def test_an_interval_holds_its_mean_and_narrows_with_more_questions(data: Path) -> None:
    asked = route.items(data, per_subject=None, seed=0)
    half = tuple(i.field if n % 2 else "nobody" for n, i in enumerate(asked))
    few = route.scores(asked, route.Routed(chosen=half, close=(True,) * len(asked)), seed=0)
    many = route.scores(asked * 9, route.Routed(chosen=half * 9, close=(True,) * len(asked) * 9), seed=0)
    low, high = few["micro_ci95"]
    assert low < few["micro"] < high
    assert many["micro_ci95"][1] - many["micro_ci95"][0] < (high - low) / 2


async def test_both_routers_are_measured_and_the_result_is_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = await route.measure(data, quick=True, seed=0, embedder=Hashed())
    assert result["questions"] == 108 and result["chance"] == 0.2
    for who in ("agora", "keywords"):
        assert 0 <= result[who]["macro"] <= 1 and result[who]["ms_per_routing"] > 0
    show(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["agora"]["macro"] == result["agora"]["macro"]
    show(result, as_json=False, table=route.tables(result))
    assert "healthcare" in capsys.readouterr().out


async def test_a_full_run_asks_all_and_the_bare_stems_too(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = await route.measure(data, quick=False, seed=0, embedder=Hashed())
    assert result["questions"] == 108 and set(result["stem_only"]) == {"agora", "keywords"}
    show(result, as_json=False, table=route.tables(result))
    assert "stem only" in capsys.readouterr().out


def test_missing_data_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AGORA_DATA", raising=False)
    options = parser("x")
    with pytest.raises(InvalidRequest, match=r"--data DIR.*AGORA_DATA"):
        data_dir(options.parse_args([]))
    with pytest.raises(InvalidRequest, match="not a folder"):
        data_dir(options.parse_args(["--data", str(tmp_path / "nowhere")]))
    monkeypatch.setenv("AGORA_DATA", str(tmp_path))
    assert data_dir(options.parse_args([])) == tmp_path
    with pytest.raises(InvalidRequest, match=r"test.jsonl.gz is not in .*--data DIR"):
        route.items(tmp_path, per_subject=None, seed=0)

    def broken() -> None:
        list(read_jsonl(tmp_path / "mmlu" / "x.jsonl.gz"))

    with pytest.raises(SystemExit) as exit_:
        run(broken)
    assert exit_.value.code == 2 and capsys.readouterr().err.startswith("error: x.jsonl.gz is not in")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InvalidRequest, match=r"x\.jsonl\.gz cannot be read"):
        list(read_jsonl(tmp_path / "x.jsonl.gz"))


def test_facts_are_plain_json() -> None:
    told = facts()
    assert json.loads(json.dumps(told)) == told and told["cores"] >= 1 and "torch" in told["versions"]
