"""What follows from where things stand: versions that are due, jobs to be given out, and the end of a run."""

from __future__ import annotations

from fed.state import ALONE, GATHER, ROUND, Model, pending
from fed.turn import Turn
from fed.words import Cancel, DropTimer, Finish, Publish, Release, SetTimer


def look_after(turn: Turn) -> None:
    """Makes versions that are due, gives out jobs, and ends the run where it cannot or must not go on."""
    while turn.touched and turn.get("finished") is None:
        # Sorted: a set's order would differ from process to process.
        names = sorted(turn.touched)
        turn.touched = {}
        for name in names:
            if turn.get("finished") is None:
                if _ready(turn, turn.models[name]):
                    _publish(turn, name)
                if turn.get("finished") is None:
                    _fill(turn, name)
    if turn.get("finished") is None:
        _end_if_over(turn)


def _ready(turn: Turn, model: Model) -> bool:
    pace, there = turn.pace, len(model.buffer)
    if there >= pace.buffer:
        return True
    if there < pace.least:
        return False
    return model.due or (pace.lockstep and not model.running)


def _publish(turn: Turn, name: str) -> None:
    model, pace = turn.models[name], turn.pace
    version = model.version + 1
    turn.do(Publish(model=name, version=version, jobs=model.buffer))
    if model.version not in model.held:
        turn.do(Release(model=name, version=model.version))
    if model.round_at is not None:
        turn.do(DropTimer(timer=ROUND + name))
    turn.model(name, version=version, buffer=(), due=False, round_at=None)
    turn.add("published", 1)
    if pace.lockstep:
        _cancel_older(turn, name, version, "the round is over")
    elif pace.max_staleness is not None:
        why = f"more than {pace.max_staleness} versions were made since it started"
        _cancel_older(turn, name, version - pace.max_staleness, why)
    if turn.get("finished") is not None:
        return
    if not pace.lockstep:
        _set_deadline(turn, name)
    if pace.publications is not None and turn.get("published") >= pace.publications:
        finish(turn, f"{turn.get('published')} versions were made")


def _cancel_older(turn: Turn, name: str, version: int, why: str) -> None:
    if not any(v < version for v in turn.models[name].held):
        return
    for number in sorted(turn.jobs):
        running = turn.jobs[number]
        if running.job.model == name and running.job.version < version:
            turn.cancels(running, why)


def _set_deadline(turn: Turn, name: str) -> None:
    if turn.pace.deadline_s is not None:
        at = turn.now + turn.pace.deadline_s
        turn.model(name, round_at=at, due=False)
        turn.do(SetTimer(timer=ROUND + name, at=at))


def _fill(turn: Turn, name: str) -> None:
    """Gives out as many jobs as may run."""
    pace, model = turn.pace, turn.models[name]
    room = pace.wanted - model.running
    if room <= 0 or (pace.lockstep and model.running):
        return
    if pace.jobs is not None:
        room = min(room, pace.jobs - turn.get("next_job"))
    idle = model.idle
    if not idle:
        if pace.lockstep and not model.running:
            # The next round does not begin with whoever comes first.
            if model.opened:
                turn.model(name, opened=False)
            turn.drop_gathering(name)
        return
    if not model.opened:
        if idle < pace.wanted:
            if model.gather_at is None:
                at = turn.now + pace.gather_s
                turn.model(name, gather_at=at)
                turn.do(SetTimer(timer=GATHER + name, at=at))
            return
        turn.drop_gathering(name)
        turn.model(name, opened=True)
        if not pace.lockstep:
            _set_deadline(turn, name)
    if room <= 0:
        return
    if pace.lockstep and model.round_at is None and not model.due:
        _set_deadline(turn, name)
    for _ in range(min(room, idle)):
        turn.assign(name)


def _end_if_over(turn: Turn) -> None:
    pace = turn.pace
    present: int = turn.get("present")
    alone: float | None = turn.get("alone_at")
    if not present and alone is None:
        turn.changed["alone_at"] = turn.now + pace.linger_s
        turn.do(SetTimer(timer=ALONE, at=turn.now + pace.linger_s))
    elif present and alone is not None:
        turn.changed["alone_at"] = None
        turn.do(DropTimer(timer=ALONE))
    if pace.jobs is not None and turn.get("next_job") >= pace.jobs and not turn.jobs:
        finish(turn, f"{pace.jobs} jobs were given out, and have ended")
    elif present and turn.get("failing") >= present:
        finish(turn, f"no client works: each of {present} lost its last {pace.give_up} jobs or more")


def finish(turn: Turn, why: str) -> None:
    """Ends the run: what was absorbed is published, what is under way is stopped."""
    turn.changed["finished"] = why
    for name in sorted(turn.models):
        if len(turn.models[name].buffer) >= turn.pace.least:
            _publish(turn, name)
    for number in sorted(turn.jobs):
        running = turn.jobs[number]
        turn.do(Cancel(job=number, client=running.job.client, why="the run is over"))
        turn.ends(running.job)
    state, _ = turn.done()
    for timer in pending(state):
        turn.do(DropTimer(timer=timer.timer))
    turn.do(Finish(why=why))
