from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.engine.sampling import NUCLEUS_FIRST, Choice, Wish, choose


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(logits: torch.Tensor, draws: int, **wish: float) -> list[float]:
    generator = seeded()
    seen = [0] * logits.shape[-1]
    batch = 500
    for _ in range(draws // batch):
        wishes = [Wish(generator=generator, **{"temperature": 1.0, **wish}) for _ in range(batch)]  # type: ignore[arg-type]
        for choice in choose(logits.expand(batch, -1), wishes):
            seen[choice.token] += 1
    return [n / draws for n in seen]


def test_temperature_0_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    assert choose(logits, [Wish(), Wish(top_p=0.1)]) == choose(logits, [Wish(), Wish()])
    assert [c.token for c in choose(logits, [Wish(), Wish()])] == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -float("inf")])
    expected = torch.softmax(logits / temperature, -1).tolist()
    # 4 standard errors of 20,000 draws are at most 0.015.
    assert counts(logits[None], 20_000, temperature=temperature) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2]), (0.96, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    shares = counts(probabilities.log().float()[None], 4_000, top_p=top_p)
    mass = probabilities[kept].sum()
    expected = [float(p / mass) if n in kept else 0.0 for n, p in enumerate(probabilities)]
    assert shares == pytest.approx(expected, abs=0.035)


def test_a_flat_distribution_is_sampled_beyond_the_first_look() -> None:
    """More tokens are in the nucleus than the cheap path looks at."""
    size = NUCLEUS_FIRST * 4
    generator = seeded()
    seen = {
        c.token
        for c in choose(
            torch.zeros(400, size), [Wish(temperature=1.0, top_p=0.9, generator=generator) for _ in range(400)]
        )
    }
    assert len(seen) > NUCLEUS_FIRST / 2
    assert len(seen) > 300


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from((0.0, 0.7, 1.3)),
            st.sampled_from((1.0, 0.9, 0.2)),
            st.integers(0, 9),
            st.none() | st.integers(0, 5),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_row_is_chosen_the_same_whatever_is_beside_it(rows: list[tuple[float, float, int, int | None]]) -> None:
    logits = torch.randn(len(rows), 50, generator=seeded(3))

    def wishes() -> list[Wish]:
        return [
            Wish(temperature=t, top_p=p, generator=seeded(seed) if t else None, logprobs=lp) for t, p, seed, lp in rows
        ]

    together = choose(logits, wishes())
    alone = [choose(logits[n : n + 1], [wish])[0] for n, wish in enumerate(wishes())]
    assert [(c.token, c.top) for c in together] == [(c.token, c.top) for c in alone]
    assert [c.logprob for c in together] == pytest.approx([c.logprob for c in alone], nan_ok=True)


def test_logprobs_are_of_the_model_itself() -> None:
    """Neither temperature nor top-p changes them."""
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    expected = torch.log_softmax(logits[0].double(), -1)
    (choice,) = choose(logits, [Wish(temperature=0.3, top_p=0.4, generator=seeded(), logprobs=3)])
    assert choice.logprob == pytest.approx(float(expected[choice.token]), abs=1e-6)
    assert [t for t, _ in choice.top] == [1, 0, 2]
    assert [lp for _, lp in choice.top] == pytest.approx([float(expected[t]) for t in (1, 0, 2)], abs=1e-6)


def test_more_alternatives_than_tokens() -> None:
    (choice,) = choose(torch.zeros(1, 3), [Wish(logprobs=20)])
    assert len(choice.top) == 3


def test_nothing_is_told_that_was_not_asked_for() -> None:
    told, untold = choose(torch.zeros(2, 4), [Wish(logprobs=0), Wish()])
    assert told.logprob == pytest.approx(math.log(0.25))
    assert told.top == ()
    assert math.isnan(untold.logprob)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_choose_nothing(value: float, temperature: float) -> None:
    logits = torch.zeros(2, 4)
    logits[0, 2] = value
    bad, good = choose(logits, [Wish(temperature=temperature, generator=seeded(), logprobs=1)] * 2)
    assert bad == Choice(-1) or (bad.token == -1 and math.isnan(bad.logprob))
    assert 0 <= good.token < 4


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[300.0, 299.0, -300.0]])
    wishes = [Wish(temperature=1e-3, generator=seeded(n)) for n in range(20)]
    assert {c.token for c in choose(logits.expand(20, -1), wishes)} == {0}
