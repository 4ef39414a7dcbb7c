"""The examples work as they stand."""

import importlib.util
from pathlib import Path
from types import ModuleType

from agora.square import Expert, Square
from agora.types import ExpertCard
from experts.fake import FakeBackend

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_compose_puts_users_nodes_around_agoras() -> None:
    square = Square([Expert(card=ExpertCard(name="one", description="knows things"), backend=FakeBackend("fine"))])
    graph = load("compose").build(square)
    state = await graph.ainvoke({"question": "What is a loan, and what is an atom?"})
    assert state["verdict"].startswith("2 of 2 parts answered")
    assert "fine" in state["answer"]
    state = await graph.ainvoke({"question": "What is the password?"})
    assert state["verdict"] == "refused"
