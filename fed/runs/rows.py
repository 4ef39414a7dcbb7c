"""The rows of a run: read, divided among clients, and some held back to judge on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from agora.errors import ConfigError, InvalidRequest
from fed.config.settings import DataSettings
from fed.data import Example, Subset, check_clients, glue, instructions, jsonl, title_abstract

HELD_BACK: Final = 0.2
"""Most of the rows that are held back to judge on, where they are not read from elsewhere: the usual fifth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Who has which rows.

    Attributes:
        clients: Rows to train on by client, of those that take part.
        judged: Rows that every model is judged on.
        own: Rows by client that only the client's own model is judged on.
        left_out: Clients that do not take part, with the reason.
        notes: What is odd about clients that do.
        told: What the user should know of all this.
        digest: Of all rows, sha256 in hexadecimal.
    """

    clients: Mapping[str, Sequence[Example]]
    judged: Sequence[Example]
    own: Mapping[str, Sequence[Example]]
    left_out: Mapping[str, str]
    notes: Mapping[str, str]
    told: tuple[str, ...]
    digest: str


def rows_of(data: DataSettings, seed: int) -> Rows:
    """Reads and divides the rows.

    Args:
        data: Where they are, and how they are divided.
        seed: Of the division, and of what is held back.

    Raises:
        InvalidRequest: If the data cannot be read, divided or learned from.
    """
    told: list[str] = []
    rows = _READERS[data.source](data, data.path, data.split, data.limit)
    judged: Sequence[Example] = ()
    digest = _digest(rows)
    if data.eval_rows and (data.eval_path is not None or data.eval_split is not None):
        judged = _READERS[data.source](data, data.eval_path, data.eval_split or data.split, data.eval_rows)
        digest = _digest([*rows, *judged])
    elif data.eval_rows:
        wanted = min(data.eval_rows, int(HELD_BACK * len(rows)))
        if wanted < data.eval_rows:
            told.append(f"{wanted} rows are held back to judge on, not {data.eval_rows}: a fifth of {len(rows):,}")
        order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
        judged = Subset(rows, np.sort(order[:wanted]).tolist())
        rows = [rows[i] for i in np.sort(order[wanted:]).tolist()]
    divided = data.partition.split(rows, data.clients, seed).of(rows)
    checked = check_clients(divided)
    clients: dict[str, Sequence[Example]] = {}
    own: dict[str, Sequence[Example]] = {}
    for number, (name, held) in enumerate(checked.clients.items()):
        clients[name], own[name] = _held_back(held, data.eval_per_client, [seed, number])
    if data.eval_per_client and not any(len(held) for held in own.values()):
        told.append("no client has rows enough to hold some back to judge its own model on")
    return Rows(
        clients=clients,
        judged=judged,
        own={name: held for name, held in own.items() if len(held)},
        left_out=checked.left_out,
        notes=checked.notes,
        told=tuple(told),
        digest=digest,
    )


def _held_back(rows: Sequence[Example], wanted: int, seed: list[int]) -> tuple[Sequence[Example], Sequence[Example]]:
    count = min(wanted, int(HELD_BACK * len(rows)))
    if not count:
        return rows, ()
    order = np.random.default_rng(seed).permutation(len(rows))
    return Subset(rows, np.sort(order[count:]).tolist()), Subset(rows, np.sort(order[:count]).tolist())


def _digest(rows: Sequence[Example]) -> str:
    found = hashlib.sha256()
    for row in rows:
        for text in (row.system, row.prompt, row.response, row.label, row.group, *row.choices):
            data = text.encode("utf-8", "surrogatepass")
            found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def _jsonl(data: DataSettings, path: Path | None, split: str, limit: int | None) -> list[Example]:
    if path is None or data.template is None:
        raise ConfigError("data of source 'jsonl' needs a path and a template")
    return jsonl(path, data.template, limit=limit)


def _glue(data: DataSettings, path: Path | None, split: str, limit: int | None) -> list[Example]:
    return glue(data.name or "", split, folder=data.folder, limit=limit)


def _instructions(data: DataSettings, path: Path | None, split: str, limit: int | None) -> list[Example]:
    return instructions(data.name or "", folder=data.folder, split=split, limit=limit)


def _title_abstract(data: DataSettings, path: Path | None, split: str, limit: int | None) -> list[Example]:
    if data.folder is None:
        raise InvalidRequest("titles with abstracts are read from a folder", hint="name the data folder")
    return title_abstract(data.name or "", folder=data.folder, limit=limit)


_READERS: Final[Mapping[str, Callable[[DataSettings, Path | None, str, int | None], list[Example]]]] = {
    "jsonl": _jsonl,
    "glue": _glue,
    "instructions": _instructions,
    "title_abstract": _title_abstract,
}
