"""Reads `agora.toml`: finds it, checks every key, and checks what the tables say of each other."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import platformdirs
from pydantic import ValidationError

from agora.config.collaboration import HERE, LinkConfig
from agora.config.nodes import FakeNode, LlamaCppNode, LocalNode, OpenAINode, VllmNode
from agora.config.problems import Key, Problem, error_of, nearest, problems_of, read_text, shown
from agora.config.schema import Config, ExpertConfig
from agora.errors import ConfigError, InvalidPlan

FILE_NAME: Final = "agora.toml"

MAX_FILE_BYTES: Final = 1_000_000
"""Bytes of a configuration file: a thousand experts with long prompts."""

Names = Mapping[str, Collection[str]]
"""Allowed values by dotted key, `*` standing for any name: `{"graph.planner": ("rules", "llm")}`."""


def template() -> str:
    """The commented `agora.toml` that `agora init` writes; read by itself it is the built-in configuration."""
    return resources.files("agora.config").joinpath("template.toml").read_text(encoding="utf-8")


def find_config() -> Path | None:
    """The file that is used when none is named: `./agora.toml`, else the one in the user's config folder."""
    candidates = (Path.cwd() / FILE_NAME, platformdirs.user_config_path("agora") / FILE_NAME)
    return next((c for c in candidates if c.exists()), None)


def load_config(path: Path | str | None = None, *, names: Names | None = None) -> Config:
    """Reads and checks a configuration.

    Args:
        path: The file; None for `find_config`, and if that finds none, `default_config`.
        names: Allowed values of keys that name something this module does not know, such as planners.

    Raises:
        ConfigError: If the file cannot be read or anything in it is wrong; the message tells all that is.
    """
    file = Path(path).expanduser() if path is not None else find_config()
    if file is None:
        return default_config()
    file = file.absolute()
    return parse_config(read_text(file, max_bytes=MAX_FILE_BYTES), file=file, names=names)


def default_config() -> Config:
    """The built-in configuration: the five ready experts on one small local model."""
    return parse_config(template(), file=None)


def parse_config(text: str, *, file: Path | None, names: Names | None = None) -> Config:
    """Checks the text of a configuration.

    Args:
        text: TOML.
        file: Where it was read, for messages and relative paths; None for the built-in one.
        names: As for `load_config`.

    Raises:
        ConfigError: If anything in it is wrong.
    """
    origin = str(file) if file else "the built-in configuration"
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{origin}: not valid TOML: {e}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: not valid TOML: nested too deeply") from None
    problems = list(_disallowed(plain, names or {}))
    try:
        config = Config.model_validate(plain, context={"folder": (file or Path.cwd() / FILE_NAME).parent})
    except ValidationError as e:
        raise error_of([*problems_of(e), *problems], origin=origin, text=text) from None
    config = _with_defaults(config)
    problems += _contradictions(config)
    if problems:
        raise error_of(problems, origin=origin, text=text)
    config._file = file
    return config


def check_config(config: Config) -> None:
    """Checks what the tables say of each other; for a configuration that was changed after it was read.

    Raises:
        ConfigError: If anything in it cannot be; the message tells all that is.
    """
    if problems := list(_contradictions(config)):
        raise error_of(problems, origin=config.origin)


def may_join(config: Config, expert: str) -> bool:
    """Whether an expert of that name may come from a neighbour: `NEIGHBOUR.NAME`, if it may be asked for NAME.

    Args:
        config: Whose neighbours.
        expert: What the expert would be called here.
    """
    for name, neighbour in config.neighbours.items():
        there = expert.removeprefix(f"{name}.")
        if there not in ("", expert) and (neighbour.experts is None or there in neighbour.experts):
            return True
    return False


def _with_defaults(config: Config) -> Config:
    """A file that says nothing of models, nodes and experts gets the built-in ones."""
    if config.models or config.nodes or config.experts:
        return config
    built_in = default_config()
    return config.model_copy(update={"models": built_in.models, "nodes": built_in.nodes, "experts": built_in.experts})


def _disallowed(plain: Mapping[str, Any], names: Names) -> Iterator[Problem]:
    for pattern, allowed in names.items():
        for key, value in _matching(plain, pattern.split("."), ()):
            if isinstance(value, str) and value not in allowed:
                yield Problem(key=key, text=nearest(value, allowed), value=shown(value))


def _matching(plain: Any, pattern: list[str], key: Key) -> Iterator[tuple[Key, Any]]:
    if not pattern:
        yield key, plain
    elif isinstance(plain, Mapping):
        for part in plain if pattern[0] == "*" else [p for p in pattern[:1] if p in plain]:
            yield from _matching(plain[part], pattern[1:], (*key, part))


