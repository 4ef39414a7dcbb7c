"""The configuration of one command, with what its options override."""

from __future__ import annotations

from pathlib import Path

from agora.config import Config, check_config, load_config
from agora.errors import InvalidRequest
from agora.types import Budget


def read_config(path: Path | str | None) -> Config:
    """Reads and checks a configuration; every name in it is checked against those that exist.

    Raises:
        ConfigError: If anything in it is wrong.
    """
    from experts.build import ready_names
    from graphs.build import graph_names

    return load_config(path, names={"experts.*.ready": ready_names(), **graph_names()})


def override(config: Config, *, graph: str | None = None, planner: str | None = None) -> Config:
    """The configuration with another graph or planner.

    Raises:
        InvalidRequest: If there is none of that name.
        ConfigError: If it needs what the configuration does not have.
    """
    from graphs.build import graph_names

    allowed = graph_names()
    chosen = {"name": graph, "planner": planner}
    for key, option in (("name", "--graph"), ("planner", "--planner")):
        value = chosen[key]
        if value is not None and value not in allowed[f"graph.{key}"]:
            raise InvalidRequest(f"{option} {value!r} is unknown; allowed: {', '.join(allowed[f'graph.{key}'])}")
    update: dict[str, object] = {key: value for key, value in chosen.items() if value is not None}
    if planner not in (None, "static"):
        update["subtasks"] = ()
    changed = config.model_copy(update={"graph": config.graph.model_copy(update=update)})
    check_config(changed)
    return changed


def budget_of(
    config: Config, *, deadline: float | None = None, cost: float | None = None, tokens: int | None = None
) -> Budget:
    """What a run may spend: what the options say, else what the configuration says.

    Raises:
        InvalidRequest: If a limit is not a positive number.
    """
    for field, option, value in (
        ("deadline_s", "--deadline", deadline),
        ("cost", "--cost", cost),
        ("tokens", "--tokens", tokens),
    ):
        try:
            Budget(**{field: value})  # type: ignore[arg-type]
        except InvalidRequest as e:
            # The reader knows the option, not the field that it fills.
            head, _, rest = e.message.removeprefix("budget ").partition(" ")
            raise InvalidRequest(
                f"{option} {rest}" if head == field else f"{option}: {e.message}", hint=e.hint
            ) from None
    return Budget(
        deadline_s=config.graph.deadline_s if deadline is None else deadline,
        cost=config.graph.cost if cost is None else cost,
        tokens=config.graph.tokens if tokens is None else tokens,
    )
