"""The figures of a run: what its tables, plots and page all tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fed.report.read import Report, Standing
from fed.runs.clients import shares_of, totals_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLine:
    """A model, as it stands.

    Attributes:
        name: Its name.
        version: Its newest version.
        clients: Whose model it is; None where all have one.
        updates: In all of its versions.
        staleness: Mean of their staleness.
        first: What its first judgement told; empty if it was not judged.
        last: The last one.
        train_loss: Clients' training loss at the newest version that tells one.
    """

    name: str
    version: int
    clients: int | None
    updates: int
    staleness: float
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    train_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLine:
    """A client.

    Attributes:
        name: Its name.
        rows: It trains on; None for one that was left out.
        model: Whose adapter it trains.
        updates: That were used.
        share: Of all weight.
        rows_share: Its share of all rows.
        note: What is odd about it, or why it was left out.
        left_out: Whether it was.
    """

    name: str
    rows: int | None
    model: str | None
    updates: int
    share: float
    rows_share: float
    note: str | None
    left_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in figures.

    Attributes:
        name: What the run is called.
        standing: How it stands.
        why: Why it ended; empty before.
        seconds: Virtual seconds until the newest version, or the end.
        versions: Of all models.
        totals: Counts since the beginning (`fed.runs.clients.TOTALS`).
        models: Those that have versions or were judged.
        clients: All, those that were left out last.
        staleness: Updates by staleness.
        problems: What went wrong, each with the version after which it did.
    """

    name: str
    standing: Standing
    why: str
    seconds: float
    versions: int
    totals: Mapping[str, int]
    models: tuple[ModelLine, ...]
    clients: tuple[ClientLine, ...]
    staleness: Mapping[int, int]
    problems: tuple[tuple[float, str], ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "standing": str(self.standing),
            "why": self.why,
            "seconds": self.seconds,
            "versions": self.versions,
            **self.totals,
            "models": [{n: _plain(getattr(m, n)) for n in ModelLine.__slots__} for m in self.models],
            "clients": [{n: getattr(c, n) for n in ClientLine.__slots__} for c in self.clients],
            "staleness": {str(k): v for k, v in self.staleness.items()},
            "problems": [{"at": at, "text": text} for at, text in self.problems],
        }


def summarise(report: Report) -> Summary:
    """The figures of a run."""
    result = report.result or {}
    problems = [(row["at"], text) for row in report.rows for text in row.get("problems", ())]
    end = result.get("at", report.rows[-1]["at"] if report.rows else 0.0)
    return Summary(
        name=report.name,
        standing=report.standing,
        why=result.get("why", ""),
        seconds=end,
        versions=len(report.rows),
        totals=totals_of(report.rows),
        models=_models(report),
        clients=_clients(report),
        staleness=dict(sorted(Counter(s for row in report.rows for _, s, _ in row.get("of", ())).items())),
        problems=tuple(problems + [(end, text) for text in result.get("problems", ())]),
    )


def _models(report: Report) -> tuple[ModelLine, ...]:
    groups = report.groups[-1]["groups"] if report.groups else None
    names = dict.fromkeys([*(e["model"] for e in report.evaluations), *(r["model"] for r in report.rows)])
    found = []
    for name in names:
        rows = [row for row in report.rows if row["model"] == name]
        judged = sorted((e for e in report.evaluations if e["model"] == name), key=lambda e: int(e["version"]))
        updates = [staleness for row in rows for _, staleness, _ in row.get("of", ())]
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        found.append(
            ModelLine(
                name=name,
                version=rows[-1]["version"] if rows else 0,
                clients=None if groups is None else len(groups.get(name, ())),
                updates=len(updates),
                staleness=sum(updates) / len(updates) if updates else 0.0,
                first=judged[0] if judged else {},
                last=judged[-1] if judged else {},
                train_loss=losses[-1] if losses else None,
            )
        )
    return tuple(sorted(found, key=lambda m: m.name))


def _clients(report: Report) -> tuple[ClientLine, ...]:
    shares = shares_of(report.rows)
    member = (
        {c: name for name, members in report.groups[-1]["groups"].items() for c in members} if report.groups else {}
    )
    total = sum(c.get("rows", 0) for c in report.clients) or 1
    found = []
    for client in report.clients:
        name, out = client["name"], client.get("left_out")
        updates, share = shares.get(name, (0, 0.0))
        found.append(
            ClientLine(
                name=name,
                rows=client.get("rows"),
                model=None if out else member.get(name, client.get("model")),
                updates=updates,
                share=share,
                rows_share=client.get("rows", 0) / total,
                note=out or client.get("note"),
                left_out=bool(out),
            )
        )
    return tuple(found)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
