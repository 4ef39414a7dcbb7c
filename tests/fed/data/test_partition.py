"""Every row goes to exactly one client, the same seed gives the same division, and skew is what was asked for."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from fed.data import PARTITIONS, ByGroup, ByQuantity, Dirichlet, Example, Iid, Partition, Split


def rows(labels: Sequence[str], groups: Sequence[str] | None = None) -> list[Example]:
    found = groups if groups is not None else [""] * len(labels)
    return [
        Example(prompt=f"p{i}", response="r", label=label, group=group)
        for i, (label, group) in enumerate(zip(labels, found, strict=True))
    ]


def check_whole(partition: Partition, count: int) -> None:
    dealt = np.concatenate(list(partition.rows.values()))
    assert sorted(dealt.tolist()) == list(range(count))
    assert all(len(r) and (np.diff(r) > 0).all() for r in partition.rows.values())


SPLITS: list[Split] = [
    Iid(),
    Dirichlet(alpha=0.3),
    Dirichlet(alpha=1e-3),
    Dirichlet(alpha=100),
    ByGroup(),
    ByQuantity(),
    ByQuantity(exponent=0),
    ByQuantity(exponent=3),
]


@settings(max_examples=60, deadline=None)
@given(
    split=st.sampled_from(SPLITS),
    kinds=st.lists(st.sampled_from("abc"), min_size=1, max_size=80),
    clients=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_every_row_goes_to_one_client_or_the_reason_is_told(
    split: Split, kinds: list[str], clients: int, seed: int
) -> None:
    examples = rows(kinds, kinds)
    try:
        partition = split.split(examples, clients, seed)
    except InvalidRequest as e:
        one_label = isinstance(split, Dirichlet) and len(set(kinds)) < 2
        assert clients > len(kinds) or one_label or "draws" in str(e) or "groups of" in str(e)
        return
    assert len(partition.rows) == clients
    check_whole(partition, len(kinds))
    again = split.split(examples, clients, seed)
    assert {c: r.tolist() for c, r in again.rows.items()} == {c: r.tolist() for c, r in partition.rows.items()}


def test_another_seed_gives_another_division() -> None:
    examples = rows(["a", "b"] * 50)
    for split in (Iid(), Dirichlet(), ByQuantity()):
        one, two = (split.split(examples, 4, seed).rows["client-0"].tolist() for seed in (0, 1))
        assert one != two


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = [len(r) for r in Iid().split(rows(["a"] * 103), 10, 0).rows.values()]
    assert max(sizes) - min(sizes) == 1


def skew(alpha: float) -> float:
    """Mean distance of the clients' label shares from those of all rows."""
    examples = rows(["a", "b", "c", "d"] * 500)
    found = []
    for seed in range(5):
        for own in Dirichlet(alpha=alpha).split(examples, 8, seed).rows.values():
            counts = Counter(examples[i].label for i in own)
            found.append(sum(abs(counts[c] / len(own) - 0.25) for c in "abcd"))
    return float(np.mean(found))


def test_a_smaller_alpha_skews_more() -> None:
    nearly_none, some, strong = skew(1000), skew(1), skew(0.05)
    assert nearly_none < 0.1 < some < strong
    assert strong > 1.0  # of 1.5, where every client has one label


def test_dirichlet_gives_every_client_its_least_or_says_why_not() -> None:
    examples = rows(["a", "b"] * 200)
    for seed in range(10):
        sizes = [len(r) for r in Dirichlet(alpha=0.2, least=10).split(examples, 8, seed).rows.values()]
        assert min(sizes) >= 10 and sum(sizes) == 400
    with pytest.raises(
        InvalidRequest, match=r"draws of a Dirichlet partition with alpha 0\.001 left one of 20 clients"
    ):
        Dirichlet(alpha=0.001, least=10).split(examples, 20, 0)
    with pytest.raises(InvalidRequest, match="8 clients of at least 51 rows need 408 rows; there are 400"):
        Dirichlet(least=51).split(examples, 8, 0)
    with pytest.raises(InvalidRequest, match="all have the label 'a'"):
        Dirichlet().split(rows(["a"] * 9), 2, 0)


