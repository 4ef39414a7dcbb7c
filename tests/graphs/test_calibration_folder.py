"""What was learned counts whole or not at all, whoever reads, and whatever happens to who writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from agora.errors import ConfigError
from graphs.calibration_folder import CALIBRATORS, CURRENT, FITTED, POLICY, current, replacing, stamp


def write(folder: Path, text: str) -> None:
    for name in (f"{CALIBRATORS}/small.json", f"{POLICY}/policy.json", FITTED):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        # As everything in it is written: in the place of a file, never into one.
        (target.parent / "new").write_text(text)
        (target.parent / "new").replace(target)


def read(folder: Path) -> set[str]:
    return {p.read_text() for p in current(folder).rglob("*.json")}


def test_what_is_written_counts_all_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    assert current(folder) == folder and stamp(folder) is None
    with replacing(folder) as new:
        write(new, "first")
        assert current(folder) == folder and stamp(folder) is None
    assert read(folder) == {"first"}
    seen = stamp(folder)
    with replacing(folder) as new:
        assert {p.read_text() for p in new.rglob("*.json")} == {"first"}
        write(new, "second")
        assert read(folder) == {"first"} and stamp(folder) == seen
    assert read(folder) == {"second"} and stamp(folder) != seen


def test_what_counted_before_stays_whole_for_those_who_read_it(tmp_path: Path) -> None:
    held = []
    for n in range(5):
        with replacing(tmp_path) as new:
            write(new, str(n))
        held.append(current(tmp_path))
    assert [folder.exists() for folder in held] == [False, False, False, True, True]
    assert {p.read_text() for p in held[3].rglob("*.json")} == {"3"}


@pytest.mark.parametrize("error", [ConfigError("no space"), KeyboardInterrupt()])
def test_who_fails_in_the_middle_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    with replacing(tmp_path) as new:
        write(new, "first")
    seen = stamp(tmp_path)
    with pytest.raises(type(error)), replacing(tmp_path) as new:
        write(new, "half")
        raise error
    assert read(tmp_path) == {"first"} and stamp(tmp_path) == seen and not new.exists()


def test_who_is_killed_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    with replacing(tmp_path) as new:
        write(new, "first")
    killed = replacing(tmp_path)
    write(killed.__enter__(), "half")  # and nothing ever comes after it
    assert read(tmp_path) == {"first"}
    assert len(list(tmp_path.glob("learned-*"))) == 2
    with replacing(tmp_path) as new:
        # It begins as what counts, not as what was left lying about.
        assert {p.read_text() for p in new.rglob("*.json")} == {"first"}
        write(new, "second")
    assert read(tmp_path) == {"second"}


def test_a_folder_of_an_early_agora_is_read_and_taken_over(tmp_path: Path) -> None:
    write(tmp_path, "early")
    assert read(tmp_path) == {"early"}
    with replacing(tmp_path) as new:
        (new / FITTED).unlink()
        (new / FITTED).write_text("late")
    assert read(tmp_path) == {"early", "late"}


@pytest.mark.parametrize("text", ["{]", '{"sha256": "0", "body": {"folder": "learned-1"}}'])
def test_a_damaged_name_is_told_and_mended_by_calibrating_again(tmp_path: Path, text: str) -> None:
    (tmp_path / CURRENT).write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        current(tmp_path)
    with replacing(tmp_path) as new:
        write(new, "again")
    assert read(tmp_path) == {"again"}


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    from agora.routing.trust.sealed import write_sealed

    write_sealed(tmp_path / CURRENT, {"folder": "../../secrets"})
    with pytest.raises(ConfigError, match="names no folder"):
        current(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another folder"), replacing(tmp_path / "file"):
        pass
