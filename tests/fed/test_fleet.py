"""Modelled clients: distributions, drop-out and transfers."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from agora.errors import ConfigError
from fed.fleet import SPEEDS, Change, Fleet, Move, fleet
from fed.words import ClientInfo, Job, Profile


def job(number: int, client: str = "client-0") -> Job:
    return Job(id=number, client=client, model="all", version=0, seed=1)


def test_speeds_are_of_their_distribution() -> None:
    assert set(SPEEDS["constant"](5, 0)) == {1.0}
    drawn = [math.log(f) for f in SPEEDS["lognormal"](4000, 3, sigma=0.7)]
    assert statistics.mean(drawn) == pytest.approx(0.0, abs=0.04)
    assert statistics.pstdev(drawn) == pytest.approx(0.7, rel=0.05)
    found = SPEEDS["tiers"](16, 1)
    assert sorted(found) == [1.0] * 6 + [2.0] * 5 + [4.0] * 5
    assert found != SPEEDS["tiers"](16, 2) and found == SPEEDS["tiers"](16, 1)


def test_a_job_takes_its_transfers_and_its_steps() -> None:
    profile = Profile(seconds_per_step=0.5, up_bytes_per_s=100.0, down_bytes_per_s=1000.0, round_trip_s=0.2)
    info = ClientInfo(name="a", profile=profile)
    world = Fleet(clients=(info,))
    journey = world.journey(info, job(0, "a"), steps=4, down_bytes=500)
    assert journey.computed_s == pytest.approx(0.1 + 0.5 + 2.0) and journey.lost_s is None
    assert world.way_back(info, 50) == pytest.approx(0.1 + 0.5)


def test_jobs_are_lost_as_often_as_said_and_before_they_are_done() -> None:
    world = fleet(2, loss=0.1, silent=0.25, loss_of={"client-1": 1.0}, seed=4)
    one, other = world.clients
    journeys = [world.journey(one, job(i), steps=10, down_bytes=0) for i in range(4000)]
    lost = [j for j in journeys if j.lost_s is not None]
    assert len(lost) / 4000 == pytest.approx(0.1, abs=0.02)
    assert sum(j.silent for j in lost) / len(lost) == pytest.approx(0.25, abs=0.06)
    assert all(0 <= (j.lost_s or 0.0) < 10 for j in lost)
    assert all(world.journey(other, job(i), steps=1, down_bytes=0).lost_s is not None for i in range(50))


def test_jitter_is_drawn_for_each_job_and_is_the_same_again() -> None:
    world = fleet(1, jitter=0.5)
    info = world.clients[0]
    took = [world.journey(info, job(i), steps=1, down_bytes=0).computed_s for i in range(2000)]
    assert took == [world.journey(info, job(i), steps=1, down_bytes=0).computed_s for i in range(2000)]
    assert statistics.pstdev(math.log(t) for t in took) == pytest.approx(0.5, rel=0.06)


def test_who_joins_first_is_absent_at_the_beginning() -> None:
    changes = (
        Change(5.0, "client-0", Move.JOINS),
        Change(1.0, "client-1", Move.DIES),
        Change(2.0, "client-1", Move.JOINS),
    )
    assert fleet(3, changes=changes).late() == {"client-0"}


def test_a_fleet_is_the_same_after_json() -> None:
    changes = (Change(5.0, "client-0", Move.LEAVES),)
    world = fleet(4, speeds="lognormal", parameters={"sigma": 2.0}, changes=changes, loss_of={"client-2": 0.5}, seed=9)
    assert Fleet.from_json(json.loads(json.dumps(world.to_json(), allow_nan=False))) == world


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"speeds": "fast"}, "allowed: constant, lognormal, tiers"),
        ({"speeds": "tiers", "parameters": {"sigma": 1}}, "has no parameter 'sigma'; it has factors"),
        ({"speeds": "tiers", "parameters": {"factors": [1.0, 0.0]}}, "all above 0"),
        ({"speeds": "lognormal", "parameters": {"sigma": -1.0}}, "sigma is -1.0"),
        ({"loss": 1.5}, "a probability is from 0 to 1"),
        ({"loss_of": {"nobody": 0.5}}, "'nobody' is not in the fleet"),
        ({"up_bytes_per_s": 0.0}, "must be above 0"),
        ({"seconds_per_step": math.nan}, "seconds_per_step of 'client-0' is nan"),
        ({"changes": (Change(-1.0, "client-0", Move.DIES),)}, "'client-0' dies is -1.0"),
    ],
)
def test_a_wrong_fleet_says_what_is_allowed(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as e:
        fleet(2, **settings)  # type: ignore[arg-type]
    assert told in str(e.value)


def test_names_are_unique() -> None:
    with pytest.raises(ConfigError, match="'a' is there twice"):
        Fleet(clients=(ClientInfo(name="a"), ClientInfo(name="a")))
