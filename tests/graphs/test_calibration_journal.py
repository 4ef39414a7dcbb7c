"""Outcomes survive an interruption, and two calibrations do not write into each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agora.errors import ConfigError
from agora.routing.trust import Version
from graphs.calibration_journal import Graded, Journal

V = Version(expert="small", adapter=None, base="m")


def test_outcomes_survive_and_a_torn_line_costs_one(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first, second = Graded(question="a", version=V, right=True, signals={"s": 0.5}), Graded(question="b", version=V)
    with Journal(path) as journal:
        journal.put(first)
        journal.put(second)
    with path.open("ab") as file:
        file.write(b'{"question": "c", "versi')
    with Journal(path) as journal:
        assert (journal.known, journal.damaged) == ({first.key: first, second.key: second}, 1)
        journal.put(dataclasses.replace(second, right=False))
    with Journal(path) as journal:
        # The torn line did not swallow the one after it; and the last word on a question counts.
        assert [o.right for o in journal.known.values()] == [True, False]
        assert journal.damaged == 1


def test_a_fresh_journal_keeps_the_old_one_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.put(Graded(question="a", version=V, right=True))
    with Journal(path, fresh=True) as journal:
        assert not journal.known
    assert '"a"' in (tmp_path / "j.jsonl.old").read_text()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "j.jsonl"),
        pytest.raises(ConfigError, match="another calibration"),
        Journal(tmp_path / "j.jsonl"),
    ):
        pass
    with Journal(tmp_path / "j.jsonl"):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another folder"), Journal(tmp_path / "file" / "j.jsonl"):
        pass
