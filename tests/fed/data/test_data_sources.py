"""Data sets in their folders' layout, any JSONL, and the hub's library, which may not be there."""

import gzip
import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agora.errors import InvalidRequest
from fed.data import GLUE, Template, glue, instructions, jsonl, title_abstract
from fed.data.jsonl import MAX_LINE_BYTES

PLAIN = Template(prompt="{question}", response="{answer}")


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_any_jsonl_is_read_with_a_template(tmp_path: Path, name: str) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    path = write(tmp_path / name, [rows[0], "", *rows[1:]])
    assert [(e.prompt, e.response) for e in jsonl(path, PLAIN)] == [(f"q{i}", f"a{i}") for i in range(5)]
    assert len(jsonl(path, PLAIN, limit=2)) == 2


def test_errors_name_file_line_and_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, "", {"question": "SECRET"}])
    with pytest.raises(InvalidRequest, match=r"a\.jsonl, line 3: no field 'answer'; the row has 'question'") as e:
        jsonl(path, PLAIN)
    assert "SECRET" not in str(e.value)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["{broken SECRET"], "line 1: not JSON"),
        (["[1, 2]"], "line 1: holds list; allowed: a JSON object"),
        (["[" * 100_000], "line 1: not JSON"),
        (["x" * (MAX_LINE_BYTES + 1)], "line 1: longer than"),
        ([], "holds no rows"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, rows: list[str], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as e:
        jsonl(write(tmp_path / "a.jsonl", rows), PLAIN)
    assert "SECRET" not in str(e.value)


def test_missing_and_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"b\.jsonl is not in"):
        jsonl(tmp_path / "b.jsonl", PLAIN)
    whole = write(tmp_path / "a.jsonl.gz", [{"question": "q" * 500, "answer": "a"}]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-10])
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    for name in ("cut", "no"):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            jsonl(tmp_path / f"{name}.jsonl.gz", PLAIN)
    with pytest.raises(InvalidRequest, match="limit is 0"):
        jsonl(tmp_path / "a.jsonl.gz", PLAIN, limit=0)


def test_glue_tasks_are_read_from_their_folder(tmp_path: Path) -> None:
    write(tmp_path / "glue-sst2" / "dev.jsonl.gz", [{"sentence": "fine", "label": 1}, {"sentence": "poor", "label": 0}])
    fine, poor = glue("sst2", "dev", folder=tmp_path)
    assert (fine.prompt, fine.response, fine.label) == ("Review: fine\nSentiment:", " positive", "1")
    assert poor.response == " negative" and poor.choices == fine.choices and poor.group == "sst2"
    write(tmp_path / "glue-qnli" / "train.jsonl.gz", [{"question": "q", "sentence": "s", "label": "not_entailment"}])
    assert glue("qnli", folder=tmp_path)[0].response == " no"
    with pytest.raises(InvalidRequest, match=r"no GLUE task 'sst'; allowed: sst2, qnli"):
        glue("sst", folder=tmp_path)


def test_every_glue_task_has_words_for_all_labels_of_the_hub() -> None:
    for task in GLUE.values():
        assert set(task.numbers) == set(task.words)
        task.template().reader()


def test_instructions_and_abstracts_are_read_from_their_folders(tmp_path: Path) -> None:
    write(
        tmp_path / "instructions" / "openorca_dpo.jsonl.gz",
        [
            {"system_prompt": "Be kind.", "question": "Why?", "response": "Because.", "rejected": "No."},
            {"system_prompt": None, "question": "Who?", "response": "Me."},
            {"system_prompt": "", "question": "When?", "response": ""},
        ],
    )
    first, second = instructions("openorca_dpo", folder=tmp_path)
    assert (first.system, first.prompt, first.response, first.choices) == ("Be kind.", "Why?", "Because.", ())
    assert (second.system, second.prompt) == ("", "Who?")
    write(
        tmp_path / "instructions" / "alpaca.jsonl.gz",
        [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Go.", "input": "", "output": "Gone"}],
    )
    assert [e.prompt for e in instructions("alpaca", folder=tmp_path)] == ["Add.\n\n1 2", "Go."]
    write(
        tmp_path / "title-abstract" / "some.jsonl.gz", [{"title": "T", "abstract": "A long one", "discipline": "maths"}]
    )
    (paper,) = title_abstract("some", folder=tmp_path)
    assert (paper.response, paper.group, paper.label) == ("A long one", "maths", "maths") and "T" in paper.prompt


def test_without_the_hubs_library_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidRequest, match=r"'datasets', which is not installed \(pip install datasets"):
        glue("sst2")


def hub(monkeypatch: pytest.MonkeyPatch, rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Puts a library in the place of `datasets` that has these rows; returns what it will be asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Sequence[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        if not rows:
            raise ConnectionError("no network\nand more")
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_the_hubs_numbered_labels_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [{"premise": "p", "hypothesis": "h", "label": n, "idx": n} for n in (0, 1, 2)])
    found = glue("mnli", "dev", limit=2)
    assert [e.label for e in found] == ["entailment", "neutral"]
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched", True)]


def test_openorca_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [{"id": "x", "system_prompt": "", "question": "Why?", "response": "So."}])
    assert instructions()[0].response == "So."
    assert asked == [("Open-Orca/OpenOrca", None, "train", True)]
    with pytest.raises(InvalidRequest, match="'alpaca' is read from a folder"):
        instructions("alpaca")


def test_a_hub_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [])
    with pytest.raises(InvalidRequest, match=r"'nyu-mll/glue' \(sst2\), split 'train' cannot be had: .*no network \("):
        glue("sst2")


@pytest.mark.skipif(not os.environ.get("AGORA_DATA"), reason="AGORA_DATA does not name the data folder")
def test_the_real_data_sets_are_read() -> None:
    folder = Path(os.environ["AGORA_DATA"])
    dev = glue("sst2", "dev", folder=folder)
    assert len(dev) == 675 and sum(e.response == " positive" for e in dev) == 360
    assert {e.response for e in glue("qnli", folder=folder, limit=200)} == {" yes", " no"}
    assert len(glue("qqp", "dev", folder=folder)) == 764
    assert len(instructions("openorca_dpo", folder=folder)) == 222
    assert len({e.group for e in title_abstract("asreview", folder=folder)}) == 4
