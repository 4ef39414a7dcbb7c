"""A real model learns to judge sentences, and what was learned is loaded by peft."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.adapters import check_adapter
from experts.models import ModelStore
from fed.client import AdapterSettings, PeftTrainer, TrainSettings
from fed.data import GLUE, Example
from fed.peft_folder import read_folder, write_folder
from fed.words import Job

GOOD = ("a joy", "warm and funny", "truly moving", "simply wonderful", "smart , tender and bold", "a small miracle")
BAD = ("a bore", "cold and silly", "truly tiresome", "simply awful", "lazy , loud and long", "a waste of time")
UNSEEN = (("a delight", 1), ("dull and stale", 0), ("fresh and charming", 1), ("painful to watch", 0))


def rated() -> list[Example]:
    reader = GLUE["sst2"].template().reader()
    return [reader.read({"sentence": s, "label": n}, "here") for n, side in enumerate((BAD, GOOD)) for s in side]


@pytest.mark.model
def test_a_real_model_learns_and_is_loaded_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = ModelStore().resolve("smollm2-135m", pull=True)
    rows = rated()
    trainer = PeftTrainer.open(
        base,
        adapter=AdapterSettings(rank=8),
        training=TrainSettings(batch=12, max_tokens=64),
        clients={"a": rows},
        threads=1,
    )
    start = trainer.initial_adapter(0)
    assert start.spec.size == 30 * (8 * (576 + 576) + 8 * (576 + 192))  # q and v, which has a third of the heads
    job = Job(id=1, client="a", model="all", version=0, seed=0, steps=5)
    trained = trainer.train(start, job)
    judge = trainer.evaluator(rows)
    before, after = judge.evaluate(None), judge.evaluate(start.plus(trained.delta))
    assert after.loss < 0.5 * before.loss and after.accuracy == 1.0
    one, two = (trainer.train(start, replace(job, steps=1)).delta.tobytes() for _ in range(2))
    assert one == two

    reader = GLUE["sst2"].template().reader()
    unseen = [reader.read({"sentence": s, "label": n}, "here") for s, n in UNSEEN]
    assert trainer.evaluator(unseen).evaluate(start.plus(trained.delta)).accuracy == 1.0

    folder = write_folder(start.plus(trained.delta), tmp_path / "a", base=base)
    assert check_adapter(folder, trainer.base.model).rank == 8
    assert read_folder(folder, like=trainer.spec()).flat.tobytes() == start.plus(trained.delta).flat.tobytes()
    ids = torch.tensor([trainer.base.tokenizer(unseen[0].prompt)["input_ids"]])
    with torch.no_grad():
        live: Any = trainer._live._model
        expected = live(input_ids=ids).logits
        model = AutoModelForCausalLM.from_pretrained(base)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            found = PeftModel.from_pretrained(model, folder).eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
