"""What the run store holds: runs and their events, as tables and as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

import orjson

from agora.events import Event, event_from_dict, event_to_dict
from agora.types import Budget, RunResult, Tier, reach_of
from graphs.owners import alive

SCHEMA: Final = (
    """
    CREATE TABLE IF NOT EXISTS runs (
        id TEXT PRIMARY KEY,
        question TEXT NOT NULL,
        graph TEXT NOT NULL,
        config TEXT,
        status TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        finished_at DOUBLE PRECISION,
        result TEXT,
        error TEXT,
        owner TEXT
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS events (
        run TEXT NOT NULL,
        seq BIGINT NOT NULL,
        at DOUBLE PRECISION NOT NULL,
        type TEXT NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (run, seq)
    )
    """,
    "CREATE INDEX IF NOT EXISTS runs_by_time ON runs (created_at)",
    "CREATE INDEX IF NOT EXISTS runs_by_status ON runs (status, created_at)",
)

COLUMNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "planner": "TEXT",
        "budget": "TEXT",
        "metadata": "TEXT",
        "origin": "TEXT",
        "crashes": "INTEGER DEFAULT 0",
        "reach": "TEXT",
        "asker": "TEXT",
        "trade_off": "DOUBLE PRECISION",
    }
)
"""Columns of `runs` that stores made by the first version do not have."""


class RunStatus(StrEnum):
    """How a run stands.

    `running`: accepted, and in some living process's hands. `done`: ended with all its parts; `partial`: with parts
    missing. `failed`: ended without a result; it may be resumed. `interrupted`: stopped, or its process died; it may be
    resumed. `cancelled`: ended by whoever asked for it, and never resumed, so that nothing more is spent on it.
    """

    RUNNING = "running"
    DONE = "done"
    PARTIAL = "partial"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"


FINAL: Final = frozenset({RunStatus.DONE, RunStatus.PARTIAL, RunStatus.CANCELLED})
"""Statuses of runs that nobody can go on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as the store knows it.

    Attributes:
        id: The run's id; also its thread id in the checkpoints.
        question: What was asked.
        graph: Name of the graph it ran on.
        config: The configuration file it was started with, or None for the built-in one.
        status: How it stands.
        created_at: Wall-clock seconds since the epoch.
        finished_at: The same, once it came to an end.
        result: What it came to.
        error: Why it came to nothing.
        planner: Name of the planner it was started with; None if that is not known.
        budget: What it may spend; None if that is not known.
        metadata: What whoever asked wanted kept with it.
        origin: Who started it: `gateway`, or None for the command line.
        crashes: How often a process died while it was at it, as far as was noticed.
        reach: The highest tier whose machines may see the question, and any part of it.
        asker: Whose question it is; None if nobody is told apart.
        trade_off: Money that a right answer is worth; None if that is as the graph has it.
    """

    id: str
    question: str
    graph: str
    config: str | None
    status: RunStatus
    created_at: float
    finished_at: float | None = None
    result: RunResult | None = None
    error: str | None = None
    planner: str | None = None
    budget: Budget | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    origin: str | None = None
    crashes: int = 0
    reach: Tier = Tier.CLOUD
    asker: str | None = None
    trade_off: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """An event as the store keeps it: encoded once, and sent on as it is.

    Attributes:
        seq: Its place among the events of its run, from 1.
        type: The event's name.
        body: `event_to_dict` as JSON.
    """

    seq: int
    type: str
    body: str

    @property
    def event(self) -> Event:
        """The event itself."""
        return event_from_dict(orjson.loads(self.body))


def encoded(event: Event) -> str:
    """The event as JSON; `StoredEvent.event` reads it back.

    Raises:
        ValueError: If it holds what JSON cannot: a lone surrogate, or a number that is not one.
    """
    try:
        return orjson.dumps(event_to_dict(event)).decode()
    except orjson.JSONEncodeError as e:
        raise ValueError(f"event {type(event).__name__} cannot be written down: {e}") from e


def record_of(row: Mapping[str, Any]) -> RunRecord:
    """The run in a row of `runs`, of which `result` may be left out."""
    status = RunStatus(row["status"])
    if status is RunStatus.RUNNING and not alive(row["owner"]):
        status = RunStatus.INTERRUPTED
    result = row.get("result")
    return RunRecord(
        id=row["id"],
        question=row["question"],
        graph=row["graph"],
        config=row["config"],
        status=status,
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        result=None if result is None else RunResult.from_dict(json.loads(result)),
        error=row["error"],
        planner=row["planner"],
        budget=None if row["budget"] is None else Budget(**json.loads(row["budget"])),
        metadata=json.loads(row["metadata"]) if row["metadata"] else {},
        origin=row["origin"],
        crashes=row["crashes"] or 0,
        reach=Tier.CLOUD if row["reach"] is None else reach_of(row["reach"]),
        asker=row["asker"],
        trade_off=row["trade_off"],
    )
