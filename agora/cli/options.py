"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Configuration; by default ./agora.toml, then the user's."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
NoPullOption = Annotated[
    bool, typer.Option("--no-pull", help="Fail if a model is not on this machine, rather than fetch it.")
]
