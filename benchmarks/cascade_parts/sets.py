"""The recorded outcome sets, read into tables: which models, at which prices, with what a real system would know."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest
from agora.routing.cascade.answer_features import answer_signals
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.final_answer import final_answer
from benchmarks.common import DATA_VARIABLE, read_jsonl

Floats = NDArray[np.float64]

ZEROEVAL: Final = "llm-outcomes-zeroeval"
ROUTELLM: Final = "llm-outcomes-routellm"
ROUTERBENCH: Final = "llm-outcomes-routerbench-mini"

GSM8K_MODELS: Final[Mapping[str, float]] = {
    "gemma-2-2b-it": 2,
    "Meta-Llama-3-8B-Instruct": 8,
    "gemma-2-9b-it": 9,
    "gemma-2-27b-it@together": 27,
    "Meta-Llama-3.1-70B-Instruct": 70,
    "Llama-3.1-405B-Inst@sambanova": 405,
}
"""Models and billions of parameters, which stand for the price of a character: no price is recorded."""

MATH_MODELS: Final[Mapping[str, float]] = {
    "gemma-2-2b-it": 2,
    "Qwen2.5-3B-Instruct": 3,
    "Qwen2.5-7B-Instruct": 7,
    "gemma-2-27b-it": 27,
    "Qwen2.5-32B-Instruct": 32,
    "Qwen2.5-72B-Instruct": 72,
}
"""The same for MATH level 5."""

ROUTELLM_MODELS: Final[Mapping[str, float]] = {"mixtral_8x7b": 0.24, "gpt4_1106": 24.7}
"""Models and USD per million tokens."""

ROLES: Final = ("cheap", "strong")
"""Models of RouterBench-Mini."""

ABOUT: Final = "The following is a multiple choice question (with answers) about {subject}.\n\n{prompt}"
"""MMLU's prompt with the customary line that tells the subject."""


def zeroeval_gsm8k(data: Path) -> Outcomes:
    """Six models on GSM8K; the whole answers of four of them are recorded."""
    return _zeroeval(data, "gsm", GSM8K_MODELS)


def zeroeval_math(data: Path) -> Outcomes:
    """Six models on MATH level 5."""
    return _zeroeval(data, "math-l5", MATH_MODELS)


def _zeroeval(data: Path, task: str, prices: Mapping[str, float]) -> Outcomes:
    folder = data / ZEROEVAL
    prompts = list(read_jsonl(folder / f"{task}_prompts.jsonl.gz"))
    ids = [row["id"] for row in prompts]
    tables = {
        what: _by_id(folder / f"{task}_{what}.csv.gz", "id", prices) for what in ("correct", "answer", "output_chars")
    }
    for what, table in tables.items():
        if missing := [i for i in ids if i not in table]:
            raise InvalidRequest(f"{task}_{what}.csv.gz has no row {missing[0]!r}, which {task}_prompts.jsonl.gz has")
    chars = np.array([[float(tables["output_chars"][i][name] or 0) for name in prices] for i in ids])
    questions = tuple(str(row["question"]) for row in prompts)
    signals = _signals(folder / f"{task}_outputs.jsonl.gz", ids, questions, list(prices))
    return Outcomes(
        models=tuple(prices),
        questions=questions,
        quality=np.array([[float(tables["correct"][i][name]) for name in prices] for i in ids]),
        cost=chars * np.array(list(prices.values())),
        answers=tuple(tuple(final_answer(tables["answer"][i][name]) for name in prices) for i in ids),
        signals=signals,
    )


def _signals(path: Path, ids: Sequence[str], questions: Sequence[str], models: Sequence[str]) -> dict[str, Floats]:
    """Signals of the answers whose whole text is recorded; NaN for others; nothing where there is no such file."""
    if not path.is_file():
        return {}
    row_of, column_of = {i: k for k, i in enumerate(ids)}, {name: j for j, name in enumerate(models)}
    tables: dict[str, Floats] = {}
    for row in read_jsonl(path):
        if row["id"] in row_of and row["model"] in column_of:
            k, j = row_of[row["id"]], column_of[row["model"]]
            for name, value in answer_signals(questions[k], row["output"]).items():
                tables.setdefault(name, np.full((len(ids), len(models)), np.nan))[k, j] = value
    return tables


def routellm_gsm8k(data: Path) -> Outcomes:
    """Mixtral and GPT-4 on GSM8K, with their whole answers."""
    rows = list(read_jsonl(data / ROUTELLM / "gsm8k_test.jsonl.gz"))
    texts = [[str(row[f"{name}_response"]) for name in ROUTELLM_MODELS] for row in rows]
    told = [[answer_signals(row["question"], t) for t in ts] for row, ts in zip(rows, texts, strict=True)]
    return Outcomes(
        models=tuple(ROUTELLM_MODELS),
        questions=tuple(str(row["question"]) for row in rows),
        quality=np.array([[float(row[f"{name}_correct"]) for name in ROUTELLM_MODELS] for row in rows]),
        cost=np.array([[len(t) for t in ts] for ts in texts]) * np.array(list(ROUTELLM_MODELS.values())),
        answers=tuple(tuple(final_answer(t) for t in ts) for ts in texts),
        signals={name: np.array([[s[name] for s in signals] for signals in told]) for name in told[0][0]},
    )


