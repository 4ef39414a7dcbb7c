"""`agora experts`: who can be asked, and who would be asked what."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from agora.cli.invocation import Invocation, of, run_async
from agora.cli.options import ConfigOption, JsonOption, NoPullOption
from agora.cli.tables import print_table
from agora.cli.text import first_line

if TYPE_CHECKING:
    from agora.config import Config
    from agora.types import ExpertCard

app = typer.Typer(help="See who can be asked, and who would be asked what.", invoke_without_command=True)


@app.callback()
def _experts(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_experts(context)


@app.command("list")
def list_experts(
    context: typer.Context,
    ready: Annotated[bool, typer.Option("--ready", help="The ready experts that agora.toml may start from.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """List the configured experts."""
    from agora.cli.settings import read_config
    from experts.build import expert_cards
    from experts.ready import ready_experts

    invocation = of(context)
    invocation.json = json
    settings = None if ready else read_config(config)
    cards = expert_cards(settings) if settings is not None else tuple(r.card for r in ready_experts().values())
    if json:
        invocation.print_json({"experts": [_plain(c, settings) for c in cards]})
        return
    columns: tuple[str, ...] = ("name", "good at")
    rows: list[tuple[str, ...]] = [(c.name, c.description) for c in cards]
    if settings is not None:
        columns = ("name", "tier", "node", "answers with", "good at")
        rows = [
            (c.name, c.tier, settings.experts[c.name].node, _model_of(settings, c.name), c.description) for c in cards
        ]
    print_table(invocation.out, columns, rows)


@app.command("show")
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The expert's name.")],
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Show all that is known of one expert."""
    from agora.cli.settings import read_config
    from agora.errors import InvalidRequest
    from experts.build import expert_cards, system_prompt_of

    invocation = of(context)
    invocation.json = json
    settings = read_config(config)
    cards = {c.name: c for c in expert_cards(settings)}
    if name not in cards:
        raise InvalidRequest(f"no expert {name!r}; there are: {', '.join(cards)}")
    card = cards[name]
    prompt = system_prompt_of(settings, name)
    if json:
        invocation.print_json({**_plain(card, settings), "system_prompt": prompt})
        return
    e = settings.experts[name]
    facts = {
        "good at": card.description,
        "node": f"{e.node} ({card.tier}), {_model_of(settings, name)}",
        "adapter": e.adapter.name if e.adapter else None,
        "told": prompt,
        "takes": ", ".join(card.modalities),
        "answers": f"at most {card.max_tokens} tokens, temperature {e.temperature:g}",
        "price": f"{card.price_per_mtok:g} per million tokens" if card.price_per_mtok else None,
        "keywords": ", ".join(card.keywords) or None,
    }
    invocation.say(Text(card.name, style="bold"))
    for label, value in facts.items():
        if value:
            invocation.say(Text(f"{label:>9}  ", style="dim").append(first_line(value), style="default"))
    for example in card.examples:
        invocation.say(Text("  example  ", style="dim").append(first_line(example), style="default"))


@app.command("route")
def route(
    context: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What would be asked; - reads stdin.")],
    config: ConfigOption = None,
    no_pull: NoPullOption = False,
    json: JsonOption = False,
) -> None:
    """Show whom a question would go to, and why; nobody is asked."""
    from agora.cli.question import read_question
    from agora.cli.settings import read_config

    invocation = of(context)
    invocation.json = json
    asked = read_question(question)
    settings = read_config(config)
    found = run_async(_route(invocation, settings, asked, pull=not no_pull))
    if json:
        invocation.print_json(found)
        return
    for place, candidate in enumerate(found["candidates"], start=1):
        head = Text(f"{place}. {candidate['expert']}  ", style="bold" if place == 1 else "")
        invocation.say(head.append(first_line(candidate["why"]), style="dim"))
    for note in found["notes"]:
        invocation.say(Text(f"note: {first_line(note)}", style="yellow"))


async def _route(invocation: Invocation, config: Config, question: str, *, pull: bool) -> dict[str, Any]:
    from agora.cli.progress import pulls
    from agora.square import Expert, Square
    from agora.types import Subtask
    from experts.build import expert_cards
    from experts.fake import FakeBackend
    from graphs.build import open_router

    # Routing reads cards and load. Nobody is asked, so no node is opened, and nobody is busy.
    idle = FakeBackend(name="idle")
    square = Square([Expert(card=c, backend=idle, node=config.experts[c.name].node) for c in expert_cards(config)])
    async with AsyncExitStack() as stack:
        with pulls(invocation) as view:
            view.doing("opening the router")
            routing = await stack.enter_async_context(open_router(config, pull=pull, progress=view))
        ranking = await routing.router.rank(Subtask(id="question", question=question), question, square)
    candidates = [{"expert": c.expert, "why": ranking.why(c.expert)} for c in ranking.candidates]
    return {"question": question, "candidates": candidates, "notes": list(routing.notes)}


def _model_of(config: Config, name: str) -> str:
    from agora.config import LocalNode, OpenAINode

    node = config.nodes[config.experts[name].node]
    match node:
        case LocalNode():
            return config.models[node.model].source
        case OpenAINode():
            return f"{node.model} at {node.url}"
        case _:
            return "a script"


def _plain(card: ExpertCard, config: Config | None) -> dict[str, Any]:
    from agora.types import to_plain

    plain: dict[str, Any] = to_plain(card)
    if config is not None:
        e = config.experts[card.name]
        plain |= {
            "node": e.node,
            "answers_with": _model_of(config, card.name),
            "ready": e.ready,
            "adapter": e.adapter.name if e.adapter else None,
            "temperature": e.temperature,
        }
    return plain
