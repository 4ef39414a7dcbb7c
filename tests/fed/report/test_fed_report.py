"""Reports: right figures, also of a run that was killed, and a page that stands alone."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from filelock import FileLock

from agora.errors import InvalidRequest, StoreError
from fed.report import read_report, summarise
from fed.report.figures import figures
from fed.report.page import page
from fed.runs.folder import LOCK


def test_figures_are_those_of_the_record(folder: Path) -> None:
    summary = summarise(read_report(folder))
    assert summary.name == "hospital <i>x</i>"
    assert (summary.standing, summary.versions, summary.seconds) == ("stopped", 3, 30.0)
    assert (summary.totals["lost"], summary.totals["refused"]) == (2, 1)
    assert summary.staleness == {0: 4, 1: 1, 2: 1}
    assert [(m.name, m.version, m.clients, m.updates) for m in summary.models] == [
        ("all", 2, 1, 4),
        ("cluster-1", 1, 2, 2),
    ]
    whole, part = summary.models
    assert (whole.first["loss"], whole.last["loss"], part.last["loss"]) == (0.9, 0.6, 0.4)
    assert whole.staleness == 0.25
    by_name = {c.name: c for c in summary.clients}
    # Weights: a 3 + 3 + 1, b 1 + 1, c 1, of 10.
    assert [by_name[n].share for n in "abc"] == pytest.approx([0.7, 0.2, 0.1])
    assert [by_name[n].rows_share for n in "abc"] == pytest.approx([0.6, 0.2, 0.2])
    assert [by_name[n].model for n in "abc"] == ["cluster-1", "cluster-1", "all"]
    assert by_name["empty"].left_out and by_name["empty"].updates == 0
    assert summary.problems == ((20.0, "<b>job 3</b> was refused"),)
    assert json.loads(json.dumps(summary.to_json()))["models"][0]["version"] == 2


def test_how_a_run_stands_is_told(folder: Path) -> None:
    assert read_report(folder).standing == "stopped"
    with FileLock(folder / LOCK):
        assert read_report(folder).standing == "running"
    (folder / "result.json").write_text(json.dumps({"why": "3 versions were made", "at": 31.0, "problems": ["late"]}))
    summary = summarise(read_report(folder))
    assert (summary.standing, summary.why, summary.seconds) == ("finished", "3 versions were made", 31.0)
    assert summary.problems[-1] == (31.0, "late")


def test_half_a_line_at_the_end_is_passed_over_and_other_damage_is_told(folder: Path) -> None:
    with (folder / "record.jsonl").open("a") as file:
        file.write('{"at": 40.0, "mod')
    assert summarise(read_report(folder)).versions == 3
    (folder / "record.jsonl").write_text("{}\nnothing\n{}\n")
    with pytest.raises(StoreError, match="line 2"):
        read_report(folder)


def test_a_run_without_a_version_has_a_report(folder: Path) -> None:
    for name in ("record.jsonl", "evaluations.jsonl", "clusters.jsonl", "clients.json"):
        (folder / name).unlink()
    report = read_report(folder)
    summary = summarise(report)
    assert (summary.versions, summary.models, summary.clients) == (0, (), ())
    assert figures(report, summary) == []
    assert "No version has been made yet" in page(report, summary)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"it has no config\.toml"):
        read_report(tmp_path)


class Reader(HTMLParser):
    """Tags and what they point at."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_shows_texts_as_texts(folder: Path) -> None:
    report = read_report(folder)
    html = page(report, summarise(report))
    reader = Reader()
    reader.feed(html)
    assert "script" not in reader.tags and "i" not in reader.tags and "link" not in reader.tags
    assert reader.tags.count("img") == 8
    assert all(link.startswith("data:image/svg+xml;base64,") for link in reader.links)
    assert "hospital <i>x</i>" in reader.text
    assert "left out: it has no rows <script>alert(1)</script>" in reader.text
    assert "<b>job 3</b> was refused" in reader.text
    assert 'name = "hospital' in reader.text, "the configuration"
    assert "default-src 'none'" in html


def test_plots_are_pictures_and_the_same_each_time(folder: Path) -> None:
    report = read_report(folder)
    drawn = figures(report, summarise(report))
    assert [f.name for f in drawn] == [
        "loss",
        "accuracy",
        "versions",
        "clusters",
        "bytes",
        "staleness",
        "shares",
        "jobs",
    ]
    assert all(f.svg.startswith(b"<?xml") and b"<svg" in f.svg for f in drawn)
    assert [f.svg for f in figures(report, summarise(report))] == [f.svg for f in drawn]
    html = page(report, summarise(report))
    found = re.findall(r"base64,([A-Za-z0-9+/=]+)", html)
    assert [base64.b64decode(data) for data in found] == [f.svg for f in drawn]


def test_without_matplotlib_plots_say_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = read_report(folder)
    with pytest.raises(InvalidRequest, match="plots need matplotlib") as caught:
        page(report, summarise(report))
    assert caught.value.hint is not None and "agora-llm[plots]" in caught.value.hint
