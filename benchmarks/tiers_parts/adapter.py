"""The edge tier's adapter: smollm2-135m learns to judge film reviews, once; kept in the user's cache.

Trained on the very messages that the expert will be asked with, so that serving it needs nothing special: the chat
template, its system prompt, the user's question, and the label as the answer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from agora.errors import AdapterError
from agora.protocols import Message
from benchmarks.tiers_parts.questions import Phrase, review_question
from experts.adapters import WEIGHTS_FILE, check_adapter

RECORD_FILE: Final = "training.json"

_Row = tuple[list[int], list[int]]

Progress = Callable[[int, int, float], None]
"""Told (steps done, steps in all, loss of the last)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the adapter is trained. LoRA on q and v with the learning rate and batch that were found to give 0.87–0.88 on
    SST-2 dev after 400–800 phrases.

    Attributes:
        phrases: Reviews it is shown, each once.
        batch: Reviews of one step.
        learning_rate: Of AdamW at its highest; up for a tenth of the steps, then down in a line.
        rank: r of LoRA.
        alpha: α of LoRA.
        seed: Of the first A.
    """

    phrases: int = 480
    batch: int = 16
    learning_rate: float = 1e-3
    rank: int = 8
    alpha: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """An adapter that is there.

    Attributes:
        folder: Where.
        sha256: Of its weights.
        seconds: That its training took, whenever that was.
        cached: Whether it was there before.
    """

    folder: Path
    sha256: str
    seconds: float
    cached: bool


def adapter(
    root: Path,
    base: Path,
    phrases: Sequence[Phrase],
    recipe: Recipe,
    *,
    system_prompt: str,
    threads: int,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """The adapter of this recipe: the one in the cache if it is whole, else a newly trained one.

    Args:
        root: Folder of the cache.
        base: Folder of the base model.
        phrases: What it is shown.
        recipe: How it is trained.
        system_prompt: What the expert will be told.
        threads: CPU threads.
        fresh: Whether to train again even so.
        progress: Told after every step.
    """
    told = {"recipe": asdict(recipe), "system_prompt": system_prompt, "phrases": [asdict(p) for p in phrases]}
    told |= {"base": _base(base)}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    folder = root / f"sst2-{key[:16]}"
    if not fresh and (there := _cached(folder)) is not None:
        return there
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".training-", dir=root))
    try:
        started = time.perf_counter()
        _train(base, work, phrases, recipe, system_prompt=system_prompt, threads=threads, progress=progress)
        seconds = time.perf_counter() - started
        sha256 = check_adapter(work, None).sha256
        record = {"sha256": sha256, "seconds": round(seconds, 1), **told}
        (work / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        work.replace(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Trained(folder=folder, sha256=sha256, seconds=round(seconds, 1), cached=False)


def _base(base: Path) -> str:
    """What tells one base model from another: its configuration, and the size of its weights."""
    weights = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    return hashlib.sha256((base / "config.json").read_bytes()).hexdigest() + f":{weights}"


def _cached(folder: Path) -> Trained | None:
    """The adapter in a folder, if it is there and is what was written."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        found = check_adapter(folder, None)
    except (OSError, ValueError, AdapterError):
        return None
    if found.sha256 != record.get("sha256"):
        return None
    return Trained(folder=folder, sha256=found.sha256, seconds=float(record["seconds"]), cached=True)


def _train(
    base: Path,
    folder: Path,
    phrases: Sequence[Phrase],
    recipe: Recipe,
    *,
    system_prompt: str,
    threads: int,
    progress: Progress | None,
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experts.engine.text import Codec
    from experts.loading import loading

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(recipe.seed)
        with loading(base):
            tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                base, local_files_only=True, dtype=torch.float32, use_safetensors=True
            )
        codec = Codec(tokenizer, vocabulary=model.config.vocab_size)
        lora = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            # peft asks transformers by a name that it is about to drop.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            tuned: Any = get_peft_model(model, lora)
        tuned.train()
        rows = [_row(codec, tokenizer, p, system_prompt) for p in phrases]
        steps = _batches(rows, recipe)
        optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=recipe.learning_rate)
        warm = max(1, len(steps) // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda s: min((s + 1) / warm, (len(steps) - s) / max(1, len(steps) - warm))
        )
        for done, batch in enumerate(steps, start=1):
            ids, mask, answers = _padded(batch)
            # The head is a fifth of the model: it runs on the answers' tokens alone, which all stand last.
            kept = answers.shape[1] + 1
            logits = tuned(input_ids=ids, attention_mask=mask, logits_to_keep=kept).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            if progress is not None:
                progress(done, len(steps), loss.item())
        tuned.save_pretrained(folder, safe_serialization=True)
    finally:
        torch.set_num_threads(before)
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"training wrote no {WEIGHTS_FILE} into {folder}")


def _row(codec: Any, tokenizer: Any, phrase: Phrase, system_prompt: str) -> _Row:
    """Tokens of a question and of its answer, the turn's end included."""
    asked = (
        Message(role="system", content=system_prompt),
        Message(role="user", content=review_question(phrase.text)),
    )
    answer = tokenizer(phrase.label, add_special_tokens=False)["input_ids"]
    return codec.encode(asked, None), [*answer, tokenizer.eos_token_id]


def _batches(rows: Sequence[_Row], recipe: Recipe) -> list[Sequence[_Row]]:
    """Batches of rows of about the same length, in random order: padding would be a third of the work."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    batches = [ordered[i : i + recipe.batch] for i in range(0, len(ordered), recipe.batch)]
    return [batches[int(i)] for i in np.random.default_rng(recipe.seed).permutation(len(batches))]


def _padded(batch: Sequence[_Row]) -> tuple[Any, Any, Any]:
    """Tokens and mask, shape (batch, longest), filled up on the left; and the answers', shape (batch, longest answer),
    -100 where there is none."""
    import torch

    longest, tail = max(len(q) + len(a) for q, a in batch), max(len(a) for _, a in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    answers = torch.full((len(batch), tail), -100)
    for i, (question, answer) in enumerate(batch):
        both = [*question, *answer]
        ids[i, -len(both) :] = torch.tensor(both)
        mask[i, -len(both) :] = 1
        answers[i, -len(answer) :] = torch.tensor(answer)
    return ids, mask, answers
