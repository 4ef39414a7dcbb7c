"""What does batching bring, and does it cost anything where it brings nothing?

Sixteen requests are answered by `LocalBackend` one after another and together. So that the gain is not bought by a slow
start, the same requests also go through transformers' own `generate`, alone and as one static left-padded batch. All
variants take turns within a round, because other programs share the machine, and each figure is the best of its rounds:
disturbance only ever slows down. The medians are told too. One round takes half of the sequence, the next the other.

Where they are installed, llama.cpp and vLLM then get the same prompts, one after another and together, each with the
machine to itself. vLLM takes a minute to start, so `--quick` leaves it out unless `--vllm` asks for it.

    python -m benchmarks.batching [--quick] [--json] [--model ALIAS_OR_FOLDER] [--dtype float32] [--threads N] [--vllm]
"""

# ruff: noqa: E402 - see SPIN_COUNT

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

# Read when torch is loaded. By default the threads of one operation wait for each other by spinning for milliseconds;
# where another program holds the core that one of them needs, every operation of every variant then takes a whole time
# slice. Spinning 30 times shorter costs nothing on a free machine (40.7 against 41.3 ms per decode step) and makes a
# disturbed step 8 times faster (228 against 1940 ms).
SPIN_COUNT: Final = os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from agora.errors import BackendError, ModelError, Unavailable
from agora.protocols import Backend, GenerateRequest
from benchmarks.common import facts, parser, run, show
from experts.loading import loading
from experts.local import LocalBackend
from experts.models import ModelStore

PROMPTS: Final = (
    "Once upon a time there was a small robot who lived by the sea. Every morning it",
    "The history of the city begins with a river. When the first people came to the valley, they",
    "Photosynthesis is the process by which plants",
    "In this chapter we look at how the heart works. The heart is a muscle that",
    "Dear Anna, I am writing to you from a small village in the mountains, where the snow",
    "There are many ways to bake bread. The simplest one needs only flour, water, salt and",
    "The train left the station at seven. In the last carriage sat an old man who",
    "A computer network is a group of machines that",
    "The lighthouse keeper climbed the stairs, as he had done every night for thirty years, and",
    "To learn a new language, you should first",
    "Interest rates matter to everybody who borrows or saves money, because",
    "The dog looked at the cat. The cat looked at the dog. Then, without a sound,",
    "Volcanoes are openings in the crust of the Earth through which",
    "My grandmother used to say that a good story needs three things: a beginning, a middle and",
    "Robots in hospitals can carry medicine, clean floors and",
    "When the two radio towers on the hill were switched on for the first time, everybody in the town",
)
"""Openings that a model goes on with for long: an early end would make the variants unequal."""

TOKENS: Final = 48
QUICK_TOKENS: Final = 12
ROUNDS: Final = 8
QUICK_ROUNDS: Final = 2
HALF: Final = len(PROMPTS) // 2
PLAIN_EVERY: Final = 4
"""Every fourth request of the sequence is also given to plain `generate`, right after `LocalBackend` answered it."""
LAG_PROBE_S: Final = 0.005
ENGINE_ROUNDS: Final = 2
"""Rounds of each other engine: the first takes one half of the sequence, the second the other."""
ENGINE_CONTEXT: Final = 2048
"""Context of vLLM, which sets memory aside for it; the prompts and answers here are 20 times shorter."""


