"""Everything that a run needs, made and checked before training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agora.errors import AgoraError, ConfigError, InvalidRequest
from fed.adapter import Adapter
from fed.aggregate import rules
from fed.aggregate.rule import Contribution, Rule
from fed.client import PeftTrainer, StepTold
from fed.clusters.base import Base
from fed.clusters.ways import make
from fed.config import FedConfig
from fed.fleet import Change, Fleet, fleet
from fed.pace import Pace
from fed.runs.judge import Assessor, Judge
from fed.runs.rows import Rows, rows_of
from fed.runs.told import Doing, Noted, Progress
from fed.trainer.base import BaseModel
from fed.trainer.batches import steps_of
from fed.words import ClientInfo


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What a run is made of.

    Attributes:
        pace: How the server goes about it.
        fleet: Clients and links.
        trainer: Trains for all clients.
        rule: Makes the rule of a model.
        initial: The first version.
        own_steps: Steps of a job by client, where the server leaves them to it.
        grouping: Moves clients between models; None for one model.
        judge: Judges versions.
        left_out: Clients that do not take part, with the reason.
        notes: What is odd about clients that do.
        about: What else determines the result.
    """

    pace: Pace
    fleet: Fleet
    trainer: PeftTrainer
    rule: Callable[[Adapter], Rule]
    initial: Adapter
    own_steps: Mapping[str, int]
    grouping: Base | None
    judge: Judge
    left_out: Mapping[str, str]
    notes: Mapping[str, str]
    about: Mapping[str, Any]


def prepare(config: FedConfig, folder: Path, *, tell: Progress, on_step: Callable[[StepTold], None]) -> Prepared:
    """Makes everything and checks it. What can go on without a faulty client does, and says so.

    Args:
        config: The run.
        folder: Of the base model.
        tell: Told what is being done, and what was left out.
        on_step: Told of each training step.

    Raises:
        AgoraError: If something does not fit: an impossible rank, layers the model does not have, data that cannot be
            learned from, more clusters than clients.
    """
    tell(Doing(what="reading the data"))
    rows = rows_of(config.data, config.run.seed)
    for text in rows.told:
        tell(Noted(text=text))
    tell(Doing(what="loading the model"))
    model = config.model
    base = BaseModel.load(folder, dtype=model.dtype, device=model.device)
    trainer = PeftTrainer(
        base,
        adapter=config.adapter,
        training=config.training,
        clients=rows.clients,
        on_step=on_step,
        threads=model.threads,
    )
    tell(Doing(what="checking the clients"))
    counts, left_out, longer = _checked(trainer, rows)
    if longer:
        total = longer + sum(counts.values())
        most = config.training.max_tokens
        tell(Noted(text=f"{longer:,} of {total:,} rows are left out: their prompts have {most} tokens or more"))
    for name, why in left_out.items():
        tell(Noted(text=f"client {name!r} is left out: {why}"))
    for name, what in rows.notes.items():
        if name in counts:
            tell(Noted(text=f"client {name!r}: {what}"))
    infos = _infos(config, list(rows.clients) + list(rows.left_out), counts)
    pace = _pace(config.server.pace, len(infos), tell)

    def rule(first: Adapter) -> Rule:
        return rules.make(config.aggregate.rule, first, **config.aggregate.settings)

    initial = trainer.initial_adapter(config.run.seed)
    _check_ranks(trainer, rule(initial), initial, infos)
    fleeted = _fleet(config, infos, {*rows.clients, *rows.left_out})
    grouping = None
    if config.clusters is not None:
        clusters = config.clusters
        assessor = Assessor(trainer, rows.clients)
        grouping = make(clusters.kind, initial, clients=len(infos), assessor=assessor, **clusters.settings)
    judge = Judge(trainer, rows.judged, {name: own for name, own in rows.own.items() if name in counts})
    return Prepared(
        pace=pace,
        fleet=fleeted,
        trainer=trainer,
        rule=rule,
        initial=initial,
        own_steps=_steps(config, counts),
        grouping=grouping,
        judge=judge,
        left_out=left_out,
        notes={name: what for name, what in rows.notes.items() if name in counts},
        about={"data": rows.digest, "base": base.fingerprint},
    )


