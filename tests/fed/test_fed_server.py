"""The server, step by step: each kind of federation does what its paper says."""

from __future__ import annotations

from collections import Counter

import pytest

from agora.errors import ConfigError, StoreError
from fed.pace import PRESETS, Pace, Weighting
from fed.server import begin, step
from fed.state import State
from fed.words import (
    Absorb,
    Action,
    Arrived,
    Assign,
    Cancel,
    ClientInfo,
    Event,
    Finish,
    Job,
    Joined,
    Left,
    Lost,
    Profile,
    Publish,
    Rang,
    Refuse,
    Regrouped,
    Release,
    SetTimer,
)


class Talk:
    """A server that is spoken to."""

    def __init__(self, pace: Pace, clients: int = 0, *, models: tuple[str, ...] = ("all",), seed: int = 0) -> None:
        self.now = 0.0
        self.state, self.said = begin(pace, seed=seed, models=models)
        self.jobs: dict[int, Job] = {}
        for i in range(clients):
            self.join(f"c{i}", examples=i + 1)
        for model in models:
            self.tell(Rang(at=0.0, timer=f"gather:{model}"))

    def tell(self, event: Event) -> tuple[Action, ...]:
        self.state, self.said = step(self.state, event)
        self.jobs |= {a.job.id: a.job for a in self.said if isinstance(a, Assign)}
        return self.said

    def join(self, name: str, *, examples: int = 1, speed: float = 1.0) -> tuple[Action, ...]:
        info = ClientInfo(name=name, examples=examples, profile=Profile(seconds_per_step=speed))
        return self.tell(Joined(at=self.now, client=info))

    def answer(self, job: Job, *, norm: float = 1.0, examples: int = 5) -> tuple[Action, ...]:
        arrived = Arrived(at=self.now, job=job.id, client=job.client, examples=examples, steps=1, norm=norm)
        return self.tell(arrived)

    @property
    def under_way(self) -> list[Job]:
        return [self.state.jobs[i].job for i in sorted(self.state.jobs)]


def of(kind: type, actions: tuple[Action, ...]) -> list:
    return [a for a in actions if isinstance(a, kind)]


def test_federated_averaging_waits_for_its_whole_cohort_and_then_begins_the_next_round() -> None:
    talk = Talk(Pace.synchronous(3), clients=5)
    first = talk.under_way
    assert len(first) == 3 and {j.version for j in first} == {0}
    for job in first[:2]:
        assert not of(Publish, talk.answer(job)) and not of(Assign, talk.said)
    said = talk.answer(first[2])
    assert of(Publish, said) == [Publish(model="all", version=1, jobs=tuple(j.id for j in first))]
    assert of(Release, said) == [Release(model="all", version=0)]
    assert len(of(Assign, said)) == 3 and {j.version for j in talk.under_way} == {1}


def test_over_selection_stops_the_late_and_refuses_what_they_still_send() -> None:
    talk = Talk(Pace.synchronous(2, over_select=1.5), clients=4)
    first = talk.under_way
    assert len(first) == 3
    talk.answer(first[0])
    said = talk.answer(first[1])
    assert [c.job for c in of(Cancel, said)] == [first[2].id] and of(Publish, said)
    version = talk.state.models["all"].version
    late = talk.answer(first[2])
    assert [r.job for r in of(Refuse, late)] == [first[2].id] and not of(Absorb, late)
    assert talk.state.models["all"].version == version


def test_a_round_with_a_deadline_makes_do_with_what_is_there() -> None:
    talk = Talk(Pace.synchronous(3, deadline_s=10.0, least=1), clients=3)
    first = talk.under_way
    talk.now = 4.0
    talk.answer(first[0])
    said = talk.tell(Rang(at=10.0, timer="round:all"))
    assert of(Publish, said)[0].jobs == (first[0].id,)
    assert {c.job for c in of(Cancel, said)} == {first[1].id, first[2].id}