class Plain:
    """transformers' own `generate`, as a user would call it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        with loading(folder):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=getattr(torch, dtype), use_safetensors=True
            )
        self.model = model.eval()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def generate(self, prompts: list[str], tokens: int) -> tuple[int, list[str]]:
        """Tokens generated, and the texts."""
        with torch.inference_mode():
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
            out = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            new = out[:, inputs["input_ids"].shape[1] :].tolist()
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        eos = self.tokenizer.eos_token_id
        return sum(n.index(eos) + 1 if eos in n else len(n) for n in new), texts


async def worst_lag(stop: asyncio.Event) -> float:
    """99th percentile, in seconds, of how late the event loop wakes a sleeper."""
    loop = asyncio.get_running_loop()
    late = []
    while not stop.is_set():
        due = loop.time() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        late.append(max(0.0, loop.time() - due))
    return statistics.quantiles(late, n=100)[-1] if len(late) > 1 else 0.0


async def one_round(backend: LocalBackend, plain: Plain, tokens: int, first: int) -> dict[str, Any]:
    """Tokens per second of every variant, and whether they said the same; the sequence starts at prompt `first`."""
    requests = [GenerateRequest(prompt=p, max_tokens=tokens) for p in PROMPTS]
    spent: dict[str, float] = defaultdict(float)
    made: dict[str, int] = defaultdict(int)
    texts, same = {}, []
    for n in range(first, first + HALF):
        start = time.perf_counter()
        answer = await backend.generate(requests[n])
        seconds = time.perf_counter() - start
        texts[n] = answer.text
        spent["sequential"] += seconds
        made["sequential"] += answer.usage.completion_tokens
        if n % PLAIN_EVERY == 0:
            spent["alone"] += seconds
            made["alone"] += answer.usage.completion_tokens
            start = time.perf_counter()
            count, (text,) = plain.generate([PROMPTS[n]], tokens)
            spent["plain_generate"] += time.perf_counter() - start
            made["plain_generate"] += count
            same.append(text == answer.text)
    stop = asyncio.Event()
    lag = asyncio.create_task(worst_lag(stop))
    start = time.perf_counter()
    answers = await asyncio.gather(*(backend.generate(r) for r in requests))
    spent["together"] = time.perf_counter() - start
    stop.set()
    made["together"] = sum(a.usage.completion_tokens for a in answers)
    start = time.perf_counter()
    made["static_batch"], _ = plain.generate(list(PROMPTS), tokens)
    spent["static_batch"] = time.perf_counter() - start
    return {
        "speed": {name: made[name] / spent[name] for name in spent},
        "lag": await lag,
        "together_as_alone": sum(answers[n].text == text for n, text in texts.items()) / len(texts),
        "alone_as_plain": sum(same) / len(same),
    }


async def measure(folder: Path, *, dtype: str, threads: int | None, quick: bool) -> dict[str, Any]:
    """The result of the benchmark."""
    tokens = QUICK_TOKENS if quick else TOKENS
    if threads is not None:
        torch.set_num_threads(threads)
    async with await LocalBackend.open(folder, dtype=dtype, threads=threads, max_batch=len(PROMPTS)) as backend:
        plain = Plain(folder, dtype)
        # One unmeasured answer each, alone and together: the first call of any kind pays for what later ones reuse.
        await asyncio.gather(*(backend.generate(GenerateRequest(prompt=p, max_tokens=2)) for p in PROMPTS))
        plain.generate(list(PROMPTS), 2)
        rounds = [
            await one_round(backend, plain, tokens, n % 2 * HALF) for n in range(QUICK_ROUNDS if quick else ROUNDS)
        ]
    best = {name: max(r["speed"][name] for r in rounds) for name in rounds[0]["speed"]}
    middle = {name: statistics.median(r["speed"][name] for r in rounds) for name in best}
    return {
        "benchmark": "batching",
        "model": backend.model,
        "dtype": dtype,
        "threads": threads or torch.get_num_threads(),
        "gomp_spincount": SPIN_COUNT,
        "requests": len(PROMPTS),
        "tokens_per_request": tokens,
        "rounds": len(rounds),
        "figure": "best of rounds",
        "tokens_per_s": {name: round(speed, 1) for name, speed in best.items()},
        "tokens_per_s_median": {name: round(speed, 1) for name, speed in middle.items()},
        **ratios(best),
        "median": ratios(middle),
        "loop_lag_p99_ms": round(1e3 * min(r["lag"] for r in rounds), 1),
        "together_as_alone": min(r["together_as_alone"] for r in rounds),
        "alone_as_plain_generate": min(r["alone_as_plain"] for r in rounds),
        **facts(),
    }


def ratios(speed: dict[str, float]) -> dict[str, float]:
    """The three ratios the goals are about."""
    return {
        "gain": round(speed["together"] / speed["sequential"], 2),
        "alone_over_plain_generate": round(speed["alone"] / speed["plain_generate"], 2),
        "together_over_static_batch": round(speed["together"] / speed["static_batch"], 2),
    }


async def open_llamacpp(args: argparse.Namespace, folder: Path) -> Backend:
    """llama.cpp on the GGUF file that the model's folder was made from.

    Raises:
        ModelError: If llama-cpp-python is not installed, or there is no such file.
    """
    from experts.llamacpp import LlamaCppBackend

    file = ModelStore().gguf_path(args.model)
    return await LlamaCppBackend.open(file, threads=args.threads, max_batch=len(PROMPTS))


async def open_vllm(args: argparse.Namespace, folder: Path) -> Backend:
    """A vLLM server on the model's folder.

    Raises:
        ModelError: If there is no interpreter with vLLM.
        Unavailable: If it does not get ready.
    """
    if args.quick and not args.vllm:
        raise ModelError("left out: it takes a minute to start", hint="ask for it with --vllm")
    from experts.vllm import VLLMBackend

    threads = {} if args.threads is None else {"VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}"}
    return await VLLMBackend.start(folder, dtype=args.dtype, max_context=ENGINE_CONTEXT, env=threads)


ENGINES: Final = {"llamacpp": open_llamacpp, "vllm": open_vllm}


async def engine_speed(backend: Backend, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of one engine, alone on the machine; best of its rounds."""
    requests = [GenerateRequest(prompt=p, max_tokens=tokens) for p in PROMPTS]
    await asyncio.gather(*(backend.generate(GenerateRequest(prompt=p, max_tokens=2)) for p in PROMPTS))
    best: dict[str, float] = defaultdict(float)
    model = ""
    for n in range(rounds):
        first = n % 2 * HALF
        start = time.perf_counter()
        alone = [await backend.generate(r) for r in requests[first : first + HALF]]
        speed = sum(a.usage.completion_tokens for a in alone) / (time.perf_counter() - start)
        best["sequential"] = max(best["sequential"], speed)
        start = time.perf_counter()
        answers = await asyncio.gather(*(backend.generate(r) for r in requests))
        speed = sum(a.usage.completion_tokens for a in answers) / (time.perf_counter() - start)
        best["together"] = max(best["together"], speed)
        model = answers[0].model
    return {
        "model": model,
        "rounds": rounds,
        "tokens_per_s": {how: round(speed, 1) for how, speed in best.items()},
        "gain": round(best["together"] / best["sequential"], 2),
    }


