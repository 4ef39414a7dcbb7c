"""A GGUF model in this process, by llama.cpp: the fastest way to run one on a CPU.

    async with await LlamaCppBackend.open("SmolLM2-135M-Instruct.Q4_1.gguf") as backend:
        answer = await backend.generate(GenerateRequest(prompt="The capital of France is", max_tokens=8))

Needs llama-cpp-python (`pip install 'agora-llm[llamacpp]'`). Requests are decoded together as those of `LocalBackend`
are, and by the same code; only the forward pass is llama.cpp's (see `experts.llama`). How a GGUF's quantised weights
are multiplied depends on how many rows there are, so a near-tie may fall differently alone and among others.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final, Never

from agora.errors import InvalidRequest, Unsupported
from agora.protocols import Capabilities, GenerateRequest
from agora.types import AdapterRef
from experts.engine.batch import Batch
from experts.engine.jobs import GenerateJob, Outbox
from experts.engine.pace import Pace
from experts.engine.work import Work
from experts.engine.worker import Worker
from experts.llama.batch import SchemaJob
from experts.llama.grammar import Grammar, schema_grammar
from experts.llama.library import library
from experts.llama.loading import Options, Words, default_threads, load_batch
from experts.local import LocalBackend

TORCH_THREADS: Final = 1
"""Threads of torch, which only picks the tokens here. More would wait for each other by spinning, on the cores that
llama.cpp's threads need."""


class LlamaCppBackend(LocalBackend):
    """Implements `agora.protocols.Backend` on a GGUF model in this process. Made by `open`; one event loop at a time.

    Attributes:
        model: Name of the model: that of its file.
    """

    def __init__(self, words: Words, worker: Worker, pace: Pace, *, name: str, max_batch: int, max_queue: int) -> None:
        super().__init__(words.facts, worker, pace, name=name, max_batch=max_batch, max_queue=max_queue)
        self._words = words

    @classmethod
    async def open(  # type: ignore[override]  # what a model is opened from, and how, differs
        cls,
        path: str | os.PathLike[str],
        *,
        name: str = "llamacpp",
        max_batch: int = 16,
        max_queue: int = 256,
        max_context: int | None = None,
        threads: int | None = None,
        gpu_layers: int = 0,
    ) -> LlamaCppBackend:
        """Loads a model off the event loop.

        Args:
            path: A GGUF file with a model that generates text; of a model in several files, the first.
            name: What to call the backend in errors and traces.
            max_batch: Requests that decode together.
            max_queue: Requests that may wait for that; one more is `Overloaded` at once.
            max_context: Tokens of prompt and answer together, where less than the model's own limit is wanted; None
                for that limit, or what fits into memory.
            threads: CPU threads; None for one per physical core.
            gpu_layers: Layers on the GPU, where llama.cpp was built for one; -1 for all.

        Raises:
            InvalidRequest: If a value is out of range.
            ModelError: If llama-cpp-python is not installed, or the file holds no model that can be served.
        """
        for what, value, least in (
            ("max_batch", max_batch, 1),
            ("max_queue", max_queue, 0),
            ("threads", threads, 1),
            ("max_context", max_context, 2),
            ("gpu_layers", gpu_layers, -1),
        ):
            if value is not None and value < least:
                raise InvalidRequest(f"{what} is {value}; it must be ≥ {least}")
        await asyncio.to_thread(library)
        options = Options(
            max_batch=max_batch,
            max_context=max_context,
            threads=threads or default_threads(),
            gpu_layers=gpu_layers,
        )
        file, pace = Path(os.path.expanduser(path)), Pace()  # noqa: PTH111, ASYNC240 - no I/O, and no blocking
        made: list[Words] = []

        def build() -> Batch:
            batch, words = load_batch(file, options, outbox=Outbox(), pace=pace)
            made.append(words)
            return batch

        worker = Worker(build, name=f"agora-{name}", threads=TORCH_THREADS)
        try:
            await asyncio.wrap_future(worker.ready)
        except BaseException:
            worker.stop()
            raise
        return cls(made[0], worker, pace, name=name, max_batch=max_batch, max_queue=max_queue)

    @property
    def capabilities(self) -> Capabilities:
        """Everything but adapters; chat, and going on with one, if the file has a template; scores unless the model is
        recurrent."""
        return Capabilities(
            chat=self._facts.codec.chat,
            continues=self._facts.codec.chat,
            completion=True,
            score=self._words.score,
            logprobs=True,
            json_schema=True,
            seed=True,
            max_context=self._facts.max_context,
        )

    async def load_adapter(self, ref: AdapterRef, folder: str | os.PathLike[str]) -> Never:
        """Not possible: an adapter of safetensors would have to be converted to GGUF.

        Raises:
            Unsupported: Always.
        """
        raise self._no_adapters()

    async def unload_adapter(self, ref: AdapterRef) -> Never:
        """Not possible: there are none.

        Raises:
            Unsupported: Always.
        """
        raise self._no_adapters()

    def _no_adapters(self) -> Unsupported:
        return Unsupported(
            "llama.cpp answers without adapters here", backend=self._name, hint='use a node of kind "local" or "vllm"'
        )

    def _generation(
        self, request: GenerateRequest, work: Work, *, streaming: bool, urgent: bool = False
    ) -> GenerateJob:
        job = super()._generation(request, work, streaming=streaming, urgent=urgent)
        if request.json_schema is None:
            return job
        grammar = schema_grammar(request.json_schema)
        return SchemaJob.of(job, Grammar(self._words.library, self._words.tokenizer, grammar))