def test_a_deadline_with_too_few_updates_waits_for_the_least() -> None:
    talk = Talk(Pace.synchronous(3, deadline_s=10.0, least=2), clients=3)
    first = talk.under_way
    talk.answer(first[0])
    assert not of(Publish, talk.tell(Rang(at=10.0, timer="round:all")))
    talk.now = 11.0
    assert of(Publish, talk.answer(first[1]))[0].jobs == (first[0].id, first[1].id)


def test_a_round_whose_other_jobs_are_lost_ends_without_them() -> None:
    talk = Talk(Pace.synchronous(3), clients=3)
    first = talk.under_way
    talk.answer(first[0])
    talk.tell(Lost(at=1.0, job=first[1].id, client=first[1].client, why="link"))
    said = talk.tell(Left(at=2.0, client=first[2].client))
    assert of(Publish, said)[0].jobs == (first[0].id,)


def test_a_round_that_got_less_than_the_least_asks_again_from_the_same_version() -> None:
    talk = Talk(Pace.synchronous(2, least=2), clients=2)
    first = talk.under_way
    talk.answer(first[0])
    said = talk.tell(Lost(at=1.0, job=first[1].id, client=first[1].client, why="link"))
    assert not of(Publish, said) and {a.job.version for a in of(Assign, said)} == {0}
    assert of(Publish, talk.answer(talk.under_way[0]))[0].jobs[0] == first[0].id


def test_buffered_makes_a_version_of_every_k_and_never_waits() -> None:
    talk = Talk(Pace.fedbuff(3, 2), clients=3)
    said = talk.answer(talk.under_way[0])
    assert len(of(Assign, said)) == 1 and not of(Publish, said)
    slow = talk.under_way[0]
    talk.answer(talk.under_way[1])
    for _ in range(4):
        talk.answer(next(j for j in talk.under_way if j.id != slow.id))
    assert talk.state.models["all"].version == 3
    absorbed = of(Absorb, talk.answer(slow))[0]
    assert absorbed.staleness == 3 and absorbed.discount == pytest.approx(0.5)
    assert absorbed.weight == pytest.approx(5 * 0.5)


def test_fully_asynchronous_makes_a_version_of_every_update() -> None:
    talk = Talk(Pace.fedasync(4, discount="constant", weighting=Weighting.EQUAL), clients=4)
    for n in range(6):
        said = talk.answer(talk.under_way[0])
        assert of(Publish, said)[0].version == n + 1
        assert of(Absorb, said)[0].weight == 1.0


def test_too_stale_an_update_is_not_waited_for() -> None:
    talk = Talk(Pace.fedasync(2, max_staleness=1), clients=2)
    slow, fast = talk.under_way
    talk.answer(fast)
    said = talk.answer(next(j for j in talk.under_way if j.id != slow.id))
    assert [c.job for c in of(Cancel, said)] == [slow.id]
    assert slow.client in {j.client for j in talk.under_way}, "it is given a fresh job"


def test_everybody_has_a_turn_before_anybody_has_two() -> None:
    talk = Talk(Pace.fedasync(3), clients=10)
    turns: Counter[str] = Counter(j.client for j in talk.under_way)
    order = []
    for _ in range(200):
        said = talk.answer(talk.under_way[0])
        chosen = of(Assign, said)[0].job.client
        turns[chosen] += 1
        order.append(chosen)
    assert max(turns.values()) - min(turns.values()) <= 1
    assert order[:10] != order[10:20], "in another order each time"


