"""`agora demo`: real experts on a real model, from nothing."""

from __future__ import annotations

import json

import platformdirs
import pytest

from agora.cli.demo import QUESTION
from agora.types import Answer, RunResult

REAL_CACHE = str(platformdirs.user_cache_path())


@pytest.mark.model
def test_the_demo_answers_every_part_and_ignores_the_users_configuration(home, capsys, monkeypatch):
    from agora.cli.app import run

    # The models are those of the user who runs the tests; everything else is the test's own.
    monkeypatch.delenv("AGORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", REAL_CACHE)
    (home / "agora.toml").write_text("nonsense")
    code = run(["demo", "--json"])
    result = RunResult.from_dict(json.loads(capsys.readouterr().out))
    assert code == 0
    assert result.question == QUESTION
    assert result.complete
    assert len(result.graph) >= 4
    assert any(s.inputs for s in result.graph)
    outcomes = [result.outcome(s.id) for s in result.graph]
    assert all(isinstance(o, Answer) and o.usage.completion_tokens > 5 for o in outcomes)
    assert len({o.expert for o in outcomes}) >= 3
