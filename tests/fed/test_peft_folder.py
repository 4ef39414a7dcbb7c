"""Folders that peft loads and that answer exactly as the trained model did; and folders read back without trust."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agora.errors import AdapterError
from experts.adapters import CONFIG_FILE, WEIGHTS_FILE, check_adapter
from fed.adapter import Adapter, Method, Spec
from fed.client import AdapterSettings, PeftTrainer, TrainSettings
from fed.data import Example
from fed.peft_folder import ENCODER_FILE, read_folder, write_folder
from fed.words import Job

WORDS = (" bad", " good")
ROWS = [Example(prompt=f"{p} film", response=WORDS[i % 2], choices=WORDS) for i, p in enumerate(["poor", "fine"] * 4)]
METHODS = [Method.LORA, Method.PREFIX, Method.P_TUNING, Method.PROMPT]

Trained = Callable[[Method], tuple[PeftTrainer, Adapter]]


@pytest.fixture(scope="module")
def trained(llama: Path) -> Trained:
    """A trainer and an adapter that it trained, each made once."""
    made: dict[Method, tuple[PeftTrainer, Adapter]] = {}

    def of(method: Method) -> tuple[PeftTrainer, Adapter]:
        if method not in made:
            trainer = PeftTrainer.open(
                llama,
                adapter=AdapterSettings(method=method, rank=4, rslora=True, virtual_tokens=5, encoder_hidden=16),
                training=TrainSettings(learning_rate=3e-2, max_tokens=64),
                clients={"a": ROWS},
            )
            start = trainer.initial_adapter(0)
            job = Job(id=1, client="a", model="all", version=0, seed=0, steps=6)
            made[method] = trainer, start.plus(trainer.train(start, job).delta)
        return made[method]

    return of


def peft_model(base: Path, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        # peft asks transformers by a name that it is about to drop; of its own warnings none is expected.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("method", METHODS)
def test_peft_answers_as_the_trained_model_did(trained: Trained, method: Method, tmp_path: Path) -> None:
    trainer, adapter = trained(method)
    folder = write_folder(adapter, tmp_path / "a", base=trainer.base.folder)
    ids = torch.tensor([[5, 60, 7, 200, 9, 31]])
    loaded = peft_model(trainer.base.folder, folder)
    with torch.no_grad():
        found = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        trainer.evaluator(ROWS).evaluate(adapter)  # puts it on
        live: Any = trainer._live._model
        expected = live(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with live.disable_adapter():
            bare = live(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert (found[:, -6:] - bare).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_read_back(trained: Trained, method: Method, tmp_path: Path) -> None:
    trainer, adapter = trained(method)
    folder = write_folder(adapter, tmp_path / "a")
    for read in (read_folder(folder), read_folder(folder, like=trainer.spec())):
        assert read.spec == adapter.spec and list(read.spec.shapes) == list(adapter.spec.shapes)
        assert read.flat.tobytes() == adapter.flat.tobytes()
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] is None and config["inference_mode"] is True
    assert (
        write_folder(adapter, tmp_path / "b")
        and (tmp_path / "b" / CONFIG_FILE).read_bytes() == (folder / CONFIG_FILE).read_bytes()
    )


def test_a_lora_folder_passes_the_checks_of_serving(trained: Trained, tmp_path: Path) -> None:
    trainer, adapter = trained(Method.LORA)
    folder = write_folder(adapter, tmp_path / "a", base="somebody/some-model")
    info = check_adapter(folder, trainer.base.model)
    assert (info.rank, info.modules, info.parameters) == (4, tuple(adapter.spec.layers), adapter.spec.size)
    assert info.base_model == "somebody/some-model"


def test_what_peft_saved_is_read(trained: Trained, tmp_path: Path) -> None:
    trainer, adapter = trained(Method.LORA)
    folder = write_folder(adapter, tmp_path / "a", base=trainer.base.folder)
    peft_model(trainer.base.folder, folder).save_pretrained(tmp_path / "theirs")
    read = read_folder(tmp_path / "theirs", like=trainer.spec())
    assert read.flat.tobytes() == adapter.flat.tobytes()
    assert read_folder(tmp_path / "theirs").spec.base == ""


def test_p_tuning_needs_its_encoder_to_go_on(trained: Trained, tmp_path: Path) -> None:
    trainer, adapter = trained(Method.P_TUNING)
    folder = write_folder(adapter, tmp_path / "a", base=trainer.base.folder)
    (folder / ENCODER_FILE).unlink()
    peft_model(trainer.base.folder, folder)
    with pytest.raises(AdapterError, match=f"holds no {ENCODER_FILE}"):
        read_folder(folder)


def test_nothing_is_written_over(trained: Trained, tmp_path: Path) -> None:
    _, adapter = trained(Method.PROMPT)
    (tmp_path / "empty").mkdir()
    write_folder(adapter, tmp_path / "empty")
    with pytest.raises(AdapterError, match="is there already"):
        write_folder(adapter, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is there already"):
        write_folder(adapter, tmp_path / "file")
    with pytest.raises(AdapterError, match="cannot be written"):
        write_folder(adapter, tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_what_has_no_form_in_peft_is_refused(trained: Trained, tmp_path: Path) -> None:
    dense = Adapter.zeros(Spec(method=Method.DENSE, shapes={"w": (2, 2)}))
    with pytest.raises(AdapterError, match="no form in peft"):
        write_folder(dense, tmp_path / "a")
    _, adapter = trained(Method.LORA)
    spoilt = adapter.flat.copy()
    spoilt[3] = np.nan
    with pytest.raises(AdapterError, match="not finite"):
        write_folder(Adapter(adapter.spec, spoilt), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        (Method.LORA, {"peft_type": "LOHA"}, "peft_type is 'LOHA'; allowed: LORA, PREFIX_TUNING"),
        (Method.LORA, {"alpha_pattern": {"q_proj": 3}}, "layers of alpha 3, 16"),
        (Method.LORA, {"use_dora": True}, "use_dora"),
        (Method.LORA, {"r": 8}, "rank"),
        (Method.LORA, {"lora_alpha": 3}, "alpha is '3.0'; expected '16.0'"),
        (Method.PROMPT, {"num_virtual_tokens": 4}, "5 virtual tokens in adapter_model.safetensors, but 4"),
        (Method.PROMPT, {"num_virtual_tokens": None}, "num_virtual_tokens is None"),
        (Method.PROMPT, {"peft_type": "PREFIX_TUNING", "num_layers": 5, "num_attention_heads": 7}, "no 5 layers"),
        (Method.PREFIX, {"num_attention_heads": 4}, "'prefix' is"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    trained: Trained, tmp_path: Path, method: Method, changes: dict[str, Any], told: str
) -> None:
    trainer, adapter = trained(method)
    folder = write_folder(adapter, tmp_path / "a")
    change_config(folder, **changes)
    with pytest.raises(AdapterError, match=told):
        read_folder(folder, like=trainer.spec())


@pytest.mark.parametrize("method", METHODS)
def test_damaged_folders_are_refused(trained: Trained, tmp_path: Path, method: Method) -> None:
    _, adapter = trained(method)
    folder = write_folder(adapter, tmp_path / "a")
    weights = folder / (ENCODER_FILE if method is Method.P_TUNING else WEIGHTS_FILE)
    whole = weights.read_bytes()
    tensors = load_file(weights)
    for size in (0, 7, 40, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(AdapterError):
            read_folder(folder)
    name = next(iter(tensors))
    for spoilt in (torch.full_like(tensors[name], float("inf")), tensors[name].to(torch.int32), tensors[name][:-1]):
        save_file(tensors | {name: spoilt.contiguous()}, weights)
        with pytest.raises(AdapterError):
            read_folder(folder)
    save_file({"other": torch.zeros(2, 2)}, weights)
    with pytest.raises(AdapterError):
        read_folder(folder)
    weights.write_bytes(whole)
    read_folder(folder)
    for text in ("{broken", "[]", "[" * 10_000, " " * (2**20 + 1)):
        (folder / CONFIG_FILE).write_text(text)
        with pytest.raises(AdapterError):
            read_folder(folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(AdapterError):
        read_folder(folder)


def test_pickles_are_refused(trained: Trained, tmp_path: Path) -> None:
    for method in (Method.LORA, Method.PROMPT):
        folder = write_folder(trained(method)[1], tmp_path / method)
        (folder / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(AdapterError, match="run code when it is read"):
            read_folder(folder)


def test_an_adapter_of_another_base_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    trainer, adapter = trained(Method.PROMPT)
    other = Spec.from_json(adapter.spec.to_json() | {"base": "0" * 64})
    folder = write_folder(Adapter(other, adapter.flat), tmp_path / "a")
    with pytest.raises(AdapterError, match="base is '0000"):
        read_folder(folder, like=trainer.spec())