def test_another_seed_chooses_others() -> None:
    chosen = [[j.client for j in Talk(Pace.fedasync(3), clients=10, seed=s).under_way] for s in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_dead_client_costs_less_and_less() -> None:
    talk = Talk(Pace.fedasync(1, job_timeout_s=10.0, give_up=100), clients=2)
    given: Counter[str] = Counter()
    timers: dict[str, float] = {}
    for _ in range(400):
        timers |= {a.timer: a.at for a in talk.said if isinstance(a, SetTimer)}
        job = talk.under_way[0]
        given[job.client] += 1
        if job.client == "c0":
            talk.now = talk.state.jobs[job.id].due
            assert of(Cancel, talk.tell(Rang(at=talk.now, timer=f"job:{job.id}")))
        else:
            talk.now += 1.0
            talk.answer(job)
        for name, at in list(timers.items()):
            if name.startswith("rest:") and at <= talk.now:
                del timers[name]
                talk.tell(Rang(at=talk.now, timer=name))
    assert given["c1"] > 380 and 3 <= given["c0"] <= 12


def test_a_late_update_is_refused_and_yet_a_sign_of_life() -> None:
    talk = Talk(Pace.fedasync(2, job_timeout_s=10.0), clients=1)
    for _ in range(2):
        job = talk.under_way[0]
        talk.now = talk.state.jobs[job.id].due
        talk.tell(Rang(at=talk.now, timer=f"job:{job.id}"))
    assert not talk.under_way and talk.state.clients["c0"].rest_until is not None
    said = talk.answer(job)
    assert "not under way" in of(Refuse, said)[0].why
    assert len(of(Assign, said)) == 1 and talk.state.clients["c0"].losses == 0


@pytest.mark.parametrize(("norm", "examples", "why"), [(float("nan"), 5, "norm is nan"), (1.0, 0, "0 examples")])
def test_useless_updates_are_refused_and_count_as_losses(norm: float, examples: int, why: str) -> None:
    talk = Talk(Pace.fedasync(1), clients=1)
    said = talk.answer(talk.under_way[0], norm=norm, examples=examples)
    assert why in of(Refuse, said)[0].why and not of(Absorb, said)
    assert talk.state.clients["c0"].losses == 1


def test_nobody_answers_for_another() -> None:
    talk = Talk(Pace.fedasync(2), clients=2)
    job, other = talk.under_way
    arrived = Arrived(at=0.0, job=job.id, client=other.client, examples=5, steps=1, norm=1.0)
    assert of(Refuse, talk.tell(arrived)) and job.id in talk.state.jobs
    assert of(Absorb, talk.answer(job))


def test_a_client_that_joins_again_has_started_anew() -> None:
    talk = Talk(Pace.fedasync(1), clients=1)
    job = talk.under_way[0]
    said = talk.join(job.client)
    assert [c.job for c in of(Cancel, said)] == [job.id]
    assert talk.under_way[0].id != job.id


def test_balanced_jobs_take_equally_long() -> None:
    talk = Talk(Pace.fedasync(3, steps=8, balanced=True, gather_s=1.0))
    for name, speed in (("slow", 4.0), ("mean", 2.0), ("fast", 1.0)):
        talk.join(name, speed=speed)
    steps = {j.client: j.steps for j in talk.under_way}
    assert steps == {"slow": 4, "mean": 8, "fast": 16}


def test_clusters_have_versions_of_their_own_and_clients_change_between_them() -> None:
    talk = Talk(Pace.fedasync(2), models=("a", "b"))
    talk.tell(Regrouped(at=0.0, models={"x": "b"}))
    talk.join("x")
    talk.join("y")
    for model in "ab":
        talk.tell(Rang(at=0.0, timer=f"gather:{model}"))
    jobs = {j.client: j for j in talk.under_way}
    assert (jobs["x"].model, jobs["y"].model) == ("b", "a")
    talk.tell(Regrouped(at=1.0, models={"x": "new", "y": "b"}))
    said = talk.answer(jobs["x"])
    assert of(Publish, said)[0].model == "b", "what it did for the model it left still counts there"
    talk.tell(Rang(at=1.0, timer="gather:new"))
    assert {j.client: j.model for j in talk.under_way}["x"] == "new"
    assert {name: m.version for name, m in talk.state.models.items()} == {"a": 0, "b": 1, "new": 0}


def test_limits_end_the_run_and_say_so() -> None:
    talk = Talk(Pace.fedbuff(2, 2, publications=2), clients=2)
    while talk.state.finished is None:
        talk.answer(talk.under_way[0])
    assert talk.state.finished == "2 versions were made" and talk.state.published == 2
    assert of(Finish, talk.said) and of(Cancel, talk.said)

    talk = Talk(Pace.fedbuff(2, 2, jobs=5), clients=2)
    while talk.state.finished is None:
        talk.answer(talk.under_way[0])
    assert talk.state.next_job == 5 and "5 jobs" in talk.state.finished
    assert talk.state.published == 3, "the fifth update is published, too"

    talk = Talk(Pace.fedasync(2, seconds=7.0), clients=2)
    assert of(Finish, talk.tell(Rang(at=7.0, timer="limit")))[0].why == "its 7 s are over"
    assert of(Refuse, talk.tell(Arrived(at=8.0, job=0, client="c0", examples=1, steps=1, norm=1.0)))


def test_without_clients_it_waits_a_while_and_then_says_that_nobody_came() -> None:
    talk = Talk(Pace(linger_s=60.0))
    assert SetTimer(timer="alone", at=60.0) in begin(Pace(linger_s=60.0))[1]
    assert "no client joined" in of(Finish, talk.tell(Rang(at=60.0, timer="alone")))[0].why


def test_the_share_of_one_client_is_capped() -> None:
    pace = Pace.fedbuff(2, 2, share_cap=0.5, share_window=10, discount="constant", weighting=Weighting.EQUAL)
    talk = Talk(pace, clients=3)
    weights: dict[str, list[float]] = {"c0": [], "c1": [], "c2": []}
    for n in range(60):
        # c0 is three times as fast as the others.
        at = {j.client: j for j in talk.under_way}
        job = at["c0"] if "c0" in at and n % 4 else next(iter(at.values()))
        weights[job.client].append(of(Absorb, talk.answer(job))[0].weight)
    last = {name: sum(w[-len(w) // 2 :]) for name, w in weights.items()}
    assert last["c0"] / sum(last.values()) < 0.6 and all(w > 0 for ws in weights.values() for w in ws)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_paces(preset: str) -> None:
    args = (8, 2) if preset == "fedbuff" else (8,)
    pace = PRESETS[preset](*args, steps=3)
    assert pace.cohort == 8 and pace.steps == 3
    assert Pace.from_json(pace.to_json()) == pace


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cohort": 0}, "cohort is 0; it must be a whole number from 1"),
        ({"cohort": None}, "cohort is None"),
        ({"buffer": 2.5}, "buffer is 2.5"),
        ({"deadline_s": -1.0}, "deadline_s is -1.0; it must be a number above 0"),
        ({"job_timeout_s": float("inf")}, "job_timeout_s is inf"),
        ({"share_cap": 0}, "above 0 and at most 1"),
        ({"share_cap": 0.5, "buffer": 1}, "all the weight of its version"),
        ({"discount": "none"}, "allowed: constant, hinge, polynomial"),
        ({"discount": "constant", "discount_a": 1.0}, "no parameter 'a'"),
        ({"weighting": "loud"}, "allowed: examples, equal"),
        ({"over_select": 1.2}, "without lockstep"),
        ({"lockstep": True, "cohort": 2, "buffer": 3}, "at most 2 updates can come"),
        ({"least": 9}, "more than the buffer"),
        ({"balanced": True}, "balanced needs steps"),
        ({"speed": 1}, "'speed' is no setting of the pace"),
    ],
)
def test_a_wrong_pace_says_what_is_allowed(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as e:
        Pace.from_json(settings)
    assert told in str(e.value)


def test_models_have_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="none twice"):
        begin(Pace(), models=("a", "a"))


def test_a_state_of_another_format_is_not_read() -> None:
    body = Talk(Pace(), clients=2).state.to_json()
    with pytest.raises(StoreError, match="format 99"):
        State.from_json(body | {"format": 99})
    with pytest.raises(StoreError, match="cannot be read"):
        State.from_json({k: v for k, v in body.items() if k != "jobs"})
