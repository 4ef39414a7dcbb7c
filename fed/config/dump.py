"""A configuration as text again: every setting told, and read to the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from fed.aggregate.rules import RULES
from fed.clusters.ways import WAYS
from fed.config.settings import FedConfig
from fed.config.tables import plain
from fed.data import PARTITIONS, Split

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def partition_name(split: Split) -> str:
    """What a configuration calls a way to divide rows."""
    return next(name for name, kind in PARTITIONS.items() if isinstance(split, kind))


def to_plain(config: FedConfig) -> dict[str, Any]:
    """The tables of `fed.toml`."""
    data = plain(config.data)
    data["partition"] = {"kind": partition_name(config.data.partition), **data["partition"]}
    options = RULES[config.aggregate.rule].options_type(**config.aggregate.settings)
    found: dict[str, Any] = {
        "model": plain(config.model),
        "data": data,
        "adapter": plain(config.adapter),
        "training": plain(config.training),
        "server": {"preset": config.server.preset, **plain(config.server.pace)},
        "aggregate": {"rule": config.aggregate.rule, **plain(options)},
        "fleet": plain(config.fleet),
        "run": plain(config.run),
    }
    if config.chain.stages:
        found["chain"] = [{"kind": stage.kind, **plain(stage)} for stage in config.chain.stages]
    if config.clusters is not None:
        grouped = WAYS[config.clusters.kind].options_type(**config.clusters.settings)
        found["clusters"] = {"kind": config.clusters.kind, **plain(grouped)}
    return found


def to_toml(config: FedConfig) -> str:
    """The text of `fed.toml`, without comments."""
    return "\n".join(_lines(to_plain(config), ())).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    simple = {k: v for k, v in table.items() if not _is_table(v) and not _is_tables(v)}
    if path and (simple or not table):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for name, value in simple.items():
        yield f"{_key(name)} = {_value(value)}"
    for name, value in table.items():
        if _is_table(value):
            yield from _lines(value, (*path, name))
        elif _is_tables(value):
            for entry in value:
                yield f"\n[[{'.'.join(map(_key, (*path, name)))}]]"
                for inner, one in entry.items():
                    yield f"{_key(inner)} = {_value(one)}"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            # JSON's strings are TOML's, but for the one control character that JSON leaves as it is.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(_value(v) for v in value)}]"
        case Mapping():
            return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }" if value else "{}"
        case _:
            return repr(value)
