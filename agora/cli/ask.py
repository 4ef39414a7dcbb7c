"""`agora ask`: one question, one answer, and what happened on the way."""

from __future__ import annotations

from typing import Annotated

import typer

from agora.cli.invocation import of, run_async
from agora.cli.options import ConfigOption, JsonOption, NoPullOption


def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to answer; - to read it from stdin.")],
    config: ConfigOption = None,
    graph: Annotated[str | None, typer.Option("--graph", metavar="NAME", help="How experts reason.")] = None,
    planner: Annotated[str | None, typer.Option("--planner", metavar="NAME", help="Who splits the question.")] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", metavar="SECONDS", help="Return what there is after so long.")
    ] = None,
    cost: Annotated[float | None, typer.Option("--cost", metavar="MONEY", help="Most money to spend.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Most tokens to use.")] = None,
    reach: Annotated[
        str | None,
        typer.Option("--reach", metavar="LABEL", help="How far the question may go: local, edge or cloud."),
    ] = None,
    run_id: Annotated[str | None, typer.Option("--run-id", metavar="ID", help="Name the run.")] = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Do not keep the run; it cannot be resumed.")] = False,
    no_pull: NoPullOption = False,
    json: JsonOption = False,
) -> None:
    """Ask a question; experts answer its parts side by side.

    The answer goes to stdout. Exit code 3 says that parts of it are missing.
    """
    from agora.cli.question import read_question
    from agora.cli.running import Order, run_and_tell
    from agora.cli.settings import budget_of, override, read_config
    from agora.types import Tier, reach_of

    invocation = of(context)
    invocation.json = json
    asked = read_question(question)
    settings = override(read_config(config), graph=graph, planner=planner)
    budget = budget_of(settings, deadline=deadline, cost=cost, tokens=tokens)

    from graphs.run import new_run_id

    order = Order(
        config=settings,
        question=asked,
        run_id=run_id or new_run_id(),
        budget=budget,
        reach=Tier.CLOUD if reach is None else reach_of(reach, what="--reach"),
        pull=not no_pull,
    )
    raise typer.Exit(run_async(run_and_tell(invocation, order, stored=not no_store)))