def _checked(trainer: PeftTrainer, rows: Rows) -> tuple[dict[str, int], dict[str, str], int]:
    """Rows that count by client, who is left out, and how many rows of the others are too long."""
    counts: dict[str, int] = {}
    longer = 0
    left_out = dict(rows.left_out)
    for name in rows.clients:
        try:
            encoded = trainer.check(name)
            counts[name] = len(encoded.rows)
            longer += encoded.left_out
        except InvalidRequest as e:
            left_out[name] = e.message
    if not counts:
        first = next(iter(left_out.values()))
        raise InvalidRequest(f"none of {len(left_out)} clients can train; the first: {first}")
    return counts, left_out, longer


def _infos(config: FedConfig, names: Sequence[str], counts: Mapping[str, int]) -> list[ClientInfo]:
    """Ranks are dealt out to all clients there are, so that one that is left out changes nobody else's."""
    ranks: Sequence[int | None] = config.fleet.ranks or (None,)
    rank_of = {name: ranks[i % len(ranks)] for i, name in enumerate(sorted(names))}
    return [ClientInfo(name=name, examples=count, rank=rank_of[name]) for name, count in counts.items()]


def _pace(pace: Pace, clients: int, tell: Progress) -> Pace:
    if pace.wanted <= clients or pace.cohort <= clients:
        return pace
    buffer = min(pace.buffer, clients) if pace.lockstep else pace.buffer
    tell(Noted(text=f"{clients} jobs at once, not {pace.cohort}: there are as many clients"))
    return pace.but(cohort=clients, buffer=buffer, least=min(pace.least, buffer))


def _check_ranks(trainer: PeftTrainer, rule: Rule, initial: Adapter, infos: Sequence[ClientInfo]) -> None:
    for rank in sorted({info.rank for info in infos if info.rank is not None}):
        trainer.spec(rank)
        try:
            # Some rules hand out starts of any rank, and refuse what comes back.
            start = rule.start_for(initial, rank)
            rule.absorb(Contribution(client="", start=start, delta=np.zeros(start.spec.size, np.float32)))
        except AgoraError as e:
            raise ConfigError(f"clients of rank {rank}: {e.message}", hint=e.hint) from None


def _fleet(config: FedConfig, infos: Sequence[ClientInfo], known: set[str]) -> Fleet:
    f, names = config.fleet, {info.name for info in infos}
    told = [*f.loss_of, *(change.client for change in f.changes)]
    if unknown := sorted(set(told) - known):
        some = ", ".join(sorted(known)[:5]) + (", …" if len(known) > 5 else "")
        raise ConfigError(f"[fleet] names client {unknown[0]!r}, who is not there; there are {some}")
    links = {"up_bytes_per_s": f.up_bytes_per_s, "down_bytes_per_s": f.down_bytes_per_s}
    return fleet(
        infos,
        speeds=f.speeds,
        parameters=f.parameters,
        seconds_per_step=f.seconds_per_step,
        round_trip_s=f.round_trip_s,
        seed=config.run.seed if f.seed is None else f.seed,
        jitter=f.jitter,
        loss=f.loss,
        loss_of={name: value for name, value in f.loss_of.items() if name in names},
        silent=f.silent,
        changes=tuple(Change(c.at, c.client, c.what) for c in f.changes if c.client in names),
        **{name: value for name, value in links.items() if value is not None},
    )


def _steps(config: FedConfig, counts: Mapping[str, int]) -> dict[str, int]:
    t = config.training
    return {name: steps_of(count, batch=t.batch, steps=t.steps, epochs=t.epochs) for name, count in counts.items()}
