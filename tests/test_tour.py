"""The pages that show code show code that works."""

import ast
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[tuple[int, str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in found]


@pytest.mark.model
async def test_the_tour_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, object] = {"__name__": "tour"}
    found = blocks("docs/tour.md")
    assert len(found) >= 9
    for line, source in found:
        code = compile("\n" * line + source, "docs/tour.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, space)  # noqa: S307
        if inspect.iscoroutine(result):
            await result
    said = capsys.readouterr().out
    assert "compound interest work? -> banker" in said
    assert "red in autumn? -> teacher" in said
    assert "RunFinished {'t1': 'done', 't2': 'done'}" in said
    assert "Missing from this answer" in said
    assert "About two million." in said
    assert "cloud: Canberra. (0.97; " in said
    assert "A pedestrian is crossing. over mobile" in said
