"""`agora demo`: a real question, decomposed and answered by the ready experts on a small model, live."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.text import Text

from agora.cli.invocation import of, run_async
from agora.cli.options import JsonOption

QUESTION: Final = (
    "Explain how vaccines protect the body, then write a quiz question about it. "
    "What is inflation, and what does a router do in a home network? "
    "How does a robot vacuum find its way around a room? What is photosynthesis?"
)
"""Six parts for five experts; the second part stands on the answer to the first. Of two dozen questions that
were tried, these are among those that 135 million parameters know most about."""


def demo(
    context: typer.Context,
    question: Annotated[str, typer.Argument(metavar="[QUESTION]", help="Your own question instead.")] = QUESTION,
    json: JsonOption = False,
) -> None:
    """Watch five experts on one small local model answer the parts of a question.

    Fetches what is missing on first use. Needs no agora.toml, and ignores yours.
    """
    from agora.cli.question import read_question
    from agora.cli.running import Order, run_and_tell
    from agora.cli.settings import budget_of
    from agora.config import default_config

    invocation = of(context)
    invocation.json = json
    asked = read_question(question)
    config = default_config()
    if not json:
        invocation.say(Text("agora demo", style="bold"))
        invocation.say(
            "One question is split into parts. Each part goes to the expert that is good at it, as soon as the parts "
            "it stands on are answered."
        )
        invocation.say("The model is tiny, so that it runs anywhere: it writes fluently and errs freely.")
        models = ", ".join(m.source for m in config.models.values())
        experts = ", ".join(config.experts)
        invocation.say(Text(f"model:    {models}\nexperts:  {experts}\nquestion: {asked}\n", style="dim"))

    from graphs.run import new_run_id

    order = Order(config=config, question=asked, run_id=new_run_id(), budget=budget_of(config))
    code = run_async(run_and_tell(invocation, order, stored=True))
    if not json:
        invocation.say(
            Text(f"\nsee it again: agora runs show {order.run_id}\nask your own: agora ask 'QUESTION'", style="dim")
        )
    raise typer.Exit(code)