def _contradictions(config: Config) -> Iterator[Problem]:
    """What the tables say of each other that cannot be."""
    if not config.experts:
        yield Problem(key=("experts",), text="nobody to ask: add at least one [experts.NAME]")
    for name, node in config.nodes.items():
        if isinstance(node, LocalNode) and node.model not in config.models:
            yield _unknown_name(("nodes", name, "model"), node.model, config.models, "models")
        if not isinstance(node, FakeNode | OpenAINode | VllmNode):
            continue
        if node.max_waiting is not None and node.max_running is None:
            yield Problem(key=("nodes", name, "max_waiting"), text="needs max_running: nothing waits without it")
    for name, expert in config.experts.items():
        yield from _expert(name, expert, config)
    yield from _plan(config)
    for asked in config.vertical.experts or ():
        yield from _someone(("vertical", "experts"), asked, config)
    for name, link in config.links.items():
        yield from _link(name, link, config)
    for key, chosen in (("planner", config.graph.planner), ("synthesiser", config.graph.synthesiser)):
        expert_key = f"{key}_expert"
        asked = getattr(config.graph, expert_key)
        if chosen == "llm" and asked is None:
            text = f'is required for {key} = "llm"; allowed: {", ".join(config.experts)}'
            yield Problem(key=("graph", expert_key), text=text)
        if asked is not None:
            yield from _someone(("graph", expert_key), asked, config)


def _plan(config: Config) -> Iterator[Problem]:
    key = ("graph", "subtasks")
    if (config.graph.planner == "static") != bool(config.graph.subtasks):
        yield Problem(key=key, text='a fixed plan needs both planner = "static" and [[graph.subtasks]]')
    try:
        plan = config.graph.plan
    except InvalidPlan as e:
        yield Problem(key=key, text=e.message)
        return
    for s in plan or ():
        if s.expert is not None:
            yield from _someone((*key, s.id, "expert"), s.expert, config)


def _someone(key: Key, name: str, config: Config) -> Iterator[Problem]:
    """An expert that is neither here nor may come from a neighbour."""
    if name in config.experts or may_join(config, name):
        return
    theirs = [f"{n}.{expert}" for n, c in config.neighbours.items() for expert in c.experts or ("NAME",)]
    yield _unknown_name(key, name, [*config.experts, *theirs], "experts")


def _expert(name: str, expert: ExpertConfig, config: Config) -> Iterator[Problem]:
    node = config.nodes.get(expert.node)
    if node is None:
        yield _unknown_name(("experts", name, "node"), expert.node, config.nodes, "nodes")
    yield from _also(name, expert, config)
    adapter = expert.adapter
    if adapter is None:
        return
    key = ("experts", name, "adapter")
    if isinstance(node, LlamaCppNode):
        yield Problem(key=key, text='a node of kind "llamacpp" has no adapters; use one of kind "local" or "vllm"')
        return
    if isinstance(node, LocalNode) and adapter.folder is None:
        yield Problem(key=(*key, "folder"), text="is required on a local node")
    if isinstance(node, VllmNode) and node.url is None and adapter.folder is None:
        yield Problem(key=(*key, "folder"), text="is required on a vLLM node that agora starts")
    if adapter.folder is not None and not adapter.folder.is_dir():
        yield Problem(key=(*key, "folder"), text="is not a folder", value=shown(str(adapter.folder)))
    if isinstance(node, FakeNode | OpenAINode):
        if adapter.folder is not None:
            text = f'a node of kind "{node.kind}" knows its adapters by name; leave the folder out'
            yield Problem(key=(*key, "folder"), text=text)
        if isinstance(node, OpenAINode) and not node.adapters:
            text = f"node {expert.node!r} does not claim adapters; add capabilities = {{ adapters = true }} to it"
            yield Problem(key=key, text=text)


def _also(name: str, expert: ExpertConfig, config: Config) -> Iterator[Problem]:
    key = ("experts", name, "also")
    machines = [*config.nodes, *config.neighbours]
    for other in expert.also:
        if other not in machines:
            yield _unknown_name(key, other, machines, "nodes] or [neighbours")
    twice = {n for n in (expert.node, *expert.also) if (expert.node, *expert.also).count(n) > 1}
    if twice:
        yield Problem(key=key, text=f"names {', '.join(sorted(twice))} twice, with what node says")


def _link(name: str, link: LinkConfig, config: Config) -> Iterator[Problem]:
    machines = [*config.nodes, *config.neighbours]
    if HERE in machines:
        local = config.nodes.get(HERE)
        if not isinstance(local, LocalNode | LlamaCppNode | FakeNode):
            yield Problem(
                key=("links", name), text=f'a machine elsewhere is called "{HERE}", which is this one\'s name'
            )
    if link.target not in machines or link.target == HERE:
        yield _unknown_name(("links", name, "target"), link.target, machines, "nodes] or [neighbours")
    if link.source != HERE and link.source not in config.neighbours:
        yield _unknown_name(("links", name, "source"), link.source, [HERE, *config.neighbours], "neighbours")


def _unknown_name(key: Key, value: str, allowed: Collection[str], table: str) -> Problem:
    return Problem(key=key, text=f"not in [{table}]; {nearest(value, allowed)}", value=shown(value))