async def compare(args: argparse.Namespace, folder: Path, tokens: int) -> dict[str, Any]:
    """The other engines on the same prompts, one after the other; null and a note for those that are not there."""
    engines: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for name, open_engine in ENGINES.items():
        engines[name] = None
        try:
            backend = await open_engine(args, folder)
        except (ModelError, Unavailable) as e:
            notes[name] = str(e)
            continue
        try:
            engines[name] = await engine_speed(backend, tokens, 1 if args.quick else ENGINE_ROUNDS)
        except BackendError as e:
            notes[name] = str(e)
        finally:
            await backend.aclose()
    return {"engines": engines, "engine_notes": notes}


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    view = Table(title=f"{result['requests']} requests on {result['model']}, {result['dtype']}")
    view.add_column("variant")
    view.add_column("tokens/s", justify="right")
    names = {
        "sequential": "agora, one after another",
        "together": "agora, together",
        "plain_generate": "model.generate, one prompt",
        "static_batch": "model.generate, one static batch",
    }
    for key, name in names.items():
        view.add_row(name, f"{result['tokens_per_s'][key]:.1f}")
    for engine, figures in result["engines"].items():
        for how, name in (("sequential", "one after another"), ("together", "together")):
            speed = f"{figures['tokens_per_s'][how]:.1f}" if figures else "-"
            view.add_row(f"{engine}, {name}", speed)
    view.add_section()
    view.add_row("gain of batching (goal ≥ 4)", f"{result['gain']:.2f}")
    view.add_row("alone over plain generate (goal ≥ 0.9)", f"{result['alone_over_plain_generate']:.2f}")
    view.add_row("together over static batch (goal ≥ 0.8)", f"{result['together_over_static_batch']:.2f}")
    view.add_row("event loop lag, 99th percentile", f"{result['loop_lag_p99_ms']:.1f} ms")
    notes = "".join(f"\n{engine}: {why}" for engine, why in result["engine_notes"].items())
    view.caption = f"best of {result['rounds']} rounds, {result['threads']} threads, {result['cpu']}{notes}"
    return view


def main() -> None:
    options = parser("Speed of batching in LocalBackend.")
    options.add_argument("--model", default="smollm2-135m", help="catalogue alias or folder (default: smollm2-135m)")
    options.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    options.add_argument("--vllm", action="store_true", help="start vLLM for --quick too (about a minute)")
    args = options.parse_args()
    folder = ModelStore().resolve(args.model, pull=True)
    result = asyncio.run(measure(folder, dtype=args.dtype, threads=args.threads, quick=args.quick))
    result |= asyncio.run(compare(args, folder, result["tokens_per_request"]))
    show(result, args.json, table(result))


if __name__ == "__main__":
    run(main)
