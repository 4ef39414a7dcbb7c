"""Readers of recorded traces: tables of several public data sets, by the names of their columns, and a link's own."""

from __future__ import annotations

import csv
import gzip
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from statistics import median
from types import MappingProxyType
from typing import Final, TextIO

from agora.errors import InvalidRequest
from agora.network.path import Technology
from agora.network.traces import Trace

MAX_ROWS: Final = 5_000_000
"""Rows of one file that are read at most: 30 times the largest of these data sets."""

MAX_LINE: Final = 100_000
"""Characters that a line of a file may have: a thousand times those of these data sets. What has no line breaks is no
table, and must not be read into memory to find that out."""

PACKET_MEGABITS: Final = 1500 * 8 / 1e6
"""Megabits in one delivery opportunity of a mahimahi trace (1500 bytes)."""

MAHIMAHI_BIN_S: Final = 0.1
"""Seconds of one row of a mahimahi trace; rows without a packet are left out of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Traces of the same walk or drive, recorded at the same time.

    Attributes:
        name: What the data set calls it.
        kind: How the device moved, or what it did; empty if not told.
        traces: What came down, by technology.
        up: What went up, by technology, where that was recorded too.
    """

    name: str
    kind: str
    traces: Mapping[Technology, Trace]
    up: Mapping[Technology, Trace]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTest:
    """One speed test.

    Attributes:
        radio: Radio type, like `4G-LTE`.
        carrier: The operator.
        down_mbps: Megabits per second down.
        up_mbps: Megabits per second up.
        rtt_s: Round-trip time in seconds.
    """

    radio: str
    carrier: str
    down_mbps: float
    up_mbps: float
    rtt_s: float


def read_multipath(file: FilePath) -> tuple[Recording, ...]:
    """Paired 4G and 5G traces (Lumos5G): columns trace, mobility, t_s, mbps_5g, mbps_4g.

    Raises:
        InvalidRequest: If the file is missing, damaged, or has other columns.
    """
    found = []
    for (name, mobility), rows in _groups(file, ("trace", "mobility"), ("t_s", "mbps_5g", "mbps_4g")):
        times, nr, lte = zip(*rows, strict=True)
        traces = {Technology.NR: Trace(times, nr, name=name), Technology.LTE: Trace(times, lte, name=name)}
        found.append(_recording(name, mobility, traces))
    return tuple(found)


def read_single(file: FilePath) -> tuple[Recording, ...]:
    """Traces of one radio each (Lumos5G): columns trace, tech, mobility, t_s, mbps.

    Raises:
        InvalidRequest: If the file is missing, damaged, or has other columns.
    """
    found = []
    for (name, tech, mobility), rows in _groups(file, ("trace", "tech", "mobility"), ("t_s", "mbps")):
        times, mbps = zip(*rows, strict=True)
        found.append(_recording(name, mobility, {_technology(tech, file): Trace(times, mbps, name=name)}))
    return tuple(found)


def read_mahimahi(file: FilePath) -> tuple[Recording, ...]:
    """Traces of the Saturator (mahimahi): columns trace, direction, t_ms, packets_1500B; both ways of a name together.

    Raises:
        InvalidRequest: If the file is missing, damaged, or has other columns.
    """
    ways: dict[str, dict[str, Trace]] = {}
    for (name, direction), rows in _groups(file, ("trace", "direction"), ("t_ms", "packets_1500B")):
        if wrong := [t for t, _ in rows if not 0 <= t / 1e3 / MAHIMAHI_BIN_S <= MAX_ROWS]:
            most = MAX_ROWS * MAHIMAHI_BIN_S * 1e3
            raise InvalidRequest(f"{file}: t_ms of {name} is {wrong[0]}; it must be a number from 0 to {most:.0f}")
        packets = {round(t / 1e3 / MAHIMAHI_BIN_S): count for t, count in rows}
        bins = range(min(packets), max(packets) + 1)
        mbps = [packets.get(i, 0.0) * PACKET_MEGABITS / MAHIMAHI_BIN_S for i in bins]
        end = (max(packets) + 1) * MAHIMAHI_BIN_S
        trace = Trace([i * MAHIMAHI_BIN_S for i in bins], mbps, end_s=end, name=f"{name}.{direction}")
        ways.setdefault(name, {})[direction] = trace
    return tuple(
        Recording(
            name=name,
            kind="",
            traces=MappingProxyType({Technology.LTE: both["down"]} if "down" in both else {}),
            up=MappingProxyType({Technology.LTE: both["up"]} if "up" in both else {}),
        )
        for name, both in ways.items()
    )


def read_ucc5g(file: FilePath) -> tuple[Recording, ...]:
    """Traces of an Irish 5G operator (Raca et al., MMSys 2020): columns trace, mobility, DL_bitrate, UL_bitrate.

    Rates are in kbit/s, one row a second; gaps of the clock are left out.

    What was received is a lower bound of the bandwidth: the device may have had nothing to load.

    Raises:
        InvalidRequest: If the file is missing, damaged, or has other columns.
    """
    found = []
    for (name, mobility), rows in _groups(file, ("trace", "mobility"), ("DL_bitrate", "UL_bitrate")):
        down, up = zip(*((d / 1e3, u / 1e3) for d, u in rows), strict=True)
        times = [float(i) for i in range(len(rows))]
        both = {Technology.NR: Trace(times, down, name=name)}, {Technology.NR: Trace(times, up, name=f"{name}.up")}
        found.append(Recording(name=name, kind=mobility, traces=both[0], up=both[1]))
    return tuple(found)


