"""The gateway's log."""

from __future__ import annotations

import io
import json
import logging
import threading
import time

import pytest

from agora.serve import log as module
from agora.serve.log import JsonLog


def lines(out: io.BytesIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_lines_and_records_are_json_in_order() -> None:
    out = io.BytesIO()
    with JsonLog(out) as log:
        log.line({"request": "a"})
        logging.getLogger("agora.test").warning("over %d", 9)
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("agora.test").exception("broke")
        logging.getLogger("agora.test").debug("too fine")
    told = lines(out)
    assert [t.get("request") or t.get("message") for t in told] == ["a", "over 9", "broke"]
    assert "ValueError: why" in str(told[2]["trace"])
    assert all("at" in t for t in told)
    logging.getLogger("agora.test").warning("after")
    assert len(lines(out)) == 3


def test_a_disk_that_hangs_loses_lines_and_not_requests() -> None:
    free, writing = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def write(self, data: object) -> int:
            writing.set()
            free.wait(10)
            return super().write(data)  # type: ignore[arg-type]

    out = Slow()
    with JsonLog(out) as log:
        log.line({"n": "first"})
        assert writing.wait(10)
        for n in range(module.MAX_LINES + 5000):
            log.line({"n": n})
        free.set()
        while log._lines:
            time.sleep(0.01)
        log.line({"n": "last"})
    told = lines(out)
    assert len(told) < module.MAX_LINES + 5000
    assert told[-1]["n"] == "last"
    assert told[-1]["dropped_lines"] >= 1


def test_an_output_that_is_closed_is_no_error() -> None:
    out = io.BytesIO()
    with JsonLog(out) as log:
        out.close()
        log.line({"n": 1})
    assert not log._thread.is_alive()
    assert log._dropped == 1


def test_a_reader_that_stopped_reading_does_not_keep_the_process_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.1)
    free = threading.Event()

    class Stuck(io.BytesIO):
        def write(self, data: object) -> int:
            free.wait(10)
            return super().write(data)  # type: ignore[arg-type]

    began = time.monotonic()
    with JsonLog(Stuck()) as log:
        log.line({"n": 1})
    assert time.monotonic() - began < 5
    free.set()


def test_a_line_that_a_full_disk_cut_off_does_not_spoil_the_next() -> None:
    class Disk(io.BytesIO):
        room: int | None = 10

        def write(self, data: object) -> int:
            if self.room is None:
                return super().write(data)  # type: ignore[arg-type]
            if not self.room:
                raise OSError(28, "No space left on device")
            self.room, room = 0, self.room
            return super().write(bytes(data)[:room])  # type: ignore[call-overload]

    out = Disk()
    with JsonLog(out) as log:
        log.line({"n": 1})
        while not log._dropped:
            time.sleep(0.01)
        out.room = None
        log.line({"n": 2})
    torn, whole = out.getvalue().splitlines()
    assert len(torn) == 10
    assert json.loads(whole)["n"] == 2


def test_a_record_with_what_is_no_text_is_written_all_the_same() -> None:
    """Bytes of a header that are no UTF-8 reach Python as lone surrogates, which JSON cannot hold."""
    out = io.BytesIO()
    with JsonLog(out):
        logging.getLogger("agora.test").warning("host %s", "\udcff")
    assert lines(out)[0]["message"] == "host \\udcff"
