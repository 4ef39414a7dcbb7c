"""Policies decide step by step as they do over a table, look at nothing they should not, and save money."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agora.errors import InvalidRequest, NoExpert
from agora.routing.cascade.fit import Kinds, fit
from agora.routing.cascade.fitted import LearnedPolicy, MixedPolicy, drawn
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.picking import pick
from agora.routing.cascade.policy import Ask, Policy, Query, Seen, Take
from agora.routing.cascade.replay import play
from agora.routing.cascade.rules import RULES


def asked(outcomes: Outcomes, row: int, model: int) -> Seen:
    assert outcomes.answers is not None and outcomes.seconds is not None
    told = {name: float(t[row, model]) for name, t in outcomes.signals.items() if np.isfinite(t[row, model])}
    return Seen(
        model=model,
        answer=outcomes.answers[row][model],
        signals=told,
        cost=float(outcomes.cost[row, model]),
        seconds=float(outcomes.seconds[row, model]),
    )


def walk(policy: Policy, outcomes: Outcomes, row: int, query: Query | None = None) -> tuple[int, list[int]]:
    """Whose answer is taken in the end, and who was asked, in order."""
    query = query or Query(text=outcomes.questions[row])
    seen: list[Seen] = []
    for _ in range(len(policy.models) + 1):
        left = set(range(len(policy.models))) - {s.model for s in seen}
        decision = policy.decide(query, seen, allowed=left)
        assert 0 <= decision.quality <= 1 and decision.why
        if isinstance(decision, Take):
            assert decision.model in {s.model for s in seen}
            return decision.model, [s.model for s in seen]
        assert decision.model in left
        seen.append(asked(outcomes, row, decision.model))
    raise AssertionError("never took an answer")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_step_by_step_and_over_a_table_are_the_same(kinds: Kinds, unseen: Outcomes, data: st.DataObject) -> None:
    fitted = kinds.by_kind[data.draw(st.sampled_from(sorted(kinds.by_kind)))]
    vertex = data.draw(st.sampled_from(fitted.vertices))
    row = data.draw(st.integers(0, len(unseen) - 1))
    table = play(vertex.rule, fitted.mind.board(unseen.take([row, 0, 1])))
    taken, order = walk(LearnedPolicy(mind=fitted.mind, rule=vertex.rule), unseen, row)
    assert taken == table.taken[0]
    assert sum(1 << model for model in order) == table.asked[0]
    assert sum(unseen.cost[row, order]) == pytest.approx(table.cost[0])


def test_what_was_not_asked_for_is_not_looked_at(kinds: Kinds, unseen: Outcomes) -> None:
    """Whoever was not asked may have recorded anything: the play is the same."""
    fitted = kinds.picked
    for vertex in fitted.vertices:
        played = play(vertex.rule, fitted.mind.board(unseen))
        was = ((played.asked[:, None] >> np.arange(3)) & 1).astype(bool)
        assert unseen.answers is not None and unseen.seconds is not None
        other = replace(
            unseen,
            cost=np.where(was, unseen.cost, 1e6),
            quality=np.where(was, unseen.quality, 1 - unseen.quality),
            seconds=np.where(was, unseen.seconds, 1e6),
            answers=tuple(
                tuple(a if w else "999" for a, w in zip(answers, asked_, strict=True))
                for answers, asked_ in zip(unseen.answers, was, strict=True)
            ),
            signals={name: np.where(was, t, -50.0) for name, t in unseen.signals.items()},
        )
        again = play(vertex.rule, fitted.mind.board(other))
        assert (again.asked == played.asked).all() and (again.taken == played.taken).all()
        assert again.cost == pytest.approx(played.cost)


def test_every_kind_is_fitted_and_the_report_says_why(kinds: Kinds) -> None:
    assert set(kinds.by_kind) == set(RULES)
    report = kinds.picked.report
    assert report["picked"] in report["gain_over_mixing"] and report["picked"] in report["why"]
    assert report["gain_over_mixing"]["single"] == 0.0


def test_it_saves_money_at_the_quality_of_the_dearest(kinds: Kinds, unseen: Outcomes) -> None:
    """The law has much to save: half of the questions are easy for all."""
    fitted = kinds.picked
    policy = fitted.policy()
    ends = [walk(policy, unseen, row) for row in range(200)]
    quality = np.mean([unseen.quality[row, taken] for row, (taken, _) in enumerate(ends)])
    cost = np.mean([unseen.cost[row, order].sum() for row, (_, order) in enumerate(ends)])
    assert quality > unseen.quality[:200, 2].mean() - 0.04
    assert cost < 0.75 * unseen.cost[:200, 2].mean()


def test_more_is_asked_the_more_an_answer_is_worth(kinds: Kinds, unseen: Outcomes) -> None:
    costs = []
    for trade_off in (0.01, 30.0, 1e5):
        policy = kinds.picked.policy(trade_off=trade_off)
        costs.append(np.mean([unseen.cost[r, walk(policy, unseen, r)[1]].sum() for r in range(80)]))
    assert costs[0] < costs[1] <= costs[2]
    assert costs[0] == pytest.approx(unseen.cost[:80, 0].mean())
    with pytest.raises(InvalidRequest, match="trade_off is -1"):
        kinds.picked.policy(trade_off=-1)


def test_the_family_ends_with_always_the_top(kinds: Kinds, unseen: Outcomes) -> None:
    family = kinds.picked.family()
    assert len(family) >= 2
    assert all(walk(family[-1], unseen, row) == (2, [2]) for row in range(20))


def test_limits_are_kept(kinds: Kinds, unseen: Outcomes) -> None:
    top = kinds.picked.family()[-1]
    question = unseen.questions[0]
    assert top.decide(Query(text=question, cost_left=6.0), [], allowed={0, 1, 2}).model != 2
    assert top.decide(Query(text=question, seconds_left=0.4), [], allowed={0, 1, 2}).model == 0
    # nothing fits: the nearest is asked, for there must be an answer
    assert top.decide(Query(text=question, cost_left=0.0), [], allowed={1, 2}).model == 1
    assert isinstance(top.decide(Query(text=question), [], allowed={0}), Ask)
    with pytest.raises(NoExpert):
        top.decide(Query(text=question), [], allowed=())
    seen = [asked(unseen, 0, 0)]
    for fitted in kinds.by_kind.values():
        for policy in fitted.family():
            assert isinstance(policy.decide(Query(text=question), seen, allowed=()), Take)
            late = policy.decide(Query(text=question, seconds_left=0.01), seen, allowed={1, 2})
            assert isinstance(late, Take)
    with pytest.raises(InvalidRequest, match="at most once"):
        top.decide(Query(text=question), seen * 2, allowed={1})


def test_a_deadline_is_part_of_the_choice(train: Outcomes, unseen: Outcomes) -> None:
    """With 1.3 s there is no time to ask the large one after the middle one."""
    fitted = fit(train, seed=0, folds=2, deadline=1.3)
    board = fitted.mind.board(unseen)
    assert fitted.mind.deadline == 1.3
    for vertex in fitted.vertices:
        played = play(vertex.rule, board)
        assert (played.seconds > 1.45).mean() < 0.02
        assert vertex.p95_seconds is not None and vertex.p95_seconds <= 1.4


def test_a_mix_follows_each_for_its_share(kinds: Kinds) -> None:
    family = kinds.picked.family()
    mixed = MixedPolicy(first=family[0], second=family[-1], share=0.3)
    texts = [f"question {i}" for i in range(400)]
    asked_top = [mixed.decide(Query(text=t), [], allowed={0, 1, 2}).model == 2 for t in texts]
    assert np.mean(asked_top) == pytest.approx(0.3, abs=0.08)
    assert [drawn(t) < 0.3 for t in texts] == asked_top


def noise(n: int, seed: int) -> Outcomes:
    """Models that are right by chance, alike whatever is asked or answered: nothing can be learned."""
    rng = np.random.default_rng(seed)
    return Outcomes(
        models=("a", "b"),
        questions=tuple(f"{rng.integers(10**6)} {rng.integers(10**6)}" for _ in range(n)),
        quality=(rng.random((n, 2)) < [0.3, 0.8]).astype(float),
        cost=np.tile([1.0, 2.0], (n, 1)),
    )


def test_where_nothing_can_be_learned_nothing_is_lost() -> None:
    fitted, judged = fit(noise(200, 5), seed=0, folds=3), noise(4000, 6)
    assert all(abs(gain) < 0.03 for gain in fitted.report["gain_over_mixing"].values())
    assert fitted.report["picked"] in {"single", "routing"}, "a kind with more to get wrong must earn its place"
    board = fitted.mind.board(judged)
    for vertex in fitted.vertices:
        played = play(vertex.rule, board)
        mixed = 0.3 + 0.5 * (played.cost.mean() - 1)
        assert played.quality(judged.quality).mean() > mixed - 0.02


def test_single_models_are_mixed_where_every_kind_loses() -> None:
    halves = np.linspace(-0.001, 0.001, 12)
    judged = {"single": 0 * halves, "routing": halves - 0.02, "cascade": halves - 0.03}
    judged |= {"cascade_routing": halves - 0.03, "stopping": halves - 0.03}
    assert pick(judged) == "single"
    assert pick(judged | {"routing": halves}) == "routing"
    assert pick(judged | {"stopping": halves + 0.01}) == "stopping"
    wide = 30 * halves
    chance = {"routing": halves + 0.001, "stopping": wide + 0.01}
    assert pick(judged | chance) == "routing", "by chance it may be no better"
    loses = {"routing": wide - 0.001, "cascade": 4 * halves + 0.005}
    assert pick(judged | loses) == "cascade", "routing loses to mixing, this gains"


def test_the_same_seed_gives_the_same_policies(train: Outcomes) -> None:
    a, b = (fit(train, seed=4, folds=2) for _ in range(2))
    assert a.report == b.report and a.vertices == b.vertices


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"priors": ("magic",)}, "prior 'magic' is unknown"),
        ({"deadline": -1.0}, "deadline is -1"),
        ({"trade_off": float("nan")}, "trade_off is nan"),
        ({"folds": 1}, "folds is 1"),
    ],
)
def test_wrong_requests_are_told(train: Outcomes, change: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        fit(train, **change)  # type: ignore[arg-type]


def test_too_few_questions_and_foreign_models_are_told(train: Outcomes, kinds: Kinds) -> None:
    with pytest.raises(InvalidRequest, match="at least 30"):
        fit(train.take(range(10)))
    with pytest.raises(InvalidRequest, match="was fitted for"):
        kinds.picked.mind.board(replace(train, models=("x", "y", "z")))
