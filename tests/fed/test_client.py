"""Training at a client: it learns, from responses only, the same each time, and never further than it was told."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agora.errors import AdapterError, InvalidRequest, ModelError
from fed.adapter import Adapter, Method
from fed.client import AdapterSettings, PeftTrainer, StepTold, TrainingFailed, TrainSettings
from fed.data import Example
from fed.trainer.base import BaseModel
from fed.words import Job, Trainer

WORDS = (" bad", " good")
RATED = [
    Example(prompt=f"the {thing} film is", response=WORDS[i % 2], label=str(i % 2), choices=WORDS)
    for i, thing in enumerate(["poor", "fine", "lazy", "quick", "small and brown", "one and only", "sea", "fox"])
]
FREE = [
    Example(prompt="count please", response="one two three four"),
    Example(prompt="the fox", response="jumps over the lazy dog", system="be quick"),
    Example(prompt="who runs away from the robot, once more?", response="nobody knows"),
]
CLIENTS = {"rated": RATED, "free": FREE, "mixed": RATED + FREE}
METHODS = [Method.LORA, Method.PREFIX, Method.P_TUNING, Method.PROMPT]

Make = Callable[..., PeftTrainer]


@pytest.fixture(scope="module")
def make(llama: Path) -> Make:
    def made(
        method: Method = Method.LORA,
        *,
        on_step: Callable[[StepTold], None] | None = None,
        threads: int | None = None,
        clients: Any = CLIENTS,
        folder: Path = llama,
        adapter: dict[str, Any] | None = None,
        **training: Any,
    ) -> PeftTrainer:
        own: dict[str, Any] = {"rank": 4, "virtual_tokens": 5, "encoder_hidden": 16} | (adapter or {})
        return PeftTrainer.open(
            folder,
            adapter=AdapterSettings(method=method, **own),
            training=TrainSettings(**({"batch": 4, "max_tokens": 120} | training)),
            clients=clients,
            on_step=on_step,
            threads=threads,
        )

    return made


def job(client: str = "mixed", *, seed: int = 0, steps: int | None = 5, rank: int | None = None, id: int = 1) -> Job:
    return Job(id=id, client=client, model="all", version=0, seed=seed, steps=steps, rank=rank)


# -- It learns


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("client", ["rated", "free", "mixed"])
def test_training_lowers_the_loss(make: Make, method: Method, client: str) -> None:
    rate = {Method.LORA: 3e-2, Method.PREFIX: 0.1, Method.P_TUNING: 3e-2, Method.PROMPT: 0.3}[method]
    trainer = make(method, learning_rate=rate, batch=16)
    start = trainer.initial_adapter(0)
    judge = trainer.evaluator(CLIENTS[client])
    before = judge.evaluate(start)
    trained = trainer.train(start, job(client, steps=25))
    after = judge.evaluate(start.plus(trained.delta))
    assert after.loss < 0.7 * before.loss
    assert (trained.examples, trained.steps) == (len(CLIENTS[client]), 25)
    assert trained.metrics["loss_before"] == pytest.approx(before.loss, rel=1e-4)  # one batch holds all rows
    assert trained.metrics["loss_last"] < trained.metrics["loss"] < trained.metrics["loss_before"]
    if client == "rated":
        assert after.accuracy == 1.0 and all(after.correct)


@pytest.mark.parametrize("method", METHODS)
def test_one_small_step_of_plain_gradient_descent_goes_down(make: Make, method: Method) -> None:
    trainer = make(method, learning_rate=1e-2, optimiser="sgd", batch=16, clip=None)
    start = trainer.initial_adapter(0)
    judge = trainer.evaluator(CLIENTS["mixed"])
    trained = trainer.train(start, job(steps=1))
    fallen = judge.evaluate(start).loss - judge.evaluate(start.plus(trained.delta)).loss
    # Taylor: a step of −η·g lowers the loss by η·‖g‖², as long as η is small.
    norm = trained.metrics["grad_norm"]
    assert float(np.linalg.norm(trained.delta)) == pytest.approx(1e-2 * norm, rel=1e-3)
    assert 0 < fallen < 1.2 * 1e-2 * norm**2


# -- From responses only


def own_model(trainer: PeftTrainer) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(trainer.base.folder).eval()


def test_the_loss_is_that_of_the_responses_tokens(make: Make) -> None:
    """Worked out another way: transformers' own loss over whole texts, one at a time, prompts masked by hand."""
    trainer = make()
    model, tokenizer = own_model(trainer), trainer.base.tokenizer
    total, count = 0.0, 0
    for example in FREE:
        turns = [{"role": "system", "content": example.system}] if example.system else []
        turns.append({"role": "user", "content": example.prompt})
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        head = tokenizer(asked)["input_ids"]
        whole = tokenizer(asked + example.response + "<|im_end|>")["input_ids"]
        labels = torch.tensor([[-100] * len(head) + whole[len(head) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([whole]), labels=labels).loss.item()
        total, count = total + loss * (len(whole) - len(head)), count + len(whole) - len(head)
    scores = trainer.evaluator(FREE).evaluate(None)
    assert scores.targets == count
    assert scores.loss == pytest.approx(total / count, rel=1e-5)
    assert scores.perplexity == pytest.approx(float(np.exp(total / count)), rel=1e-4)


def test_the_loss_of_label_words_is_among_the_words(make: Make) -> None:
    trainer = make()
    model, tokenizer = own_model(trainer), trainer.base.tokenizer
    losses, right = [], []
    for example in RATED:
        ids = tokenizer(example.prompt)["input_ids"]
        words = [tokenizer(example.prompt + w)["input_ids"][len(ids)] for w in WORDS]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1, words]
        answer = WORDS.index(example.response)
        losses.append(-torch.log_softmax(logits, 0)[answer].item())
        right.append(int(logits.argmax()) == answer)
    scores = trainer.evaluator(RATED).evaluate(None)
    assert scores.loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert scores.correct == tuple(right) and scores.accuracy == pytest.approx(np.mean(right))
    assert scores.token_accuracy is None


@pytest.mark.parametrize("method", METHODS)
def test_rows_in_a_batch_do_not_see_each_other(make: Make, method: Method) -> None:
    """Filling up must change nothing, wherever the virtual tokens stand."""
    trainer = make(method)
    start = trainer.initial_adapter(3)
    start = start.plus(np.random.default_rng(0).normal(0, 0.1, start.spec.size).astype(np.float32))
    together = trainer.evaluator(CLIENTS["mixed"]).evaluate(start)
    alone = [trainer.evaluator([e]).evaluate(start) for e in CLIENTS["mixed"]]
    assert together.targets == sum(a.targets for a in alone)
    assert together.loss == pytest.approx(sum(a.loss * a.targets for a in alone) / together.targets, rel=1e-5)
    assert together.correct == tuple(a.correct[0] for a in alone)


def test_an_untrained_lora_is_the_base_model(make: Make) -> None:
    trainer = make()
    judge = trainer.evaluator(CLIENTS["mixed"])
    assert judge.evaluate(trainer.initial_adapter(0)) == judge.evaluate(None)


@pytest.mark.parametrize("method", [Method.PREFIX, Method.PROMPT])
def test_a_soft_prompt_starts_as_the_text_it_was_given(make: Make, method: Method) -> None:
    """Keys and values of tokens, or their embeddings, are what the model would have made of the text itself."""
    text = "one two three"
    count = len(make().base.tokenizer(text)["input_ids"])
    trainer = make(method, adapter={"init_text": text, "virtual_tokens": count}, chat=False)
    prompt = Example(prompt=" four", response=" five", choices=(" five", " six"))
    after_text = dataclasses.replace(prompt, prompt=text + prompt.prompt)
    start = trainer.initial_adapter(0)
    soft = trainer.evaluator([prompt]).evaluate(start)
    assert soft.loss == pytest.approx(trainer.evaluator([after_text]).evaluate(None).loss, rel=1e-4)
    assert soft.loss != pytest.approx(trainer.evaluator([prompt]).evaluate(None).loss, rel=1e-2)


# -- The same each time


@pytest.mark.parametrize("method", METHODS)
def test_the_same_job_gives_the_same_bytes_whatever_came_between(make: Make, method: Method) -> None:
    lora = {"dropout": 0.2} if method is Method.LORA else {}
    trainer = make(method, adapter=lora)
    start = trainer.initial_adapter(0)
    first = trainer.train(start, job(seed=7))
    trainer.train(start.plus(first.delta), job("free", seed=1, id=2))
    trainer.evaluator(RATED).evaluate(None)
    if method is Method.LORA:
        trainer.train(trainer.initial_adapter(0, rank=2), job(rank=2, id=3))
    torch.manual_seed(99)
    again = trainer.train(start, job(seed=7))
    assert again.delta.tobytes() == first.delta.tobytes()
    assert make(method, adapter=lora).train(start, job(seed=7)).delta.tobytes() == first.delta.tobytes()
    other = trainer.train(start, job(seed=8))
    assert other.delta.tobytes() != first.delta.tobytes()


def digest(folder: Path) -> str:
    """What a job comes to; run here and in a process of its own."""
    words = (" bad", " good")
    rows = [Example(prompt=f"film {i} is", response=words[i % 2], choices=words) for i in range(8)]
    trainer = PeftTrainer.open(
        folder,
        adapter=AdapterSettings(rank=4, dropout=0.1),
        training=TrainSettings(batch=4, max_tokens=64),
        clients={"a": rows},
        threads=1,
    )
    start = trainer.initial_adapter(0)
    trained = trainer.train(start, Job(id=1, client="a", model="all", version=0, seed=5, steps=4))
    return hashlib.sha256(start.flat.tobytes() + trained.delta.tobytes()).hexdigest()


def test_the_same_job_gives_the_same_bytes_in_another_process(llama: Path, make: Make) -> None:
    imports = """
import hashlib, sys
from pathlib import Path
from fed.client import AdapterSettings, PeftTrainer, TrainSettings
from fed.data import Example
from fed.words import Job
"""
    script = f"{imports}\n{inspect.getsource(digest)}\nprint(digest(Path(sys.argv[1])))"
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(llama)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert there.returncode == 0, there.stderr
    trainer = make()
    trainer.train(trainer.initial_adapter(0), job())
    assert there.stdout.strip() == digest(llama)


def test_the_callers_random_numbers_and_threads_are_left_alone(make: Make) -> None:
    trainer = make(threads=1)
    before = torch.get_num_threads()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    trainer.train(trainer.initial_adapter(0), job())
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == before


def test_threads_take_turns(make: Make) -> None:
    trainer = make()
    start = trainer.initial_adapter(0)
    jobs = {c: job(c, id=i) for i, c in enumerate(CLIENTS)}
    expected = {c: trainer.train(start, j).delta.tobytes() for c, j in jobs.items()}
    found: dict[str, bytes] = {}

    def work(client: str) -> None:
        found[client] = trainer.train(start, jobs[client]).delta.tobytes()

    threads = [threading.Thread(target=work, args=(c,)) for c in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == expected


def test_an_interrupted_job_leaves_nothing_behind(make: Make) -> None:
    told: list[StepTold] = []

    def stop(step: StepTold) -> None:
        told.append(step)
        if step.job.id == 13 and step.step == 2:
            raise KeyboardInterrupt

    trainer = make(on_step=stop)
    start = trainer.initial_adapter(0)
    expected = trainer.train(start, job())
    assert [(t.step, t.steps) for t in told] == [(i, 5) for i in range(1, 6)]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(start, job(seed=3, id=13))
    assert trainer.train(start, job()).delta.tobytes() == expected.delta.tobytes()


# -- How far


def test_fedprox_pulls_towards_the_start(make: Make) -> None:
    start = make().initial_adapter(0)
    norms = [
        float(
            np.linalg.norm(
                make(mu=mu, optimiser="sgd", learning_rate=0.05, clip=None).train(start, job(steps=20)).delta
            )
        )
        for mu in (0.0, 1.0, 10.0)
    ]
    assert norms[2] < norms[1] < norms[0]


def test_fedprox_is_its_formula(make: Make) -> None:
    """w₁ = w₀ − η·g₀ with or without μ; w₂ = w₁ − η·(g₁ + μ·(w₁ − w₀))."""

    def train(mu: float, steps: int) -> Any:
        trainer = make(mu=mu, optimiser="sgd", learning_rate=0.1, clip=None, batch=16)
        return trainer.train(trainer.initial_adapter(0), job(steps=steps)).delta

    first = train(0.0, 1)
    assert train(0.5, 1).tobytes() == first.tobytes()
    np.testing.assert_allclose(train(0.5, 2), train(0.0, 2) - 0.1 * 0.5 * first, atol=1e-6)


def test_gradients_are_clipped(make: Make) -> None:
    trainer = make(optimiser="sgd", learning_rate=1.0, clip=0.01)
    trained = trainer.train(trainer.initial_adapter(0), job(steps=1))
    assert float(np.linalg.norm(trained.delta)) == pytest.approx(0.01, rel=1e-2)
    assert trained.metrics["grad_norm"] > 0.02  # told as it was before


def test_steps_come_from_the_job_then_the_settings_then_the_epochs(make: Make) -> None:
    trainer = make(steps=3)
    start = trainer.initial_adapter(0)
    assert trainer.train(start, job(steps=2)).steps == 2
    assert trainer.train(start, job(steps=None)).steps == 3
    assert make(epochs=2.0).train(start, job("rated", steps=None)).steps == 4  # 8 rows in batches of 4, twice


def test_the_rate_rises_and_falls_as_told() -> None:
    plan = TrainSettings(warmup=3, decay="linear")
    rates = [plan.rate(s, 10, 1.0) for s in range(10)]
    assert rates[:3] == [0.25, 0.5, 0.75] and rates[3] == 1.0
    assert all(a > b > 0 for a, b in pairwise(rates[3:]))
    assert TrainSettings().rate(9, 10, 1e-3) == 1e-3


def test_a_frozen_a_stays(make: Make) -> None:
    trainer = make(freeze_a=True)
    start = trainer.initial_adapter(0)
    delta = Adapter(start.spec, trainer.train(start, job()).delta)
    for _, b, a in delta.factors():
        assert not a.any() and b.any()
    thawed = make().train(start, job()).delta
    assert all(a.any() for _, _, a in Adapter(start.spec, thawed).factors())
    with pytest.raises(InvalidRequest, match="freeze_a is for LoRA"):
        make(Method.PROMPT, freeze_a=True)


def test_bf16_trains_nearly_the_same(make: Make) -> None:
    start = make().initial_adapter(0)
    one = make(optimiser="sgd", learning_rate=0.1).train(start, job()).delta
    two = make(optimiser="sgd", learning_rate=0.1, bf16=True).train(start, job()).delta
    assert two.dtype == np.float32
    assert float(one @ two / np.linalg.norm(one) / np.linalg.norm(two)) > 0.95


# -- Ranks


def test_clients_of_other_ranks_share_the_base_model(make: Make) -> None:
    trainer = make(learning_rate=1e-2)
    base = trainer.base.model
    for rank in (1, 8, 4, 2, 8):
        start = trainer.initial_adapter(0, rank=rank)
        assert start.spec.rank == rank and start.spec.alpha == trainer.spec().alpha
        trained = trainer.train(start, job("rated", rank=rank, steps=8))
        assert trained.delta.shape == (start.spec.size,)
        judge = trainer.evaluator(RATED)
        assert judge.evaluate(start.plus(trained.delta)).loss < judge.evaluate(start).loss
    assert trainer.base.model is base


def test_ranks_are_scaled_by_their_spec(make: Make) -> None:
    """B·A padded with zeros to a higher rank, B scaled by the ratio of the scalings, is the same adapter."""
    for rslora in (False, True):
        trainer = make(adapter={"rslora": rslora})
        small = trainer.initial_adapter(0, rank=2)
        small = small.plus(np.random.default_rng(1).normal(0, 0.2, small.spec.size).astype(np.float32))
        large = trainer.spec(6)
        tensors: dict[str, Any] = {}
        for name, b, a in small.factors():
            ratio = small.spec.scaling / large.scaling
            tensors[f"{name}.lora_A"] = np.pad(a, ((0, 4), (0, 0)))
            tensors[f"{name}.lora_B"] = np.pad(b * ratio, ((0, 0), (0, 4)))
        judge = trainer.evaluator(CLIENTS["mixed"])
        padded = judge.evaluate(Adapter.from_tensors(large, tensors))
        assert padded.loss == pytest.approx(judge.evaluate(small).loss, rel=1e-5)
        assert padded.loss != pytest.approx(judge.evaluate(None).loss, rel=1e-3)


def test_targets_are_the_layers_that_were_named(make: Make) -> None:
    spec = make(adapter={"targets": ("o_proj", "model.layers.1.mlp.up_proj")}).spec()
    assert list(spec.layers) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    assert len(make(adapter={"targets": ("all-linear",)}).spec().layers) == 14


def test_layers_with_transposed_weights_are_trained(tmp_path: Path, llama: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=343, n_embd=24, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2)
    ).save_pretrained(tmp_path / "gpt2")
    for method in METHODS:
        trainer = PeftTrainer.open(
            tmp_path / "gpt2",
            adapter=AdapterSettings(method=method, targets=("c_attn",), rank=4, virtual_tokens=3, encoder_hidden=8),
            training=TrainSettings(max_tokens=64, learning_rate=1e-2),
            clients=CLIENTS,
        )
        start = trainer.initial_adapter(0)
        trained = start.plus(trainer.train(start, job("rated", steps=10)).delta)
        judge = trainer.evaluator(RATED)
        assert judge.evaluate(trained).loss < judge.evaluate(start).loss
        folder = trainer.save(trained, tmp_path / str(method))
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("gpt2")
        ids = torch.tensor([[5, 60, 7]])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2"), folder).eval()
            trainer.evaluator(RATED).evaluate(trained)
            live: Any = trainer._live._model
            assert torch.equal(loaded(input_ids=ids).logits, live(input_ids=ids).logits)


# -- Bad input


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"targets": ("q_proj", "query")}, r"no linear layer 'query'; allowed: down_proj, gate_proj, k_proj, o_proj"),
        ({"targets": ()}, "no target layers"),
        ({"rank": 0}, "rank is 0; allowed: whole numbers from 1 to 256"),
        ({"rank": 17}, r"rank 17 on model.layers.0.self_attn.v_proj, which is 48→16; allowed: up to 16"),
        ({"rank": 4.5}, "rank is 4.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"method": "adapters"}, r"method is 'adapters'; allowed: lora, prefix, p_tuning, prompt"),
        ({"method": "dense"}, r"method is 'dense'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"virtual_tokens": 0}, "virtual_tokens is 0"),
        ({"method": Method.PREFIX, "virtual_tokens": 256}, "256 virtual tokens for a model that reads 256"),
    ],
)
def test_impossible_adapters_are_refused_before_training(make: Make, adapter: dict[str, Any], told: str) -> None:
    method = adapter.pop("method", Method.LORA) if "method" in adapter else Method.LORA
    with pytest.raises(InvalidRequest, match=told):
        make(method, adapter=adapter)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"mu": -0.1}, "mu is -0.1; allowed: from 0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"optimiser": "lion"}, "optimiser is 'lion'; allowed: adamw, sgd"),
        ({"decay": "cosine"}, "decay is 'cosine'; allowed: constant, linear"),
        ({"max_tokens": 257}, "rows of up to 257 tokens and 0 virtual ones for a model that reads 256"),
    ],
)
def test_impossible_settings_are_refused_before_training(make: Make, training: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        make(**training)


def test_clients_without_rows_are_refused(make: Make) -> None:
    long = Example(prompt="one two three " * 60, response="four")
    trainer = make(clients={"empty": [], "long": [long, long]})
    start = trainer.initial_adapter(0)
    with pytest.raises(InvalidRequest, match="client 'empty' has no rows to train on"):
        trainer.train(start, job("empty"))
    with pytest.raises(InvalidRequest, match="client 'long' has no rows to train on: all 2 prompts have 120 tokens"):
        trainer.check("long")
    with pytest.raises(InvalidRequest, match="no client 'nobody'"):
        trainer.train(start, job("nobody"))
    with pytest.raises(InvalidRequest, match="none of 0 examples"):
        trainer.evaluator([])


def test_an_adapter_of_another_kind_is_refused(make: Make, plain_llama: Path) -> None:
    trainer = make()
    with pytest.raises(AdapterError, match="method is 'prompt'; this model trains 'lora'"):
        trainer.train(make(Method.PROMPT).initial_adapter(0), job())
    with pytest.raises(AdapterError, match="adapter's base is"):
        trainer.train(make(folder=plain_llama).initial_adapter(0), job())
    with pytest.raises(AdapterError, match=r"adapter's alpha is '3\.0'; this model trains '16\.0'"):
        trainer.evaluator(RATED).evaluate(make(adapter={"alpha": 3.0}).initial_adapter(0))
    with pytest.raises(AdapterError, match="job 1 is of rank 2, but starts from an adapter of rank 4"):
        trainer.train(trainer.initial_adapter(0), job(rank=2))
    with pytest.raises(
        AdapterError, match=r"tensor 'model\.layers\.0\.self_attn\.q_proj\.lora_A' is None; this model has"
    ):
        trainer.train(make(adapter={"targets": ("v_proj",)}).initial_adapter(0), job())
    with pytest.raises(InvalidRequest, match="rank 3 for prompt, which has none"):
        make(Method.PROMPT).spec(3)
    with pytest.raises(InvalidRequest, match="rank 0; allowed"):
        trainer.spec(0)


def test_training_that_runs_away_is_told(make: Make) -> None:
    trainer = make(learning_rate=1e30, clip=None)
    with pytest.raises(TrainingFailed, match=r"job 1 of 'mixed'.*lower learning rate than 1e\+30"):
        trainer.train(trainer.initial_adapter(0), job(steps=20))


def test_a_folder_without_a_usable_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        BaseModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be loaded"):
        BaseModel.load(tmp_path)
    for bad in ({"dtype": "int8"}, {"device": "abacus"}):
        with pytest.raises(InvalidRequest, match="allowed"):
            BaseModel.load(tmp_path, **bad)


def test_rows_that_are_too_long_do_not_count(make: Make) -> None:
    trainer: Trainer = make(clients={"a": [*RATED, Example(prompt="one two three " * 60, response="four")]})
    start = make().initial_adapter(0)
    assert trainer.train(start, job("a", steps=1)).examples == len(RATED)


def test_metrics_are_numbers_and_tell_no_data(make: Make) -> None:
    trainer = make()
    metrics = trainer.train(trainer.initial_adapter(0), job(steps=2)).metrics
    assert set(metrics) == {"loss", "loss_before", "loss_last", "grad_norm", "tokens", "seconds"}
    assert all(isinstance(v, float) and np.isfinite(v) for v in metrics.values())
    rows = trainer.check("rated").rows
    told = make(batch=8).train(trainer.initial_adapter(0), job("rated", steps=1)).metrics["tokens"]
    assert told == sum(len(r.tokens) for r in rows)
