"""`agora keys`: the API keys that `agora serve` asks for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agora.cli.invocation import of
from agora.cli.options import ConfigOption, JsonOption
from agora.cli.tables import print_table
from agora.errors import ConfigError

if TYPE_CHECKING:
    from agora.serve.keys import Role

app = typer.Typer(help="Make, list and revoke the API keys that 'agora serve' asks for.", no_args_is_help=True)

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="What to call its holder.")]


@app.command("new")
def new(
    context: typer.Context,
    name: KeyName,
    neighbour: Annotated[bool, typer.Option("--neighbour", help="For another node, not for a client.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from agora.serve.keys import Role, new_key

    invocation = of(context)
    invocation.json = json
    file = _file(config)
    role: Role = Role.NEIGHBOUR if neighbour else Role.CLIENT
    key = new_key(file, name, role=role)
    if json:
        invocation.print_json({"name": name, "role": str(role), "key": key, "file": str(file)})
        return
    invocation.say(key)
    invocation.note(f"shown this once; its hash is in {file}")


@app.command("list")
def list_keys(context: typer.Context, config: ConfigOption = None, json: JsonOption = False) -> None:
    """List who has a key."""
    from agora.serve.keys import read_keys

    invocation = of(context)
    invocation.json = json
    keys = read_keys(_file(config))
    if json:
        invocation.print_json(
            {"keys": [{"name": k.name, "role": str(k.role), "created_at": k.created_at} for k in keys]}
        )
        return
    if not keys:
        invocation.note("no keys yet; make one with: agora keys new NAME")
        return
    rows = [(k.name, str(k.role), time.strftime("%Y-%m-%d %H:%M", time.localtime(k.created_at))) for k in keys]
    print_table(invocation.out, ("name", "role", "made"), rows)


@app.command("remove")
def remove(context: typer.Context, name: KeyName, config: ConfigOption = None) -> None:
    """Revoke a key; running servers notice within a second."""
    from agora.serve.keys import remove_key

    remove_key(_file(config), name)
    of(context).note(f"revoked {name}")


def _file(config: Path | None) -> Path:
    from agora.cli.settings import read_config

    settings = read_config(config)
    if settings.server.keys is None:
        raise ConfigError(f"{settings.origin}: [server] keys is not set", hint='add to it: [server] keys = "keys.json"')
    return settings.server.keys
