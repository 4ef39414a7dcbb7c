"""Where examples come from: GLUE tasks, instructions, titles with abstracts, and any JSONL with a template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from agora.errors import InvalidRequest
from fed.data.example import Example
from fed.data.hub import hub_rows
from fed.data.jsonl import read_rows
from fed.data.tasks import GLUE
from fed.data.template import Template

ABSTRACT_PROMPT: Final = "Write the abstract of a scientific paper with this title.\n\nTitle: {title}"

HUB_SPLITS: Final[Mapping[tuple[str, str], str]] = {
    ("mnli", "dev"): "validation_matched",
    ("", "dev"): "validation",
}
"""What a hub calls a split, by task (empty for any) and our word for it."""


def jsonl(path: Path, template: Template, *, limit: int | None = None) -> list[Example]:
    """Examples from a file with one JSON object a line (`.gz` is unpacked).

    Args:
        path: The file.
        template: How rows become examples.
        limit: Rows to read at most, from the beginning.

    Raises:
        InvalidRequest: If the file is missing or damaged, the template is no template, or a row does not fit it; the
            error names file, line, field, and what the row has. Values are data and are not told.
    """
    reader = template.reader()
    return _taken((reader.read(row, f"{path}, line {n}") for n, row in read_rows(path)), limit, str(path))


def glue(task: str, split: str = "train", *, folder: Path | None = None, limit: int | None = None) -> list[Example]:
    """Examples of a GLUE task.

    Args:
        task: A key of `fed.data.tasks.GLUE`.
        split: `train` or `dev`.
        folder: Folder that holds `glue-TASK/SPLIT.jsonl.gz`; None for a hub.
        limit: Rows to read at most, from the beginning.

    Raises:
        InvalidRequest: If there is no such task, or the data is missing or damaged.
    """
    if task not in GLUE:
        raise InvalidRequest(f"there is no GLUE task {task!r}; allowed: {', '.join(GLUE)}")
    known = GLUE[task]
    if folder is not None:
        return jsonl(folder / f"glue-{task}" / f"{split}.jsonl.gz", known.template(), limit=limit)
    named = HUB_SPLITS.get((task, split), HUB_SPLITS.get(("", split), split))

    def with_names(row: dict[str, Any]) -> dict[str, Any]:
        label = row.get("label")
        if isinstance(label, int) and 0 <= label < len(known.numbers):
            return row | {"label": known.numbers[label]}
        return row

    return _from_hub("nyu-mll/glue", known.template(), config=task, split=named, limit=limit, change=with_names)


INSTRUCTIONS: Final[Mapping[str, Template]] = {
    "openorca_dpo": Template(prompt="{question}", response="{response}", system="{system_prompt}", group="openorca"),
    "openorca": Template(prompt="{question}", response="{response}", system="{system_prompt}", group="openorca"),
    "alpaca": Template(prompt="{instruction}{input}", response="{output}", group="alpaca"),
    "seed_tasks": Template(prompt="{instruction}{input}", response="{output}", group="{name}"),
    "t0_multitask": Template(prompt="{instruction}", response="{output}", group="{dataset}", label="{template}"),
}
"""Templates of instruction sets by the name of their file."""


def instructions(
    name: str = "openorca", *, folder: Path | None = None, limit: int | None = None, split: str = "train"
) -> list[Example]:
    """Instructions and answers, in the layout of OpenOrca (Mukherjee et al. 2023) and of its kin.

    Rows whose answer is empty are left out: OpenOrca has some.

    Args:
        name: A key of `INSTRUCTIONS`.
        folder: Folder that holds `instructions/NAME.jsonl.gz`; None for a hub, which has `openorca`.
        limit: Rows to read at most, from the beginning.
        split: Of the hub's data set.

    Raises:
        InvalidRequest: If there is no such set, or the data is missing or damaged.
    """
    if name not in INSTRUCTIONS:
        raise InvalidRequest(f"there is no instruction set {name!r}; allowed: {', '.join(INSTRUCTIONS)}")
    if folder is None and name != "openorca":
        raise InvalidRequest(f"the instruction set {name!r} is read from a folder", hint="name the data folder")
    if folder is None:
        return _from_hub("Open-Orca/OpenOrca", INSTRUCTIONS[name], split=split, limit=limit, change=_plain)
    path = folder / "instructions" / f"{name}.jsonl.gz"
    reader = INSTRUCTIONS[name].reader()
    rows = ((n, _plain(row)) for n, row in read_rows(path))
    return _taken((reader.read(row, f"{path}, line {n}") for n, row in rows if _answered(row)), limit, str(path))


def title_abstract(name: str, *, folder: Path, limit: int | None = None) -> list[Example]:
    """Titles with their abstracts; groups and labels are the academic disciplines.

    Args:
        name: A file of `title-abstract` without its ending, like `arxiv_train`.
        folder: Folder that holds `title-abstract/NAME.jsonl.gz`.
        limit: Rows to read at most, from the beginning.

    Raises:
        InvalidRequest: If the data is missing or damaged.
    """
    template = Template(prompt=ABSTRACT_PROMPT, response="{abstract}", label="{discipline}", group="{discipline}")
    return jsonl(folder / "title-abstract" / f"{name}.jsonl.gz", template, limit=limit)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """An instruction's optional second part, set apart from the first; empty texts where there is nothing."""
    changed = {k: "" for k in ("input", "system_prompt") if k in row and row[k] is None}
    if row.get("input"):
        changed["input"] = f"\n\n{row['input']}"
    return row | changed


def _answered(row: Mapping[str, Any]) -> bool:
    answers = [row[k] for k in ("response", "output") if k in row]
    return not answers or any(isinstance(a, str) and a.strip() for a in answers)


def _from_hub(
    name: str,
    template: Template,
    *,
    config: str | None = None,
    split: str,
    limit: int | None,
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[Example]:
    reader = template.reader()
    rows = enumerate(map(change, hub_rows(name, config=config, split=split, limit=limit)), start=1)
    return _taken((reader.read(row, f"{name}, row {n}") for n, row in rows if _answered(row)), limit, name)


def _taken(examples: Iterable[Example], limit: int | None, where: str) -> list[Example]:
    if limit is not None and limit < 1:
        raise InvalidRequest(f"limit is {limit}; it must be at least 1, or absent")
    taken = list(_first(examples, limit))
    if not taken:
        raise InvalidRequest(f"{where} holds no rows", hint="check the file, or name another")
    return taken


def _first(examples: Iterable[Example], limit: int | None) -> Iterator[Example]:
    for count, example in enumerate(examples, start=1):
        yield example
        if count == limit:
            return
