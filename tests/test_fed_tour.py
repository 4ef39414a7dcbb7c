"""The page that shows learning together shows code that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "fed.md"


@pytest.mark.model
def test_the_tour_of_learning_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(found) == 7
    space: dict[str, object] = {"__name__": "fed_tour"}
    threads = torch.get_num_threads()
    # Two threads wait for each other where other tests run beside this one.
    torch.set_num_threads(1)
    try:
        for block in found:
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(PAGE), "exec"), space)  # noqa: S102
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "numbers changed, loss" in said
    assert "['Absorb', " in said and "'Publish'" in said
    assert "version 2," in said
    assert "['adapter_config.json', 'adapter_model.safetensors']" in said
    assert "1 versions were made ['all']" in said
    assert "finished: 2 updates" in said
