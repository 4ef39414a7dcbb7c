"""The server: a pure state machine. Events go in, a new state and what is to be done come out.

It knows no tensor, no clock and no network: updates are numbers of jobs, and time is what events tell. So the same
server runs in a simulation, over HTTP or over Flower, and what it does can be replayed.

    state, actions = begin(Pace.fedbuff(16, 4), seed=1)
    state, actions = step(state, Joined(at=0.0, client=ClientInfo(name="a")))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from agora.errors import ConfigError
from fed.pace import Pace, Weighting
from fed.rounds import finish, look_after
from fed.share import capped
from fed.state import ALONE, GATHER, JOB, LIMIT, REST, ROUND, Client, Model, Running, State
from fed.turn import Turn
from fed.words import (
    WHOLE,
    Absorb,
    Action,
    Arrived,
    Cancel,
    DropTimer,
    Event,
    Joined,
    Left,
    Lost,
    Rang,
    Refuse,
    Regrouped,
    SetTimer,
)

Step = tuple[State, tuple[Action, ...]]


def begin(pace: Pace, *, seed: int = 0, at: float = 0.0, models: Sequence[str] = (WHOLE,)) -> Step:
    """A server with no clients yet.

    Args:
        pace: How it goes about it.
        seed: Of its choices and its jobs.
        at: The driver's clock now, in seconds.
        models: Names of the models, each at version 0; clients that are given no other belong to the first.

    Raises:
        ConfigError: If there is no model, or a name twice.
    """
    if not models or len(set(models)) != len(models):
        raise ConfigError(f"models are {list(models)!r}; there must be one at least, and none twice")
    state = State(pace=pace, seed=seed, home=models[0], now=at)
    turn = Turn(state, at)
    for name in models:
        turn.models = turn.models.set(name, Model())
    if pace.seconds is not None:
        turn.changed["limit_at"] = at + pace.seconds
        turn.do(SetTimer(timer=LIMIT, at=at + pace.seconds))
    look_after(turn)
    return turn.done()


def step(state: State, event: Event) -> Step:
    """What an event changes, and what is to be done about it, in that order.

    It never raises on a well-formed event: those about jobs, clients or timers that are not, or no longer, known change
    nothing, and updates among them are refused.
    """
    turn = Turn(state, event.at)
    if state.finished is not None:
        if isinstance(event, Arrived):
            turn.do(Refuse(job=event.job, client=event.client, why="the run is over"))
        return turn.done()
    _HANDLERS[type(event)](turn, event)
    look_after(turn)
    return turn.done()


# Events.


def _joined(turn: Turn, event: Joined) -> None:
    name = event.client.name
    known = turn.clients.get(name)
    if known is not None and known.present:
        # It started anew: what it was doing is lost.
        _goes(turn, name, "it joined again")
    turn.arrives(event.client)
    turn.idles(name)


def _left(turn: Turn, event: Left) -> None:
    known = turn.clients.get(event.client)
    if known is not None and known.present:
        _goes(turn, event.client, event.why or "it left")


def _goes(turn: Turn, name: str, why: str) -> None:
    number = turn.clients[name].job
    if number is not None:
        turn.do(Cancel(job=number, client=name, why=why))
        turn.loses(turn.jobs[number])
    turn.unidles(name)
    turn.departs(name)


def _arrived(turn: Turn, event: Arrived) -> None:
    running = turn.jobs.get(event.job)
    if running is None or running.job.client != event.client:
        why = f"job {event.job} is not under way at {event.client}"
        turn.do(Refuse(job=event.job, client=event.client, why=why))
        known = turn.clients.get(event.client)
        if running is None and known is not None and known.present and 0 <= event.job < turn.state.next_job:
            _late(turn, event.client, known)
        return
    job = running.job
    staleness = turn.models[job.model].version - job.version
    if wrong := _wrong(event):
        turn.do(Refuse(job=job.id, client=job.client, why=wrong))
        turn.loses(running)
    elif turn.pace.max_staleness is not None and staleness > turn.pace.max_staleness:
        why = f"{staleness} versions were made since it started; at most {turn.pace.max_staleness} are allowed"
        turn.do(Refuse(job=job.id, client=job.client, why=why))
        turn.ends(job)
    else:
        _absorb(turn, event, running, staleness)
        turn.ends(job)
        turn.heard(job.client)
    turn.idles(job.client)


def _late(turn: Turn, name: str, client: Client) -> None:
    """Too late, and yet a sign of life: it need not rest."""
    turn.heard(name)
    if client.rest_until is not None:
        turn.do(DropTimer(timer=REST + name))
        turn.wakes(name)


def _wrong(event: Arrived) -> str | None:
    if not math.isfinite(event.norm):
        return f"its norm is {event.norm}"
    if event.examples < 1:
        return f"it tells of {event.examples} examples"
    return None


def _absorb(turn: Turn, event: Arrived, running: Running, staleness: int) -> None:
    job, pace = running.job, turn.pace
    model = turn.models[job.model]
    discount = pace.discounts(staleness)
    weight = _WEIGHTS[pace.weighting](event) * discount
    window = model.window
    if pace.share_cap < 1.0:
        window = (*window, (job.client, weight))[-pace.share_window :]
        weight *= capped(window, job.client, pace.share_cap)
    turn.do(
        Absorb(job=job.id, client=job.client, model=job.model, weight=weight, staleness=staleness, discount=discount)
    )
    turn.model(job.model, buffer=(*model.buffer, job.id), window=window)


def _lost(turn: Turn, event: Lost) -> None:
    running = turn.jobs.get(event.job)
    if running is not None and running.job.client == event.client:
        turn.loses(running)
        turn.idles(event.client)


def _regrouped(turn: Turn, event: Regrouped) -> None:
    for name, model in sorted(event.models.items()):
        if model not in turn.models:
            turn.models = turn.models.set(model, Model())
        known = turn.clients.get(name)
        if known is None:
            turn.clients = turn.clients.set(name, Client(None, model))
        elif known.model != model:
            idle = known.place >= 0
            turn.unidles(name)
            turn.client(name, model=model, turn=-1)
            if idle:
                turn.idles(name)


# Timers.


def _rang(turn: Turn, event: Rang) -> None:
    kind, colon, of = event.timer.partition(":")
    handler = _TIMERS.get(kind + colon)
    if handler is not None:
        handler(turn, of)


def _early(turn: Turn, timer: str, at: float) -> bool:
    """Whether a timer rang before its time, as one that was replaced may: then it is set again."""
    if turn.now >= at:
        return False
    turn.do(SetTimer(timer=timer, at=at))
    return True


def _job_rang(turn: Turn, of: str) -> None:
    # `isdecimal` is true of digits that are not ASCII, too; those are no job's name.
    running = turn.jobs.get(int(of)) if of.isdecimal() and of.isascii() else None
    if running is None or _early(turn, JOB + of, running.due):
        return
    client = running.job.client
    turn.do(Cancel(job=running.job.id, client=client, why=f"no update after {turn.pace.job_timeout_s:g} s"))
    turn.loses(running)
    turn.idles(client)


def _rest_rang(turn: Turn, of: str) -> None:
    client = turn.clients.get(of)
    if client is None or not client.present or client.rest_until is None:
        return
    if not _early(turn, REST + of, client.rest_until):
        turn.wakes(of)


def _round_rang(turn: Turn, of: str) -> None:
    model = turn.models.get(of)
    if model is not None and model.round_at is not None and not _early(turn, ROUND + of, model.round_at):
        turn.model(of, round_at=None, due=True)


def _gather_rang(turn: Turn, of: str) -> None:
    model = turn.models.get(of)
    if model is not None and model.gather_at is not None and not _early(turn, GATHER + of, model.gather_at):
        turn.model(of, gather_at=None, opened=True)


def _alone_rang(turn: Turn, of: str) -> None:
    at: float | None = turn.get("alone_at")
    if at is not None and not _early(turn, ALONE, at):
        turn.changed["alone_at"] = None
        gone = sum(1 for c in turn.clients.values() if c.info is not None)
        who = f"all {gone} clients have left" if gone else "no client joined"
        finish(turn, f"{who}, and none came within {turn.pace.linger_s:g} s")


def _limit_rang(turn: Turn, of: str) -> None:
    at: float | None = turn.get("limit_at")
    if at is not None and not _early(turn, LIMIT, at):
        turn.changed["limit_at"] = None
        finish(turn, f"its {turn.pace.seconds:g} s are over")


_HANDLERS: Final[Mapping[type, Callable[[Turn, Any], None]]] = MappingProxyType(
    {
        Joined: _joined,
        Left: _left,
        Arrived: _arrived,
        Lost: _lost,
        Rang: _rang,
        Regrouped: _regrouped,
    }
)

_TIMERS: Final[Mapping[str, Callable[[Turn, str], None]]] = MappingProxyType(
    {
        JOB: _job_rang,
        REST: _rest_rang,
        ROUND: _round_rang,
        GATHER: _gather_rang,
        ALONE: _alone_rang,
        LIMIT: _limit_rang,
    }
)

_WEIGHTS: Final[Mapping[Weighting, Callable[[Arrived], float]]] = MappingProxyType(
    {Weighting.EXAMPLES: lambda event: float(event.examples), Weighting.EQUAL: lambda event: 1.0}
)
