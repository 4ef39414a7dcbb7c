from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agora.errors import StoreError
from fed.simulator.checkpoint import ARRAYS, FACTS, latest, write
from fed.simulator.record import Record, Totals, row


def test_the_newest_is_read_and_two_are_kept(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for n in range(1, 6):
        write(tmp_path, n, {"n": n}, {"x": np.arange(n, dtype=np.float32), "none": np.zeros(0, np.float64)})
    saved = latest(tmp_path)
    assert saved is not None and saved.number == 5 and saved.facts == {"n": 5}
    assert saved.arrays["x"].tolist() == [0, 1, 2, 3, 4] and saved.arrays["none"].dtype == np.float64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000004", "checkpoint-00000005"]


@pytest.mark.parametrize("name", [ARRAYS, FACTS, "manifest.json"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path, name: str) -> None:
    for n in (1, 2):
        write(tmp_path, n, {"n": n}, {"x": np.full(4, n, np.float32)})
    path = tmp_path / "checkpoint-00000002" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    saved = latest(tmp_path)
    assert saved is not None and saved.number == 1
    (tmp_path / "checkpoint-00000001" / ARRAYS).unlink()
    with pytest.raises(StoreError, match=r"every checkpoint .* is damaged"):
        latest(tmp_path)


def test_what_a_killed_process_left_half_made_is_not_read_and_not_in_the_way(tmp_path: Path) -> None:
    write(tmp_path, 1, {"n": 1}, {})
    half = tmp_path / ".checkpoint-in-the-making"
    half.mkdir()
    (half / FACTS).write_text("{")
    saved = latest(tmp_path)
    assert saved is not None and saved.number == 1
    write(tmp_path, 2, {"n": 2}, {})
    assert not half.exists()


def test_rows_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    record.add(row(1.0, "all", 1, [], Totals()))
    size = record.size
    record.add(row(2.0, "all", 2, [], Totals()))
    record.close()
    with path.open("ab") as file:
        file.write(b'{"at": 3.0, "mod')
    again = Record(path, size)
    assert [r["version"] for r in again.rows] == [1]
    again.add(row(2.5, "all", 2, [], Totals()))
    again.close()
    whole = Record(path, path.stat().st_size)
    whole.close()
    assert [r["at"] for r in whole.rows] == [1.0, 2.5]


def test_a_record_that_lost_rows_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(StoreError, match="has 3 bytes; the checkpoint was made when it had 10"):
        Record(path, 10)
