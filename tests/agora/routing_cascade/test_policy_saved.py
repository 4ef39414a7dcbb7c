"""A saved policy decides as before; what is damaged or foreign is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agora.errors import ModelError
from agora.routing.cascade.fit import Kinds
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.policy import Query
from agora.routing.cascade.replay import play
from agora.routing.cascade.saved import FILE, load, save


def test_it_decides_the_same(kinds: Kinds, unseen: Outcomes, tmp_path: Path) -> None:
    for kind, fitted in kinds.by_kind.items():
        again = load(save(fitted, tmp_path / kind))
        assert again.vertices == fitted.vertices and again.top == fitted.top and again.report == fitted.report
        assert again.trade_off == fitted.trade_off
        board, board_again = fitted.mind.board(unseen), again.mind.board(unseen)
        for vertex in fitted.vertices:
            a, b = play(vertex.rule, board), play(vertex.rule, board_again)
            assert np.array_equal(a.asked, b.asked) and np.array_equal(a.taken, b.taken)
        query = Query(text=unseen.questions[0])
        assert again.policy().decide(query, [], allowed={0, 1, 2}) == fitted.policy().decide(
            query, [], allowed={0, 1, 2}
        )


def test_saving_again_replaces(kinds: Kinds, tmp_path: Path) -> None:
    save(kinds.by_kind["routing"], tmp_path)
    (tmp_path / "policy-0000000000000000.safetensors").write_bytes(b"an older one")
    save(kinds.by_kind["cascade"], tmp_path)
    assert load(tmp_path).vertices == kinds.by_kind["cascade"].vertices
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no saved policy"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"format": "other"}', "[" * 100_000])
def test_foreign_files(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError, match=r"no JSON|not a saved policy"):
        load(tmp_path)


def test_damage_is_noticed(kinds: Kinds, tmp_path: Path) -> None:
    save(kinds.picked, tmp_path)
    told = json.loads((tmp_path / FILE).read_text())

    def write(change: dict[str, object]) -> None:
        (tmp_path / FILE).write_text(json.dumps(told | change))

    write({"version": 99})
    with pytest.raises(ModelError, match="version 99"):
        load(tmp_path)
    write({"body": told["body"] | {"trade_off": 5.0}})
    with pytest.raises(ModelError, match="checksum"):
        load(tmp_path)
    write({})
    (tensors,) = tmp_path.glob("*.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(ModelError, match="checksum"):
        load(tmp_path)
    tensors.write_bytes(whole[:100])
    with pytest.raises(ModelError, match="checksum"):
        load(tmp_path)
    tensors.unlink()
    with pytest.raises(ModelError, match="no policy-"):
        load(tmp_path)
