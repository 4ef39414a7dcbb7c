"""What each client had to do with a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fed.words import WHOLE, ClientInfo

TOTALS: Final = ("assigned", "absorbed", "refused", "lost", "cancelled", "bytes_down", "bytes_up")
"""Counts since the beginning, in every row of a record."""

Row = Mapping[str, Any]


def totals_of(rows: Sequence[Row]) -> dict[str, int]:
    """The counts of the last row; zeros where there is none."""
    return {name: rows[-1][name] if rows else 0 for name in TOTALS}


def shares_of(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """Updates and share of all weight by client, as the record tells it."""
    count: dict[str, int] = {}
    weight: dict[str, float] = {}
    for row in rows:
        for client, _, w in row.get("of", ()):
            count[client] = count.get(client, 0) + 1
            weight[client] = weight.get(client, 0.0) + w
    total = sum(weight.values())
    return {client: (n, weight[client] / total if total else 0.0) for client, n in count.items()}


def clients_of(
    clients: Sequence[ClientInfo],
    rows: Sequence[Row],
    members: Mapping[str, str] | None,
    *,
    left_out: Mapping[str, str],
    notes: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The rows of `clients.json`: those that take part, then those that were left out.

    Args:
        clients: Those that take part.
        rows: The record.
        members: Model by client; None where there is one.
        left_out: The others, with the reason.
        notes: What is odd about clients that take part.
    """
    shares = shares_of(rows)
    told: list[dict[str, Any]] = []
    for client in clients:
        updates, share = shares.get(client.name, (0, 0.0))
        told.append(
            {
                "name": client.name,
                "rows": client.examples,
                "rank": client.rank,
                "seconds_per_step": client.profile.seconds_per_step,
                "model": WHOLE if members is None else members.get(client.name),
                "updates": updates,
                "share": share,
                "note": notes.get(client.name),
                "left_out": None,
            }
        )
    return told + [{"name": name, "left_out": why} for name, why in sorted(left_out.items())]
