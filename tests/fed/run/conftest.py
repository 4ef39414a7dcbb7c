"""A small federation on the tiny model: a configuration and rows, in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fed.config import FedConfig, load_config

MARKER = "zyxwvut-private-marker"
"""Stands in every row; must be in nothing that a run writes."""

TEXT = """
[model]
source = "{model}"
threads = 1
[data]
source = "jsonl"
path = "rows.jsonl"
clients = 4
eval_rows = 16
eval_per_client = 3
[data.template]
prompt = "{{text}} is it good or bad?"
response = "{{label}}"
group = "{{kind}}"
choices = {{ good = " good", bad = " bad" }}
[adapter]
rank = 2
[training]
steps = 1
batch = 4
learning_rate = 5e-3
max_tokens = 128
[server]
cohort = 4
buffer = 2
publications = 6
[fleet]
speeds = "lognormal"
up_bytes_per_s = 1e5
loss = 0.1
[run]
seed = 3
checkpoint_every = 1
"""

Project = Callable[..., FedConfig]


def rows(count: int = 120) -> list[dict[str, str]]:
    kinds, labels = ("film", "food"), ("good", "bad")
    return [
        {
            "text": f"{MARKER} the {kinds[i % 2]} number {i} was {'fine' if i % 3 else 'poor'}",
            "label": labels[i % 3 == 0],
            "kind": kinds[i % 2],
        }
        for i in range(count)
    ]


@pytest.fixture
def project(tmp_path: Path, llama: Path) -> Project:
    """Writes fed.toml with some of it replaced and more added, and reads it."""

    def write(
        *changes: tuple[str, str], more: str = "", data: list[dict[str, str]] | None = None, place: Path = tmp_path
    ) -> FedConfig:
        place.mkdir(exist_ok=True)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (data or rows())))
        text = TEXT.format(model=llama)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (place / "fed.toml").write_text(text + more)
        return load_config(place / "fed.toml")

    return write
