"""`agora init`: a file that is accepted, and never a file that is lost."""

from __future__ import annotations

import pytest

from agora.config import default_config, load_config


def test_the_written_file_is_what_agora_does_without_one(agora, home):
    assert agora("init").code == 0
    assert load_config(home / "agora.toml").model_dump() == default_config().model_dump()
    assert "# " in (home / "agora.toml").read_text()


def test_a_folder_gets_a_file_and_another_name_may_be_given(agora, home):
    (home / "folder").mkdir()
    assert agora("init", "folder").code == 0
    assert agora("init", "other.toml").code == 0
    assert (home / "folder" / "agora.toml").read_text() == (home / "other.toml").read_text()
    assert agora("experts", "list", "--config", "other.toml").code == 0


def test_a_file_that_is_there_is_kept(agora, home):
    (home / "agora.toml").write_text("mine")
    said = agora("init")
    assert said.code == 1
    assert "is already there" in said.error
    assert "--force" in said.err
    assert (home / "agora.toml").read_text() == "mine"
    assert [p.name for p in home.iterdir()] == ["agora.toml"]


def test_force_overwrites(agora, home):
    (home / "agora.toml").write_text("mine")
    assert agora("init", "--force").code == 0
    assert load_config(home / "agora.toml").experts
    assert [p.name for p in home.iterdir()] == ["agora.toml"]


@pytest.mark.parametrize("path", ["no/such/folder.toml", "agora.toml/x"])
def test_a_place_that_cannot_be_written_is_one_clear_error(agora, home, path):
    (home / "agora.toml").write_text("mine")
    said = agora("init", path)
    assert said.code == 1
    assert "cannot be written" in said.error


def test_a_slash_at_the_end_says_that_a_folder_is_meant(agora, home):
    assert agora("init", "new/").code == 0
    assert load_config(home / "new" / "agora.toml").experts
    (home / "file").write_text("mine")
    said = agora("init", "file/")
    assert said.code == 1
    assert "file is a file, not a folder" in said.error
    assert (home / "file").read_text() == "mine"


def test_an_empty_path_is_an_error(agora, home):
    said = agora("init", "")
    assert said.code == 1
    assert "the path is empty" in said.error
    assert list(home.iterdir()) == []
