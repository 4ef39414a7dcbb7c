"""`agora models`: which weights are here, and what to type for those that are not."""

from __future__ import annotations

import pytest


def test_the_catalogue_is_listed_with_what_is_here(agora):
    said = agora("models", "list")
    assert said.code == 0
    rows = {line.split()[0]: line.split()[1] for line in said.out.splitlines()[1:]}
    assert rows == {"smollm2-135m": "no", "qwen2.5-coder-1.5b": "no", "minilm-l6": "no"}
    assert "agora models pull ALIAS" in said.err
    assert agora("models").out == said.out


def test_the_list_as_json(agora):
    models = agora("models", "list", "--json").json["models"]
    assert {m["alias"] for m in models} >= {"smollm2-135m", "minilm-l6"}
    assert all(m["cached"] is False and m["path"] is None and m["download_bytes"] > 0 for m in models)


@pytest.mark.parametrize("command", ["path", "verify"])
def test_a_model_that_is_not_here_is_an_error_that_says_what_to_type(agora, command):
    said = agora("models", command, "minilm-l6")
    assert said.code == 1
    assert "minilm-l6 is not on this machine" in said.error
    assert "agora models pull minilm-l6" in said.err


@pytest.mark.parametrize("command", ["pull", "path", "verify"])
def test_an_unknown_alias_is_an_error_that_names_the_nearest(agora, command):
    said = agora("models", command, "smolm2-135m")
    assert said.code == 1
    assert "'smolm2-135m' is no model" in said.error
    assert "did you mean smollm2-135m?" in said.err


def test_a_pull_shows_its_steps_and_prints_the_folder(agora, monkeypatch, tmp_path):
    from experts.models import ModelStore
    from experts.progress import PullProgress

    def pull(self, source, *, progress):
        for done in (0, 50, 100):
            progress(PullProgress(phase="downloading", done=done, total=100))
        progress(PullProgress(phase="converting"))
        return tmp_path / source

    monkeypatch.setattr(ModelStore, "pull", pull)
    said = agora("models", "pull", "minilm-l6")
    assert (said.code, said.out) == (0, f"{tmp_path / 'minilm-l6'}\n")
    assert said.err.splitlines() == ["minilm-l6: downloading (100 B)", "minilm-l6: converting"]


@pytest.mark.parametrize("command", ["pull", "verify"])
def test_a_damaged_folder_is_said_to_be_a_damaged_folder(agora, home, command):
    (home / "mine").mkdir()
    said = agora("models", command, "./mine")
    assert said.code == 1
    assert "./mine is a folder on this machine, and damaged" in said.error
    assert "config.json" in said.error
    assert "models pull" not in said.err


@pytest.mark.parametrize("command", ["pull", "path", "verify"])
def test_an_empty_name_is_no_model(agora, command):
    said = agora("models", command, "")
    assert said.code == 1
    assert "'' is no model" in said.error
