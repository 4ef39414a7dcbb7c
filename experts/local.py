"""A model in this process: transformers and peft, with concurrent requests decoded in one running batch.

    async with await LocalBackend.open("models/smollm2-135m") as backend:
        answer = await backend.generate(GenerateRequest(prompt="The capital of France is", max_tokens=8))

All torch work happens on one thread of the backend's own (see `experts.engine`); the event loop only waits. In float32
a prompt gets the same greedy answer alone and among others, up to rounding of the last bits; in bfloat16 rounding is
coarse enough that near-ties may fall differently.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from agora.errors import AgoraError, InvalidRequest, Overloaded
from agora.protocols import (
    Capabilities,
    Chunk,
    Completion,
    ContinuationScore,
    GenerateRequest,
    Health,
    Load,
    ScoreRequest,
    Scores,
)
from agora.types import AdapterRef, Usage
from experts.adapters import AdapterInfo, LoadedAdapter, read_adapter
from experts.claims import refuse_unclaimed
from experts.engine.batch import Batch
from experts.engine.facts import ModelFacts
from experts.engine.jobs import GenerateJob, Job, Marks, Outbox, Piece, ScoreJob, closed
from experts.engine.loading import load
from experts.engine.memory import cache_budget
from experts.engine.pace import Pace
from experts.engine.registry import AdapterRegistry, Registered
from experts.engine.work import Work
from experts.engine.worker import Worker

T = TypeVar("T")

HEALTH_TIMEOUT_S: Final = 30.0
"""Seconds a health probe may take. It waits for one step of the batch at most, which a large prompt makes about a
second long on a slow machine."""

FIRST_RETRY_S: Final = 1.0
"""What `Overloaded` suggests to wait before the backend has seen how fast requests end."""


class LocalBackend:
    """Implements `agora.protocols.Backend` on a model in this process. Made by `open`; one event loop at a time.

    Attributes:
        model: Name of the model: that of its folder.
    """

    def __init__(
        self, facts: ModelFacts, worker: Worker, pace: Pace, *, name: str, max_batch: int, max_queue: int
    ) -> None:
        self.model = facts.name
        self._name = name
        self._facts = facts
        self._worker = worker
        self._pace = pace
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._open: set[Work] = set()
        self._adapters = AdapterRegistry(name)
        self._loading = asyncio.Lock()
        self._closed = False
        self._text = ThreadPoolExecutor(1, thread_name_prefix=f"agora-{name}-text")
        weakref.finalize(self, worker.stop)

    @classmethod
    async def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        name: str = "local",
        dtype: str = "float32",
        max_batch: int = 16,
        max_queue: int = 256,
        max_context: int | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> LocalBackend:
        """Loads a model off the event loop.

        Args:
            folder: A causal language model in the layout of transformers: config.json, safetensors, tokenizer.
            name: What to call the backend in errors and traces.
            dtype: `float32`, `bfloat16` or `float16`.
            max_batch: Requests that decode together.
            max_queue: Requests that may wait for that; one more is `Overloaded` at once.
            max_context: Tokens of prompt and answer together, where less than the model's own limit is wanted.
            threads: CPU threads of one operation; None for torch's own choice.
            device: `cpu`, `cuda`, `cuda:1`, …

        Raises:
            InvalidRequest: If a value is out of range, or the device is not there.
            ModelError: If the folder holds no model that can be served.
        """
        for what, value, least in (
            ("max_batch", max_batch, 1),
            ("max_queue", max_queue, 0),
            ("threads", threads, 1),
            ("max_context", max_context, 2),
        ):
            if value is not None and value < least:
                raise InvalidRequest(f"{what} is {value}; it must be ≥ {least}")
        path, pace = Path(folder), Pace()

        def build() -> Batch:
            loaded = load(path, dtype=dtype, device=device, max_context=max_context)
            budget = cache_budget(loaded.runner.shape.device)
            return Batch(loaded, max_rows=max_batch, max_bytes=budget, outbox=Outbox(), pace=pace)

        worker = Worker(build, name=f"agora-{name}", threads=threads)
        try:
            await asyncio.wrap_future(worker.ready)
            facts = await asyncio.wrap_future(worker.call(lambda batch: batch.facts))
        except BaseException:
            worker.stop()
            raise
        return cls(facts, worker, pace, name=name, max_batch=max_batch, max_queue=max_queue)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- What it is

    @property
    def name(self) -> str:
        """What to call it in errors and traces."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """Everything but JSON schemas; chat, and going on with one, if the tokenizer has a template."""
        return Capabilities(
            chat=self._facts.codec.chat,
            continues=self._facts.codec.chat,
            completion=True,
            score=True,
            logprobs=True,
            seed=True,
            adapters=True,
            max_context=self._facts.max_context,
        )

    @property
    def load(self) -> Load:
        """Requests with a row in the batch, and those waiting for one."""
        running = sum(1 for w in self._open if w.job is not None and w.job.started)
        return Load(running=running, waiting=len(self._open) - running)

    @property
    def adapters(self) -> Mapping[AdapterRef, AdapterInfo]:
        """The adapters that can be asked for now."""
        return self._adapters.infos

    # -- What it does

    async def generate(self, request: GenerateRequest) -> Completion:
        """Generates the whole answer.

        Raises:
            InvalidRequest: If the prompt is longer than the context, or the chat template refuses the messages.
            Unsupported: If the request needs what is not claimed.
            AdapterError: If the adapter is not loaded.
            Overloaded: If the queue is full.
            BackendTimeout: If `timeout_s` passed.
            Unavailable: If the backend is closed, or the model failed.
        """
        asked = time.perf_counter()
        async with self._work(request, partial(self._generation, request, streaming=False)) as work:
            piece = await work.event()
            assert isinstance(piece, Piece) and piece.finish_reason is not None
            return Completion(
                text=piece.text,
                finish_reason=piece.finish_reason,
                usage=self._usage(work, piece),
                model=self._answerer(work),
                logprobs=piece.logprobs,
                first_token_s=piece.first_token_at - asked,
                seconds=time.perf_counter() - asked,
            )

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Generates piece by piece; raises what `generate` does, on the first piece or a later one."""
        async with self._work(request, partial(self._generation, request, streaming=True)) as work:
            while True:
                piece = await work.event()
                assert isinstance(piece, Piece)
                usage = None if piece.finish_reason is None else self._usage(work, piece)
                yield Chunk(text=piece.text, logprobs=piece.logprobs, finish_reason=piece.finish_reason, usage=usage)
                if piece.finish_reason is not None:
                    return

    async def score(self, request: ScoreRequest) -> Scores:
        """Tells how likely each continuation is: natural log, summed over its tokens.

        The prompt is read once, whatever the number of continuations. See `Codec.encode_continuations` for where
        prompt and continuation meet. Raises what `generate` does.
        """
        async with self._work(request, partial(self._scoring, request)) as work:
            marks = await work.event()
            assert isinstance(marks, Marks) and isinstance(work.job, ScoreJob)
            tokens = [len(c) for c in work.job.continuations]
            return Scores(
                scores=tuple(
                    ContinuationScore(text=text, logprob=logprob, tokens=count)
                    for text, logprob, count in zip(request.continuations, marks.logprobs, tokens, strict=True)
                ),
                usage=Usage(prompt_tokens=len(work.job.prompt) + sum(tokens), calls=1),
            )

    async def health(self) -> Health:
        """Generates one token, ahead of what waits and beside what runs."""
        asked = time.perf_counter()
        request = GenerateRequest(prompt="Hello", max_tokens=1, timeout_s=HEALTH_TIMEOUT_S)
        detail = ""
        try:
            async with self._work(
                request, partial(self._generation, request, streaming=False, urgent=True), urgent=True
            ) as work:
                await work.event()
        except AgoraError as e:
            detail = str(e)
        return Health(ok=not detail, detail=detail, seconds=time.perf_counter() - asked)

    async def aclose(self) -> None:
        """Ends all requests with `Unavailable`, frees the model, and ends the backend's threads."""
        first, self._closed = not self._closed, True
        if first:
            self._worker.stop()
            self._idle = self._text.submit(int)
        # Shielded: a cancelled close must not cancel what others wait for.
        await asyncio.shield(asyncio.wrap_future(self._worker.ended))
        await asyncio.shield(asyncio.wrap_future(self._idle))
        # Both threads have nothing left to do: these waits are the microseconds of their last lines.
        self._worker.join()
        self._text.shutdown()

    # -- Adapters

    async def load_adapter(self, ref: AdapterRef, folder: str | os.PathLike[str]) -> AdapterInfo:
        """Puts a LoRA adapter beside the others; running requests neither stop nor change.

        An adapter is immutable: loading the same weights under the same name again does nothing.

        Raises:
            AdapterError: If the folder holds no safe adapter for this model, or other weights have that name.
            Unavailable: If the backend is closed.
        """
        async with self._loading:
            self._check_open()
            read: Callable[[], LoadedAdapter] = partial(read_adapter, Path(folder), self._facts.layers)
            adapter = await asyncio.to_thread(read)
            if not self._adapters.same(ref, adapter.info):
                name = self._adapters.new_name()
                await self._on_worker(lambda batch: batch.add_adapter(name, adapter))
                self._adapters.add(Registered(ref, name, adapter.info))
            return adapter.info

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Takes an adapter off the model once the requests that use it are done; new ones are refused at once.

        Raises:
            AdapterError: If it is not loaded.
            Unavailable: If the backend is closed.
        """
        self._check_open()
        adapter = self._adapters.pop(ref)
        try:
            for work in [w for w in self._open if w.adapter is adapter]:
                await work.over.wait()
        except BaseException:
            self._adapters.add(adapter)
            raise
        await self._on_worker(lambda batch: batch.remove_adapter(adapter.name))

    # -- Behind it

    @asynccontextmanager
    async def _work(
        self,
        request: GenerateRequest | ScoreRequest,
        make: Callable[[Work], Job],
        *,
        urgent: bool = False,
    ) -> AsyncIterator[Work]:
        """Hands a request to the worker; at the end of the block, however it ends, nothing works for it any more."""
        self._check_open()
        refuse_unclaimed(request, self.capabilities, backend=self._name)
        adapter = None if request.adapter is None else self._adapters.find(request.adapter)
        if not urgent and len(self._open) >= self._max_batch + self._max_queue:
            raise self._overloaded()
        work = Work(self._name, adapter, request.timeout_s)
        self._open.add(work)
        try:
            async with work.in_time():
                job = await asyncio.get_running_loop().run_in_executor(self._text, make, work)
            self._check_open()
            work.job = job
            self._worker.submit(job)
            yield work
        finally:
            if work.job is not None:
                work.job.cancelled = True
            self._open.discard(work)
            work.over.set()

    def _generation(
        self, request: GenerateRequest, work: Work, *, streaming: bool, urgent: bool = False
    ) -> GenerateJob:
        prompt = self._facts.codec.encode(request.messages, request.prompt, goes_on=request.goes_on)
        room = self._room(len(prompt), 1)
        return GenerateJob(
            name=self._name,
            mailbox=work.mailbox,
            prompt=prompt,
            adapter=work.adapter.name if work.adapter else None,
            urgent=urgent,
            limit=request.max_tokens if room is None else min(request.max_tokens, room),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=request.stop,
            logprobs=request.logprobs,
            streaming=streaming,
        )

    def _scoring(self, request: ScoreRequest, work: Work) -> ScoreJob:
        prompt, tails = self._facts.codec.encode_continuations(request.messages, request.prompt, request.continuations)
        self._room(len(prompt), max(len(t) for t in tails))
        return ScoreJob(
            name=self._name,
            mailbox=work.mailbox,
            prompt=prompt,
            adapter=work.adapter.name if work.adapter else None,
            continuations=tails,
        )

    def _room(self, prompt: int, least: int) -> int | None:
        """Tokens that fit after the prompt, or None for any number."""
        context = self._facts.max_context
        if context is None:
            return None
        if prompt + least > context:
            raise InvalidRequest(
                f"the prompt has {prompt:,} tokens; this model reads and writes {context:,} in all, "
                f"so at most {max(context - least, 0):,} are allowed here",
                hint="shorten it, split it, or ask an expert with a larger context",
            )
        return context - prompt

    def _overloaded(self) -> Overloaded:
        load, pace = self.load, self._pace.seconds
        return Overloaded(
            f"{load.running} requests are running and {load.waiting} waiting; "
            f"at most {self._max_batch} and {self._max_queue} are allowed",
            backend=self._name,
            retry_after_s=FIRST_RETRY_S if pace is None else pace,
            hint="try again later, or ask another backend",
        )

    def _check_open(self) -> None:
        if self._closed:
            raise closed(self._name)

    async def _on_worker(self, do: Callable[[Batch], T]) -> T:
        self._check_open()
        return await asyncio.wrap_future(self._worker.call(do))

    def _answerer(self, work: Work) -> str:
        return self.model if work.adapter is None else f"{self.model}+{work.adapter.ref}"

    @staticmethod
    def _usage(work: Work, piece: Piece) -> Usage:
        assert work.job is not None
        return Usage(prompt_tokens=len(work.job.prompt), completion_tokens=piece.tokens, calls=1)