def read_speedtests(file: FilePath) -> tuple[SpeedTest, ...]:
    """Speed tests: columns radio_type, carrier, downlink_Mbps, uplink_Mbps, latency_ms; incomplete ones are left out.

    Raises:
        InvalidRequest: If the file is missing, damaged, or has other columns.
    """
    found = []
    for row in _rows(file, ("radio_type", "carrier", "downlink_Mbps", "uplink_Mbps", "latency_ms")):
        try:
            down, up, ms = (float(row[c]) for c in ("downlink_Mbps", "uplink_Mbps", "latency_ms"))
        except ValueError:
            continue
        if all(math.isfinite(v) and v >= 0 for v in (down, up, ms)):
            found.append(
                SpeedTest(radio=row["radio_type"], carrier=row["carrier"], down_mbps=down, up_mbps=up, rtt_s=ms / 1e3)
            )
    return tuple(found)


def read_trace(file: FilePath) -> tuple[Trace | None, Trace | None]:
    """One trace of one link: columns t_s and down_mbps, up_mbps or both, or mbps for both ways alike.

    Returns:
        What came down and what went up; None for a way that the file has no column for.

    Raises:
        InvalidRequest: If the file is missing, damaged, has other columns, or its times do not rise.
    """
    rows = list(_rows(file, ("t_s",)))
    columns = rows[0].keys() if rows else ()
    ways = [next((c for c in (f"{way}_mbps", "mbps") if c in columns), None) for way in ("down", "up")]
    wanted = tuple(dict.fromkeys(w for w in ways if w is not None))
    if not wanted:
        seen = ", ".join(columns) if rows else "no rows"
        raise InvalidRequest(
            f"{file} holds no bandwidth: it has {seen}", hint="columns: t_s and down_mbps, up_mbps or both, or mbps"
        )
    numbers = [_numbers(file, line, row, ("t_s", *wanted)) for line, row in enumerate(rows, 2)]
    times, *values = zip(*numbers, strict=True)
    made = {c: Trace(times, mbps, name=f"{file}, {c}") for c, mbps in zip(wanted, values, strict=True)}
    down, up = (None if w is None else made[w] for w in ways)
    return down, up


def median_rtt_s(tests: tuple[SpeedTest, ...], radio: str) -> float | None:
    """Median round-trip time of a radio type; None if there is no test of it."""
    of_it = [t.rtt_s for t in tests if t.radio == radio]
    return median(of_it) if of_it else None


def _recording(name: str, kind: str, traces: Mapping[Technology, Trace]) -> Recording:
    return Recording(name=name, kind=kind, traces=MappingProxyType(dict(traces)), up=MappingProxyType({}))


def _technology(value: str, file: FilePath) -> Technology:
    try:
        return Technology(value)
    except ValueError:
        raise InvalidRequest(
            f"{file}: {value!r} is no technology", hint=f"allowed: {', '.join(t.value for t in Technology)}"
        ) from None


def _groups(
    file: FilePath, keys: tuple[str, ...], numbers: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], list[tuple[float, ...]]]]:
    """Rows of a table that stand together and agree in `keys`, as numbers."""
    rows = enumerate(_rows(file, (*keys, *numbers)), 2)
    for key, group in itertools.groupby(rows, key=lambda row: tuple(row[1][k] for k in keys)):
        yield key, [_numbers(file, line, row, numbers) for line, row in group]


def _numbers(file: FilePath, line: int, row: Mapping[str, str], names: tuple[str, ...]) -> tuple[float, ...]:
    try:
        return tuple(float(row[n]) for n in names)
    except (TypeError, ValueError):
        seen = ", ".join(f"{n} is {row[n]!r}" for n in names)
        raise InvalidRequest(f"{file}, row {line}: {seen}; these must be numbers") from None


def _rows(file: FilePath, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        with _text_of(file) as text:
            table = csv.DictReader(_bounded(text, file))
            if missing := [c for c in columns if c not in (table.fieldnames or ())]:
                raise InvalidRequest(
                    f"{file} has no column {missing[0]!r}", hint=f"its columns: {', '.join(table.fieldnames or ())}"
                )
            yield from itertools.islice(table, MAX_ROWS)
    except FileNotFoundError:
        raise InvalidRequest(f"{file} is not there", hint="see that the data folder holds this data set") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as e:
        raise InvalidRequest(f"{file} cannot be read: {e}", hint="fetch the data set again") from None


def _text_of(file: FilePath) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", newline="")
    return file.open(encoding="utf-8", newline="")


def _bounded(text: TextIO, file: FilePath) -> Iterator[str]:
    while line := text.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise InvalidRequest(f"{file} has a line of more than {MAX_LINE} characters", hint="is it the right file?")
        yield line