def routellm_mmlu(data: Path) -> Outcomes:
    """Mixtral and GPT-4 on MMLU: no answers are recorded, a call costs the same whatever is asked."""
    rows = list(read_jsonl(data / ROUTELLM / "mmlu.jsonl.gz"))
    return Outcomes(
        models=tuple(ROUTELLM_MODELS),
        questions=tuple(ABOUT.format(subject=r["subject"].replace("_", " "), prompt=r["prompt"]) for r in rows),
        quality=np.array([[float(row[f"{name}_correct"]) for name in ROUTELLM_MODELS] for row in rows]),
        cost=np.tile(list(ROUTELLM_MODELS.values()), (len(rows), 1)),
    )


def routerbench_mini(data: Path) -> Outcomes:
    """A cheap and a strong model on nine data sets, with measured cost and latency.

    The prompts of GSM8K and BIG-Bench Hard are found by their ids; of others the data set, the task, and the number of
    prompt tokens are known, as they are to whoever routes a request. The group of difficulty is not used.
    """
    path = data / ROUTERBENCH / "outcomes.csv.gz"
    by_role = {role: _by_id(path, "canonical_id", (), where=("role", role)) for role in ROLES}
    ids = [i for i in by_role["cheap"] if i in by_role["strong"]]
    if not ids:
        raise InvalidRequest(f"{path} has no question that both the cheap and the strong model answered")
    rows = [[by_role[role][i] for role in ROLES] for i in ids]
    prompts = _prompts(data)
    return Outcomes(
        models=ROLES,
        questions=tuple(_described(pair[0], prompts) for pair in rows),
        quality=np.array([[float(r["correct"]) for r in pair] for pair in rows]),
        cost=np.array([[float(r["cost_cny"]) for r in pair] for pair in rows]),
        seconds=np.array([[float(r["latency_ms"]) / 1e3 for r in pair] for pair in rows]),
        answers=tuple(tuple(final_answer(r["answer"]) for r in pair) for pair in rows),
        signals={
            "completion_tokens": np.log1p(np.array([[float(r["completion_tokens"]) for r in pair] for pair in rows]))
        },
    )


def _prompts(data: Path) -> dict[str, str]:
    """Texts of the prompts that RouterBench-Mini names by id, as far as the data folder has them."""
    found: dict[str, str] = {}
    if (gsm8k := data / "gsm8k" / "test.jsonl.gz").is_file():
        found.update((f"v5:gsm8k:test:{r['id']}", r["question"]) for r in read_jsonl(gsm8k))
    if (bbh := data / "bbh" / "bbh.jsonl.gz").is_file():
        found.update((f"v5:bbh:{r['task']}:{r['id']}", r["input"]) for r in read_jsonl(bbh))
    return found


def _described(row: Mapping[str, str], prompts: Mapping[str, str]) -> str:
    # "v5:bfcl_multiple:BFCL_v4_live_multiple:live_multiple_292-130-1": the last part says which one, the others what
    task = row["canonical_id"].split(":")[1:-1]
    if row["dataset"] == "mmmu":
        # "validation_Art_4": the subject
        task.append(row["canonical_id"].rpartition(":")[2].rpartition("_")[0])
    kind = f"{row['prompt_tokens']} tokens for {row['dataset']}: {row['task_family']}, {row['task_subtype']}"
    return "\n".join([kind, " ".join(task), prompts.get(row["canonical_id"], "")])


SETS: Final[Mapping[str, Callable[[Path], Outcomes]]] = {
    "zeroeval_gsm8k": zeroeval_gsm8k,
    "zeroeval_math": zeroeval_math,
    "routellm_gsm8k": routellm_gsm8k,
    "routellm_mmlu": routellm_mmlu,
    "routerbench_mini": routerbench_mini,
}
"""Readers by name of the set."""


def _by_id(
    path: Path, key: str, needed: Sequence[str] | Mapping[str, float], *, where: tuple[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """Rows of a gzipped CSV by a column.

    Raises:
        InvalidRequest: If the file is missing or damaged, or lacks a column.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except FileNotFoundError:
        raise InvalidRequest(
            f"{path.name} is not in {str(path.parent)!r}",
            hint=f"--data DIR (or {DATA_VARIABLE}) must name the folder that holds {path.parent.name!r}",
        ) from None
    except (OSError, EOFError, ValueError, csv.Error) as e:
        raise InvalidRequest(f"{path} cannot be read: {e}", hint="fetch the data set again") from None
    for column in (key, *needed):
        if rows and column not in rows[0]:
            raise InvalidRequest(f"{path} has no column {column!r}; it has {', '.join(list(rows[0])[:8])} …")
    return {row[key]: row for row in rows if where is None or row[where[0]] == where[1]}
