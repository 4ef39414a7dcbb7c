"""From a GGUF file to a running batch, with everything checked that can be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from agora.errors import InvalidRequest, ModelError
from experts.engine.attention import Chunk, Step
from experts.engine.cache import CacheShape
from experts.engine.facts import ModelFacts
from experts.engine.jobs import TREE_TOKENS, Outbox
from experts.engine.memory import cache_budget
from experts.engine.pace import Pace
from experts.engine.text import Codec
from experts.llama.batch import LlamaBatch
from experts.llama.gguf import check_gguf
from experts.llama.library import Library, last_words, library
from experts.llama.runner import LlamaRunner
from experts.llama.sequences import URGENT, count_for
from experts.llama.tokenizer import GgufTokenizer
from experts.llama.trial import try_loading

ROW_TOKENS: Final = 1024
"""Tokens of memory per row, on average. llama.cpp takes all its memory at once, so it is not made for the day when
every row is as long as the context; longer rows make others wait. 16 rows of a 135M model take 380 MB."""

SPARE_CELLS: Final = 256
"""Cells for health probes, which come on top of a full batch."""

PREFILL_TOKENS: Final = 64
"""Prompt tokens read in one step on a CPU, shared by all rows that are reading; while a step lasts, those that are
decoding wait."""

PREFILL_TOKENS_GPU: Final = 512
"""The same on a GPU: llama.cpp's own choice (`n_ubatch`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run a model; see `LlamaCppBackend.open`."""

    max_batch: int
    max_context: int | None
    threads: int
    gpu_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What of a model the event loop's side keeps: it holds no weights.

    Attributes:
        library: llama.cpp.
        tokenizer: Of the model.
        facts: What is known of it.
        score: Whether it can be asked for scores.
    """

    library: Library
    tokenizer: GgufTokenizer
    facts: ModelFacts
    score: bool


def load_batch(path: Path, options: Options, *, outbox: Outbox, pace: Pace) -> tuple[LlamaBatch, Words]:
    """Loads a GGUF file and generates one token to see that it can.

    Args:
        path: The file; of a model in several files, the first.
        options: How to run it.
        outbox: Where events go.
        pace: Where it is noted how fast requests end.

    Raises:
        InvalidRequest: If more rows are wanted than llama.cpp has sequences.
        ModelError: If llama.cpp is not there, or the file holds no model that can be served.
    """
    lib = library()
    most = lib.api.llama_max_parallel_sequences() - count_for(0)
    if options.max_batch > most:
        raise InvalidRequest(f"max_batch is {options.max_batch}; llama.cpp decodes at most {most} requests together")
    check_gguf(path)
    try_loading(path)
    tokenizer = GgufTokenizer(lib, path)
    model = _model(lib, path, options)
    try:
        runner, max_context, cells = _runner(lib, path, model, options)
    except BaseException:
        lib.api.llama_model_free(model)
        raise
    recurrent = lib.api.llama_model_is_recurrent(model) or lib.api.llama_model_is_hybrid(model)
    facts = ModelFacts(
        name=path.stem,
        codec=Codec(tokenizer, vocabulary=tokenizer.size),
        eos=tokenizer.ends,
        max_context=max_context,
        layers={},
    )
    _probe(runner, path)
    batch = LlamaBatch(
        runner,
        facts,
        max_rows=options.max_batch,
        max_cells=cells,
        prefill_tokens=_prefill(options),
        outbox=outbox,
        pace=pace,
    )
    # A recurrent state cannot be taken back to the end of the prompt.
    return batch, Words(library=lib, tokenizer=tokenizer, facts=facts, score=not recurrent)


def default_threads() -> int:
    """One per physical core that this process may use: what torch takes on a thread where nobody has set another."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def _prefill(options: Options) -> int:
    return PREFILL_TOKENS if options.gpu_layers == 0 else PREFILL_TOKENS_GPU


def _model(lib: Library, path: Path, options: Options) -> Any:
    api = lib.api
    if options.gpu_layers and not api.llama_supports_gpu_offload():
        raise InvalidRequest(
            f"gpu_layers is {options.gpu_layers}, but llama.cpp was built without support for a GPU",
            hint="set it to 0, or build llama-cpp-python for the GPU (CMAKE_ARGS, see its documentation)",
        )
    wishes = api.llama_model_default_params()
    wishes.n_gpu_layers = options.gpu_layers
    with lib.listening() as lines:
        model = api.llama_model_load_from_file(str(path).encode(), wishes)
    if not model:
        raise ModelError(f"{path} cannot be loaded: {last_words(lines)}", hint="fetch the file again")
    if api.llama_model_has_encoder(model) or not api.llama_model_has_decoder(model):
        api.llama_model_free(model)
        raise ModelError(f"{path} is no model that generates text from left to right")
    return model


def _runner(lib: Library, path: Path, model: Any, options: Options) -> tuple[LlamaRunner, int, int]:
    """The runner, the context of one row, and the cells for all of them."""
    api = lib.api
    shape = CacheShape(
        layers=api.llama_model_n_layer(model),
        heads=max(1, api.llama_model_n_head_kv(model)),
        dim=max(1, api.llama_model_n_embd(model) // max(1, api.llama_model_n_head(model))),
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    own = api.llama_model_n_ctx_train(model)
    room = cache_budget(shape.device) // shape.bytes_per_token - TREE_TOKENS - SPARE_CELLS
    if options.max_context is not None and min(own, options.max_context) > room:
        raise ModelError(
            f"a context of {options.max_context:,} tokens takes more memory than is free: {max(room, 0):,} would fit",
            hint="lower max_context, or free memory",
        )
    max_context = min(own, options.max_context or own, room)
    if max_context < 2:
        raise ModelError(f"{path} does not fit into memory with a context", hint="use a smaller model")
    cells = max(max_context, min(options.max_batch * min(ROW_TOKENS, max_context), room))
    sequences = count_for(options.max_batch)
    # llama.cpp aborts the process on a pass larger than this, and on one that is smaller than its sequences are many.
    max_tokens = max(_prefill(options) + options.max_batch + URGENT, sequences)
    wishes = api.llama_context_default_params()
    # Beyond the rows' cells: a scoring alone in the batch may read a tree of continuations on top of a full context.
    wishes.n_ctx = cells + TREE_TOKENS + SPARE_CELLS
    wishes.n_batch = wishes.n_ubatch = max_tokens
    wishes.n_seq_max = sequences
    wishes.kv_unified = True
    wishes.n_threads = wishes.n_threads_batch = options.threads
    wishes.no_perf = True
    with lib.listening() as lines:
        context = api.llama_init_from_model(model, wishes)
    if not context:
        raise ModelError(f"llama.cpp makes no context for {path}: {last_words(lines)}", hint="lower max_context")
    rows = options.max_batch
    runner = LlamaRunner(lib, model, context, shape=shape, rows=rows, max_context=max_context, max_tokens=max_tokens)
    return runner, max_context, cells


def _probe(runner: LlamaRunner, path: Path) -> None:
    place = runner.sequences.open(1)
    try:
        step = Step(chunks=[Chunk(0, 1, place.lane, place.slot, 0)])
        logits = runner.forward([0], [0], step, [0])
    except RuntimeError as e:
        raise ModelError(f"{path} cannot be run: {e}") from e
    finally:
        runner.sequences.close(place)
    if not torch.isfinite(logits.max()):
        raise ModelError(f"{path} gives no finite output: its weights are damaged", hint="fetch the file again")
