"""Whether clients' data can be learned from, before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agora.errors import InvalidRequest
from fed.data.example import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedClients:
    """What is left of the clients' data, and what was found. Counts and names only, no data.

    Attributes:
        clients: Examples of the clients that take part.
        left_out: Clients that do not, with the reason.
        notes: Clients that take part although something is odd, with what it is.
    """

    clients: Mapping[str, Sequence[Example]]
    left_out: Mapping[str, str]
    notes: Mapping[str, str]


def check_clients(clients: Mapping[str, Sequence[Example]]) -> CheckedClients:
    """Leaves out clients without rows, and notes those that hold one class only.

    One class at one client is what strong label skew looks like, and the others' updates make up for it. One class at
    all of them teaches an adapter to say that word.

    Args:
        clients: Examples by client.

    Raises:
        InvalidRequest: If no client has rows, or all rows of a classification task have the same label.
    """
    left_out = {name: "it has no rows" for name, rows in clients.items() if not len(rows)}
    kept = {name: rows for name, rows in clients.items() if name not in left_out}
    if not kept:
        raise InvalidRequest(
            f"none of {len(clients)} clients has rows" if clients else "there are no clients",
            hint="check the data and how it is divided",
        )
    seen: dict[tuple[str, ...], set[str]] = {}
    notes = {}
    for name, rows in kept.items():
        own: dict[tuple[str, ...], set[str]] = {}
        for row in rows:
            if row.choices:
                own.setdefault(row.choices, set()).add(row.response)
        if alone := [words for words, said in own.items() if len(said) == 1]:
            notes[name] = f"all its rows of the task {_told(alone[0])} have one label"
        for words, said in own.items():
            seen.setdefault(words, set()).update(said)
    for words, said in seen.items():
        if len(said) == 1:
            raise InvalidRequest(
                f"all rows of the task with the label words {_told(words)} have the same label",
                hint="an adapter would learn to say that word; use data with at least two classes",
            )
    return CheckedClients(clients=kept, left_out=left_out, notes=notes)


def _told(words: Sequence[str]) -> str:
    return "/".join(w.strip() for w in words)
