"""Lays the parts of many rows out as one flat list of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from experts.engine.attention import Chunk, Run, Step, Write
from experts.engine.cache import Lane, SlotCache
from experts.engine.rows import Part, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A row in a pass: its part, and where its logits are, `first` to `last` of those kept."""

    row: Row
    part: Part
    first: int
    last: int


@dataclass(slots=True, kw_only=True)
class Layout:
    """Everything one forward pass needs; see `Runner.forward`."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    adapters: list[str | None] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)
    step: Step = field(default_factory=Step)
    seats: list[Seat] = field(default_factory=list)


def arrange(cache: SlotCache, work: Sequence[tuple[Row, Part]]) -> Layout:
    """Orders the rows so that memory and attention work on slices.

    First the rows with one new token, lane by lane and slot by slot: neighbours become one run. Then the others, each a
    chunk of its own.

    Args:
        cache: Where the rows' keys and values are.
        work: Rows and the tokens of theirs that take part, which have room in the cache.
    """
    layout = Layout()
    for group in (
        [(row, part) for row, part in work if len(part.tokens) == 1 and part.branches is None],
        [(row, part) for row, part in work if len(part.tokens) > 1 or part.branches is not None],
    ):
        by_lane: dict[Lane, list[tuple[Row, Part]]] = {}
        for row, part in sorted(group, key=lambda w: w[0].place.slot):
            by_lane.setdefault(row.place.lane, []).append((row, part))
        for lane, members in by_lane.items():
            _add(layout, lane, members, cache)
    return layout


def _add(layout: Layout, lane: Lane, members: list[tuple[Row, Part]], cache: SlotCache) -> None:
    first = len(layout.tokens)
    where: list[int] = []
    for row, part in members:
        at, place = len(layout.tokens), row.place
        end = at + len(part.tokens)
        kept = len(layout.keep)
        layout.tokens += part.tokens
        layout.positions += part.positions
        layout.adapters += [row.job.adapter] * len(part.tokens)
        layout.keep += [at + k for k in part.keep]
        layout.seats.append(Seat(row=row, part=part, first=kept, last=len(layout.keep)))
        start = place.slot * lane.capacity + place.length
        where += range(start, start + len(part.tokens))
        if len(part.tokens) > 1 or part.branches is not None:
            layout.step.chunks.append(Chunk(at, end, lane, place.slot, place.length, part.branches, part.all_positions))
            continue
        run = layout.step.runs[-1] if layout.step.runs else None
        if run is not None and run.lane is lane and run.last == at and run.slot + len(run.lengths) == place.slot:
            run.last = end
            run.lengths.append(place.length + 1)
        else:
            layout.step.runs.append(Run(at, end, lane, place.slot, [place.length + 1]))
    places = torch.tensor(where, device=cache.shape.device)
    layout.step.writes.append(Write(first, len(layout.tokens), lane, places))
