"""`agora models`: the weights agora knows by a short name."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from agora.cli.invocation import of
from agora.cli.options import JsonOption
from agora.cli.tables import print_table
from agora.cli.text import size

app = typer.Typer(help="Find, fetch and check model weights.", invoke_without_command=True)

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="An alias of the catalogue, or OWNER/NAME on the hub.")]


@app.callback()
def _models(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models(context)


@app.command("list")
def list_models(context: typer.Context, json: JsonOption = False) -> None:
    """List the models of the catalogue and which are on this machine."""
    from experts.models import ModelStore

    invocation = of(context)
    invocation.json = json
    store = ModelStore()
    infos = store.list()
    if json:
        found = [
            {
                "alias": i.alias,
                "description": i.description,
                "kind": i.kind,
                "hub": i.hub,
                "licence": i.licence,
                "download_bytes": i.download_bytes,
                "disk_bytes": i.disk_bytes,
                "cached": i.cached,
                "path": str(i.path) if i.path else None,
            }
            for i in infos
        ]
        invocation.print_json({"cache": str(store.cache_dir), "models": found})
        return
    rows = [
        (i.alias, "yes" if i.cached else "no", size(i.download_bytes), size(i.disk_bytes), i.licence, i.description)
        for i in infos
    ]
    columns = ("alias", "here", "download", "disk", "licence", "what")
    print_table(invocation.out, columns, rows, right=("download", "disk"))
    if not all(i.cached for i in infos):
        invocation.note("fetch one with: agora models pull ALIAS")


@app.command("pull")
def pull(context: typer.Context, alias: Alias) -> None:
    """Fetch a model; one that is here already is checked."""
    from agora.cli.progress import pulls
    from experts.models import ModelStore

    invocation = of(context)
    with pulls(invocation) as view:
        folder = ModelStore().pull(alias, progress=functools.partial(view, alias))
    invocation.say(str(folder))


@app.command("path")
def path(context: typer.Context, alias: Alias) -> None:
    """Print the folder of a model that is on this machine."""
    from experts.models import ModelStore

    of(context).say(str(ModelStore().path(alias)))


@app.command("verify")
def verify(context: typer.Context, alias: Alias) -> None:
    """Read every byte of a model that is here and check it against its hash."""
    from agora.cli.progress import pulls
    from experts.models import ModelStore

    invocation = of(context)
    with pulls(invocation) as view:
        folder = ModelStore().verify(alias, progress=functools.partial(view, alias))
    invocation.say(f"{alias} is whole: {folder}")
