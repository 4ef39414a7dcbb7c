"""Your own LangGraph nodes around an agora graph.

A guard decides whether the question may be asked at all, agora's experts answer it together, and a last node says how
sure the answer is. State, streaming and checkpoints are LangGraph's; the events inside are agora's.

    python examples/compose.py "What is a base station and how does a robot arm grip things?"
"""

import asyncio
import sys
from typing import Any, Literal, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from agora import AttemptEnded, RunResult, Square
from agora.config import load_config
from experts.build import open_square
from graphs import horizontal


class State(TypedDict, total=False):
    """What flows through: agora reads `question` and writes `answer` and `result`; the rest is ours."""

    question: str
    answer: str
    result: dict[str, Any]
    verdict: str


def guard(state: State) -> Literal["reason", "refuse"]:
    return "refuse" if "password" in state["question"].lower() else "reason"


async def refuse(state: State) -> State:
    return {"answer": "That is not for asking.", "verdict": "refused"}


async def judge(state: State) -> State:
    result = RunResult.from_dict(state["result"])
    answered = len(result.attempts) - len(result.missing)
    return {"verdict": f"{answered} of {len(result.attempts)} parts answered in {result.seconds:.1f} s"}


def build(square: Square) -> CompiledStateGraph[State]:
    builder = StateGraph(State)
    builder.add_node("reason", horizontal(square))
    builder.add_node("refuse", refuse)
    builder.add_node("judge", judge)
    builder.add_conditional_edges(START, guard)
    builder.add_edge("reason", "judge")
    builder.add_edge("judge", END)
    builder.add_edge("refuse", END)
    return builder.compile()


async def main(question: str) -> None:
    square = await open_square(load_config(None), pull=True)
    try:
        graph = build(square)
        async for _, mode, item in graph.astream(
            {"question": question}, stream_mode=["custom", "values"], subgraphs=True
        ):
            if mode == "custom" and isinstance(item, AttemptEnded):
                print(f"  {item.subtask}: {item.result.expert} took {item.result.seconds:.1f} s")
            elif mode == "values":
                state = item
        print(state["answer"], "", state["verdict"], sep="\n")
    finally:
        await square.aclose()


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "What is a base station and how does a robot arm grip things?"))