def test_by_group_makes_each_group_a_client() -> None:
    groups = ["maths", "physics", "maths", "", "art"]
    partition = ByGroup().split(rows(["x"] * 5, groups), None, 0)
    assert {c: r.tolist() for c, r in partition.rows.items()} == {
        "maths": [0, 2],
        "physics": [1],
        "other": [3],
        "art": [4],
    }
    both = ByGroup().split(rows(["x"] * 3, ["other", "", "art"]), None, 0)
    assert {c: r.tolist() for c, r in both.rows.items()} == {"other": [0, 1], "art": [2]}


def test_by_group_deals_whole_groups_to_fewer_clients() -> None:
    groups = [*"a" * 50, *"b" * 30, *"c" * 20, *"d" * 10]
    partition = ByGroup().split(rows(["x"] * 110, groups), 2, 0)
    owners = {g: {c for c, r in partition.rows.items() if any(groups[i] == g for i in r)} for g in "abcd"}
    assert all(len(o) == 1 for o in owners.values())
    assert sorted(len(r) for r in partition.rows.values()) == [50, 60]


def test_by_group_divides_groups_among_more_clients() -> None:
    groups = [*"a" * 60, *"b" * 20]
    partition = ByGroup().split(rows(["x"] * 80, groups), 4, 0)
    assert all(len({groups[i] for i in r}) == 1 for r in partition.rows.values())
    assert sorted(len(r) for r in partition.rows.values()) == [20, 20, 20, 20]
    with pytest.raises(InvalidRequest, match="no row names one"):
        ByGroup().split(rows(["x"] * 4), 2, 0)


def test_quantity_follows_power_law_and_shares() -> None:
    sizes = [len(r) for r in ByQuantity(exponent=1).split(rows(["a"] * 1100), 3, 0).rows.values()]
    assert sizes == [600, 300, 200]  # 6 : 3 : 2
    sizes = [len(r) for r in ByQuantity(shares=(1, 2, 7)).split(rows(["a"] * 100), None, 0).rows.values()]
    assert sizes == [10, 20, 70]
    sizes = [len(r) for r in ByQuantity(exponent=9, least=5).split(rows(["a"] * 100), 4, 0).rows.values()]
    assert min(sizes) == 5 and sum(sizes) == 100
    with pytest.raises(InvalidRequest, match="3 shares for 4 clients"):
        ByQuantity(shares=(1, 1, 1)).split(rows(["a"] * 100), 4, 0)


@pytest.mark.parametrize("split", [Iid(), Dirichlet(), ByGroup(), ByQuantity()])
def test_more_clients_than_rows_is_refused(split: Split) -> None:
    with pytest.raises(InvalidRequest, match="2 rows for 3 clients"):
        split.split(rows(["a", "b"], ["a", "b"]), 3, 0)
    with pytest.raises(InvalidRequest, match="among 0 clients"):
        split.split(rows(["a", "b"], ["a", "b"]), 0, 0)


def test_bad_settings_are_refused() -> None:
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="alpha"):
            Dirichlet(alpha=bad)
    with pytest.raises(InvalidRequest, match="least"):
        Dirichlet(least=0)
    with pytest.raises(InvalidRequest, match="exponent"):
        ByQuantity(exponent=-1)
    with pytest.raises(InvalidRequest, match="shares"):
        ByQuantity(shares=(1, 0))
    assert set(PARTITIONS) == {"iid", "dirichlet", "group", "quantity"}


def test_a_clients_rows_are_views() -> None:
    examples = rows(["a", "b", "c", "d"])
    own = Iid().split(examples, 2, 0).of(examples)
    assert sorted(e.label for part in own.values() for e in part) == ["a", "b", "c", "d"]
    first = own["client-0"]
    assert first[0] is examples[Iid().split(examples, 2, 0).rows["client-0"][0]]
    assert list(first[1:]) == [first[1]] and len(first[:0]) == 0
