from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.engine import cache as cache_module
from experts.engine.cache import CacheShape, Place, SlotCache

SHAPE = CacheShape(layers=2, heads=1, dim=2, dtype=torch.float32, device=torch.device("cpu"))


def write(cache: SlotCache, place: Place, values: list[float]) -> None:
    """Appends tokens whose keys are `values` and whose values are their negatives."""
    cache.reserve(place, place.length + len(values))
    at = slice(place.length, place.length + len(values))
    for layer in range(SHAPE.layers):
        new = torch.tensor(values)[:, None, None].expand(-1, 1, 2) + layer
        place.lane.keys[layer][place.slot, at] = new
        place.lane.values[layer][place.slot, at] = -new
    place.length += len(values)


def read(place: Place) -> list[float]:
    for layer in range(SHAPE.layers):
        keys = place.lane.keys[layer][place.slot, : place.length]
        assert torch.equal(place.lane.values[layer][place.slot, : place.length], -keys)
        assert torch.equal(keys - layer, place.lane.keys[0][place.slot, : place.length])
    return place.lane.keys[0][place.slot, : place.length, 0, 0].tolist()


actions = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(1, 9)),
        st.tuples(st.just("write"), st.integers(0, 7), st.integers(1, 9)),
        st.tuples(st.just("close"), st.integers(0, 7)),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(actions)
def test_rows_keep_what_was_written_wherever_they_move(todo: list[tuple[object, ...]]) -> None:
    """Rows grow from lane to lane and move into holes; none sees another's data, and no slot is left between them."""
    cache = SlotCache(SHAPE, lane_tokens=2)
    rows: list[tuple[Place, list[float]]] = []
    counter = 0.0
    for action in todo:
        if action[0] == "open":
            assert isinstance(action[1], int)
            rows.append((cache.open(action[1]), []))
        elif rows and action[0] == "write":
            assert isinstance(action[1], int) and isinstance(action[2], int)
            place, written = rows[action[1] % len(rows)]
            new = [counter + n + 1 for n in range(action[2])]
            counter += len(new)
            write(cache, place, new)
            written += new
        elif rows:
            assert isinstance(action[1], int)
            place, _ = rows.pop(action[1] % len(rows))
            cache.close(place)
        for place, written in rows:
            assert read(place) == written
        for lane in cache._lanes.values():
            assert [p.slot for p in lane.places] == list(range(len(lane.places)))
            assert all(p.lane is lane for p in lane.places)
            for p in lane.places:
                # Past the end there may be zeros or the row's own old data, never another row's.
                assert not lane.keys[0][p.slot, p.length :].isnan().any()
    assert sum(len(lane.places) for lane in cache._lanes.values()) == len(rows)


def test_a_row_never_takes_more_than_twice_its_need() -> None:
    cache = SlotCache(SHAPE)
    for tokens in (300, 1000, 8192):
        assert tokens * SHAPE.bytes_per_token <= cache.cost(tokens) < 2 * tokens * SHAPE.bytes_per_token


def test_a_long_row_does_not_widen_the_short_ones() -> None:
    cache = SlotCache(SHAPE, lane_tokens=16)
    for _ in range(8):
        cache.open(10)
    before = cache.bytes
    long = cache.open(1000)
    assert cache.bytes - before == 1024 * SHAPE.bytes_per_token
    assert long.lane.capacity == 1024


def test_a_large_empty_lane_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "KEEP_BYTES", 64 * SHAPE.bytes_per_token)
    cache = SlotCache(SHAPE, lane_tokens=16)
    small, large = cache.open(10), cache.open(100)
    cache.close(small)
    cache.close(large)
    assert cache.bytes == 16 * SHAPE.bytes_per_token
    again = cache.open(100)
    write(cache, again, [1.0, 2.0])
    assert read(again) == [1.0, 2.0]


def test_a_slot_is_clean_for_its_next_row() -> None:
    cache = SlotCache(SHAPE, lane_tokens=16)
    first = cache.open(4)
    write(cache, first, [float("nan")] * 4)
    cache.close(first)
    second = cache.open(4)
    assert second.lane.keys[0][second.slot].count_nonzero() == 0


@pytest.mark.parametrize("mode", [True, False])
def test_works_inside_and_outside_inference_mode(mode: bool) -> None:
    """The batch makes rows outside of it and fills them inside."""
    cache = SlotCache(SHAPE, lane_tokens=2)
    with torch.inference_mode(mode):
        places = [cache.open(1) for _ in range(3)]
        for place in places:
            write(cache, place, [1.0, 2.0, 3.0])
    with torch.inference_mode(not mode):
        cache.close(places[0])
        write(cache, cache.open(1), [4.0])
        write(cache, places[1], [5.0] * 5)
    assert read(places[1]) == [1.0, 2.0, 3.0] + [5.0] * 5
