from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.sse import SseParser


def events(data: bytes, size: int = 10**9) -> list[str]:
    parser = SseParser()
    return [e for at in range(0, len(data), size) for e in parser.feed(data[at : at + size])]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", ["a", "b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        (b"data: a\r\rdata: b\r\r", ["a", "b"]),
        (b"data: a\r\n\ndata: b\n\r\n", ["a", "b"]),
        (b"data:a\n\n", ["a"]),
        (b"data:  a\n\n", [" a"]),
        (b"data: one\ndata: two\n\n", ["one\ntwo"]),
        (b"data\n\n", [""]),
        (b"data:\ndata:\n\n", ["\n"]),
        (b": keep-alive\n\ndata: a\n: in between\n\n", ["a"]),
        (b"event: x\nid: 7\nretry: 10\n\ndata: a\nid\n\n", ["a"]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"datax: a\n data: b\nDATA: c\n\n", []),
        (b"data: a\ndata: unfinished", []),
        (b"data: a\n", []),
        (b"\n\n\n\ndata: a\n\n\n\n", ["a"]),
        ("data: 日本 🦜\n\n".encode(), ["日本 🦜"]),
        (b"data: \xff\xfe\n\n", ["\ufffd\ufffd"]),
        ("data: a\u2028b\x0bc\x85\n\n".encode(), ["a\u2028b\x0bc\x85"]),
        (b"", []),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events(data: bytes, expected: list[str], size: int) -> None:
    assert events(data, size) == expected


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n\ufeff", exclude_categories=["Cs"])), max_size=8),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.data(),
)
def test_any_cut_gives_the_same_events(texts: list[str], end: str, data: st.DataObject) -> None:
    raw = "".join(f":c{end}data: {t}{end}{end}" for t in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    parser = SseParser()
    found = [e for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) for e in parser.feed(raw[a:b])]
    assert found == texts
    assert not parser.pending


def test_pending_tells_of_an_unfinished_event() -> None:
    parser = SseParser()
    parser.feed(b"data: a")
    assert parser.pending
    parser.feed(b"\n")
    assert parser.pending
    parser.feed(b"\n")
    assert not parser.pending


@pytest.mark.parametrize(
    "data",
    [
        b"data: " + b"x" * 2000,
        b"data: xxxxxxx\n" * 200,
        b"data\n" * 2000,
        b":" + b"x" * 2000,
        b"data: " + b"x" * 2000 + b"\n\n",
    ],
)
@pytest.mark.parametrize("size", [7, 10**6])
def test_events_are_bounded(data: bytes, size: int) -> None:
    parser = SseParser(max_event_bytes=1000)
    with pytest.raises(ValueError, match="larger than 1,000 bytes"):
        for at in range(0, len(data), size):
            parser.feed(data[at : at + size])


def test_many_small_events_are_no_large_one() -> None:
    parser = SseParser(max_event_bytes=100)
    assert len([e for _ in range(50) for e in parser.feed(b"data: " + b"x" * 50 + b"\n\n")]) == 50


def test_a_long_line_in_tiny_pieces_takes_linear_time() -> None:
    def seconds(pieces: int) -> float:
        parser = SseParser()
        began = time.perf_counter()
        for _ in range(pieces):
            parser.feed(b"0123456789abcdef")
        return time.perf_counter() - began

    # Eight times the length takes about eight times as long; copying the line each time would take sixty-four.
    assert min(seconds(160_000) for _ in range(3)) < 24 * min(seconds(20_000) for _ in range(3))
