"""From a configuration to a graph: planner, router and synthesiser by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agora.config import Config, load_config, parse_config
from agora.errors import AgoraError, ConfigError, NoExpert
from agora.protocols import GenerateRequest, ScoreRequest
from agora.routing import ROUTERS
from agora.square import Expert, Square
from agora.types import Answer, ExpertCard, RunResult
from experts.build import open_square
from experts.embed import MiniLM
from experts.fake import FakeBackend
from experts.models import ModelStore
from graphs.build import GRAPHS, PLANNERS, SYNTHESISERS, Routing, build_graph, graph_names, open_router
from graphs.named import Named
from graphs.plan import PLANNERS as KNOWN_PLANNERS
from graphs.run import run

BASE = """
[nodes.n]
kind = "fake"
reply = "forty-two"
[experts.finance]
node = "n"
ready = "finance"
price_per_mtok = 1000000
[experts.education]
node = "n"
ready = "education"
[graph]
router = "keywords"
"""

TWO = "What is a bond? Explain photosynthesis to a school class."


def config(more: str = "", base: str = BASE) -> Config:
    return parse_config(base + more, file=None)


async def answer(config: Config, question: str = TWO, **options: Any) -> RunResult:
    square = await open_square(config)
    try:
        async with open_router(config) as routing:
            return await run(build_graph(config, square, routing=routing, **options), question)
    finally:
        await square.aclose()


async def test_the_graph_answers_with_the_configured_experts() -> None:
    result = await answer(config())
    assert [result.attempts[s.id][-1].expert for s in result.graph] == ["finance", "education"]
    assert result.planner == "rules"
    assert result.text.count("forty-two") == 2
    assert result.notes == ()


async def test_a_fixed_plan_is_followed() -> None:
    result = await answer(
        config(
            'planner = "static"\n[[graph.subtasks]]\nid = "one"\nquestion = "Think of {question}"\n'
            '[[graph.subtasks]]\nid = "two"\nquestion = "Then: #one"\ninputs = ["one"]\nexpert = "education"\n'
        ),
        "a number",
    )
    assert result.planner == "static"
    assert [s.question for s in result.graph] == ["Think of a number", "Then: #one"]
    assert result.attempts["two"][-1].expert == "education"


async def test_a_model_plans_and_its_plan_costs_what_its_expert_costs() -> None:
    plan = {"subtasks": [{"id": "t1", "question": "What is a loan?", "inputs": []}]}
    replies = f"replies = {{ 'a question' = {json.dumps(json.dumps(plan))} }}"
    base = BASE.replace('reply = "forty-two"', f'reply = "forty-two"\n{replies}')
    llm = 'planner = "llm"\nplanner_expert = "{}"\n'
    priced, free = [
        await answer(config(llm.format(name), base), "Please answer a question for me.")
        for name in ("finance", "education")
    ]
    assert priced.planner == free.planner == "llm", priced.notes
    assert [s.question for s in priced.graph] == ["What is a loan?"]
    asked = [r.attempts["t1"][-1].outcome.usage for r in (priced, free)]
    assert asked[0] == asked[1]
    assert priced.usage.cost - asked[0].cost == pytest.approx(priced.usage.tokens - asked[0].tokens)
    assert free.usage.cost == asked[1].cost


async def test_a_model_puts_the_parts_together() -> None:
    base = BASE.replace('reply = "forty-two"', 'reply = "forty-two"\nreplies = { "One answer:" = "both at once" }')
    result = await answer(config('synthesiser = "llm"\nsynthesiser_expert = "education"\n', base))
    assert result.text == "both at once"


async def test_the_limits_of_the_file_hold() -> None:
    result = await answer(config("tokens = 1\n"))
    assert len(result.missing) == 2
    failing = BASE.replace('reply = "forty-two"', 'fail = "rejected"')
    assert all(len(a) == 1 for a in (await answer(config("max_attempts = 1\n", failing))).attempts.values())
    assert all(len(a) == 2 for a in (await answer(config("max_attempts = 2\n", failing))).attempts.values())


async def test_the_embedding_router_needs_its_model_and_without_it_keywords_choose_and_every_result_says_so(
    tmp_path: Path,
) -> None:
    embedding = config(base=BASE.replace('router = "keywords"', 'router = "embedding"'))
    square = await open_square(embedding)
    async with open_router(embedding, store=ModelStore(tmp_path)) as routing:
        (note,) = routing.notes
        assert note.startswith("experts are chosen by keywords, since the embedding model cannot be had: ")
        assert "agora models pull minilm-l6" in note
        result = await run(build_graph(embedding, square, routing=routing), TWO)
    assert result.notes == (note,)
    assert [result.attempts[s.id][-1].expert for s in result.graph] == ["finance", "education"]


async def test_a_damaged_embedding_model_is_as_good_as_none(tmp_path: Path) -> None:
    class Store(ModelStore):
        def resolve(self, source: Any, **options: Any) -> Path:
            (tmp_path / "model.safetensors").write_bytes(b"nothing")
            (tmp_path / "config.json").write_text("{}")
            return tmp_path

    async with open_router(config(base=BASE.replace("keywords", "embedding")), store=Store(tmp_path)) as routing:
        assert "chosen by keywords" in routing.notes[0]


@pytest.mark.model
async def test_the_embedding_router_chooses_by_meaning_and_is_closed_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[MiniLM] = []
    aclose = MiniLM.aclose

    async def watched(self: MiniLM) -> None:
        closed.append(self)
        await aclose(self)

    monkeypatch.setattr(MiniLM, "aclose", watched)
    embedding = config(base=BASE.replace('router = "keywords"', 'router = "embedding"'))
    square = await open_square(embedding)
    async with open_router(embedding, pull=True) as routing:
        assert routing.notes == ()
        graph = build_graph(embedding, square, routing=routing)
        result = await run(graph, "Where should I put my savings for old age?")
        assert result.attempts["t1"][-1].expert == "finance"
        assert not closed
    assert len(closed) == 1


def test_every_name_of_a_registry_may_be_written_into_a_file_and_no_other(tmp_path: Path) -> None:
    names = graph_names()
    assert set(names["graph.planner"]) == set(PLANNERS) == set(KNOWN_PLANNERS)
    assert set(names["graph.router"]) == set(ROUTERS)
    assert set(names["graph.synthesiser"]) == set(SYNTHESISERS)
    assert set(names["graph.name"]) == set(GRAPHS)
    file = tmp_path / "agora.toml"
    for key, allowed in names.items():
        for name in (*allowed, "nonsense"):
            extra = {"planner": 'planner_expert = "finance"', "synthesiser": 'synthesiser_expert = "finance"'}
            part = key.removeprefix("graph.")
            plan = '[[graph.subtasks]]\nid = "a"\nquestion = "q"\n' if name == "static" else ""
            base = BASE.replace('router = "keywords"\n', "") if part == "router" else BASE
            file.write_text(f'{base}{part} = "{name}"\n{extra.get(part, "")}\n{plan}')
            if name != "nonsense":
                assert getattr(load_config(file, names=names).graph, part) == name
                continue
            with pytest.raises(ConfigError, match=f'{key} = "nonsense": .*allowed: {", ".join(allowed)}'):
                load_config(file, names=names)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ('planner = "psychic"', 'graph.planner = "psychic": allowed: '),
        ('synthesiser = "psychic"', 'graph.synthesiser = "psychic": allowed: sections, llm'),
        ('name = "diagonal"', 'graph.name = "diagonal": allowed: horizontal'),
    ],
)
async def test_a_name_that_nobody_has_is_refused_when_the_graph_is_built(more: str, told: str) -> None:
    square = await open_square(config())
    with pytest.raises(ConfigError) as caught:
        build_graph(config(more), square)
    assert told in caught.value.message


async def test_a_router_that_nobody_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'graph\.router = "psychic": allowed: embedding, keywords'):
        async with open_router(config(base=BASE.replace("keywords", "psychic"))):
            pass


async def test_a_square_that_lost_the_planning_expert_is_refused() -> None:
    square = await open_square(config())
    square.leave("education")
    for what in ("planner", "synthesiser"):
        with pytest.raises(ConfigError, match=f"{what} \"llm\" needs an expert, got 'education'; allowed: finance"):
            build_graph(config(f'{what} = "llm"\n{what}_expert = "education"\n'), square)


EDGE = '[neighbours.edge]\nurl = "http://127.0.0.1:9"\n'


def of_the_edge(reply: str, price: float = 0.0) -> Expert:
    card = ExpertCard(name="edge.law", description="contracts", price_per_mtok=price)
    return Expert(card=card, backend=FakeBackend(reply), node="edge")


async def test_a_planner_of_a_neighbour_plans_while_it_is_here_and_the_rules_while_it_is_not() -> None:
    edge = config('planner = "llm"\nplanner_expert = "edge.law"\n' + EDGE)
    square = await open_square(edge)
    graph = build_graph(edge, square)
    before = await run(graph, TWO)
    assert before.planner == "rules" and not before.missing
    assert before.notes[0].endswith("(expert 'edge.law' is not here now); planned by rules")
    plan = {"subtasks": [{"id": "t1", "question": "What is a loan?", "inputs": [], "expert": "education"}]}
    square.join(of_the_edge(json.dumps(plan), price=1_000_000))
    during = await run(graph, TWO)
    assert (during.planner, during.notes) == ("llm", ())
    assert during.attempts["t1"][-1].expert == "education"
    assert during.usage.cost > 0
    square.leave("edge.law")
    assert (await run(graph, TWO)).notes == before.notes


async def test_a_writer_of_a_neighbour_writes_while_it_is_here_and_else_the_parts_are_given_as_they_are() -> None:
    edge = config('synthesiser = "llm"\nsynthesiser_expert = "edge.law"\n' + EDGE)
    square = await open_square(edge)
    graph = build_graph(edge, square)
    before = await run(graph, TWO)
    assert before.text.count("forty-two") == 2 and not before.missing
    assert "edge.law could not put the parts together (expert 'edge.law' is not here now)" in before.notes[0]
    square.join(of_the_edge("both at once"))
    during = await run(graph, TWO)
    assert (during.text, during.notes) == ("both at once", ())
    square.leave("edge.law")
    assert (await run(graph, TWO)).notes == before.notes


async def test_whoever_is_not_here_fails_in_the_same_way_however_it_is_asked() -> None:
    nobody = Named(Square(), "edge.law").here_or_nobody()
    with pytest.raises(NoExpert, match=r"'edge\.law' is not here now"):
        await nobody.ask("Who?")
    with pytest.raises(NoExpert):
        async for _ in nobody.backend.stream(GenerateRequest(prompt="x")):
            pass
    with pytest.raises(NoExpert):
        await nobody.backend.score(ScoreRequest(prompt="x", continuations=("y",)))
    health = await nobody.backend.health()
    assert not health.ok and "not here now" in health.detail
    with pytest.raises(NoExpert):
        Named(Square(), "edge.law").here()


async def test_without_a_router_experts_are_chosen_by_keywords() -> None:
    square = await open_square(config())
    result = await run(build_graph(config(), square), "How are bonds taxed?")
    assert isinstance(result.outcome("t1"), Answer)
    assert "keyword match" in result.attempts["t1"][0].why


async def test_an_error_inside_closes_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Embedder:
        async def aclose(self) -> None:
            closed.append(True)

    async def opened(*_: object) -> Any:
        return Embedder()

    monkeypatch.setattr("graphs.build._open_embedder", opened)
    with pytest.raises(AgoraError, match="inside"):
        async with open_router(config(base=BASE.replace("keywords", "embedding"))) as routing:
            assert isinstance(routing, Routing)
            raise AgoraError("inside")
    assert closed == [True]
