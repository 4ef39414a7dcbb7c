"""A scripted backend: no model, no network, any behaviour. For agora's tests, and for yours.

It answers at once by echoing the question, and everything else is scripted:

    >>> import asyncio
    >>> from agora.errors import Unavailable
    >>> from agora.protocols import GenerateRequest, Message
    >>> def ask(text):
    ...     return GenerateRequest(messages=(Message(role="user", content=text),))
    >>> asyncio.run(FakeBackend().generate(ask("hello there"))).text
    'hello there'
    >>> capitals = FakeBackend({"France": "Paris", "Italy": "Rome"})
    >>> asyncio.run(capitals.generate(ask("What is the capital of Italy?"))).text
    'Rome'

Failures, delays and broken streams stand where a reply would, so a list reads like a story:

    >>> flaky = FakeBackend([Unavailable("down"), Hang(), Reply("late", latency=0.2), Reply("a b c", cut_after=2)])

Time passes on the running event loop's clock, so a loop with virtual time makes long latencies free. Every call is
kept in `calls` with its times and outcome, cancellations included. Tokens are words together with the white space
before them: "to be or" has three.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NoReturn

from agora.errors import (
    AdapterError,
    BackendError,
    BackendTimeout,
    BadReply,
    InvalidRequest,
    Rejected,
    Unavailable,
)
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
from experts.claims import refuse_unclaimed
from experts.script import (
    TOKEN_LOGPROB,
    AnyRequest,
    Call,
    Fault,
    Hang,
    Latency,
    Replies,
    Reply,
    ReplyFunction,
    ScoreFunction,
    Scripted,
    checked_seconds,
    cut,
    echo,
    prompt_tokens_of,
    question_of,
    token_logprobs,
    tokens_of,
    usage_of,
)
from experts.slots import Slots

__all__ = [
    "TOKEN_LOGPROB",
    "Call",
    "FakeBackend",
    "Fault",
    "Hang",
    "Reply",
    "Scripted",
    "echo",
    "question_of",
    "tokens_of",
]


class FakeBackend:
    """A `Backend` that follows a script.

    Args:
        replies: What to answer. A string, `Reply` or fault: always that. A mapping: the entry whose key *is* the
            question, else the first whose key is *in* it, else `otherwise`. A list: one entry per `generate` or
            `stream`, in the order of the calls; asking beyond its end is an error. A function of the request, plain
            or async: what it returns. Entries of mappings and lists may be functions too.
        name: What to call it in errors and traces.
        capabilities: What it claims; by default everything but `json_schema`, and `adapters` if any are given.
            Whoever claims `json_schema` scripts replies that follow the schema: the fake does not check them.
        latency: Seconds to the first token: always the same, a function of the request, or one per call (the last
            one repeats).
        seconds_per_token: Seconds from each token to the next.
        failures: Faults laid over the replies: by the call's index from 0, or a function of the `Call` that
            returns a fault or None. The function sees `health` calls as well.
        scores: Log-probabilities for `score`: by continuation, or a function of the request giving one for each.
            What is not scripted scores `TOKEN_LOGPROB` per token.
        adapters: The adapters it has, each `name` or `name@vN`.
        max_running: Requests it serves at once; None for any number.
        max_waiting: Requests that may queue for that; beyond it they get `Overloaded`. None for any number.
        otherwise: The reply for questions that a mapping does not know.

    Attributes:
        calls: Every call so far, in the order asked.
        down: While set, every call fails with it and `health` says no.

    Raises:
        InvalidRequest: If a number is out of range.
    """

    def __init__(
        self,
        replies: Replies = echo,
        *,
        name: str = "fake",
        capabilities: Capabilities | None = None,
        latency: Latency = 0.0,
        seconds_per_token: float = 0.0,
        failures: Mapping[int, Fault] | Callable[[Call], Fault | None] | None = None,
        scores: Mapping[str, float] | ScoreFunction | None = None,
        adapters: Collection[str] = (),
        max_running: int | None = None,
        max_waiting: int | None = None,
        otherwise: Scripted | ReplyFunction = echo,
    ) -> None:
        self._name = name
        self._adapters = frozenset(AdapterRef.parse(a) for a in adapters)
        self._capabilities = capabilities or Capabilities(
            completion=True, score=True, logprobs=True, seed=True, adapters=bool(adapters)
        )
        self._replies = replies
        self._otherwise = otherwise
        if isinstance(latency, Sequence) and not latency:
            raise InvalidRequest("the list of latencies is empty", hint="give at least one, in seconds")
        self._latency = checked_seconds(latency) if isinstance(latency, (int, float)) else latency
        self._seconds_per_token = checked_seconds(seconds_per_token)
        self._failures = failures or {}
        self._scores = scores or {}
        self._slots = Slots(max_running, max_waiting, owner=name)
        self._pauses: set[asyncio.Future[None]] = set()
        self._asked = 0
        self._served = 0
        self._closed = False
        self.calls: list[Call] = []
        self.down: Fault | None = None

    @property
    def name(self) -> str:
        """What to call it in errors and traces."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """What it claims."""
        return self._capabilities

    @property
    def load(self) -> Load:
        """Requests being served and waiting."""
        return self._slots.load

    @property
    def requests(self) -> list[AnyRequest]:
        """Everything that was asked, in order, `health` aside."""
        return [c.request for c in self.calls if c.request is not None]

    async def generate(self, request: GenerateRequest) -> Completion:
        """Answers as scripted, after the whole reply's time."""
        clock = asyncio.get_running_loop().time
        with self._recorded("generate", request) as call:
            self._check(request)
            deadline = _deadline(request)
            async with self._slots.hold(deadline):
                call.started_s = asyncio.get_running_loop().time()
                reply, latency = await self._reply(call, request, deadline)
                tokens, finish_reason = cut(reply, request)
                between = self._seconds_per_token * max(0, len(tokens) - 1)
                if reply.cut_after is not None:
                    between = self._seconds_per_token * reply.cut_after
                await self._pause(latency + between, deadline)
                if reply.cut_after is not None:
                    raise BadReply("the reply broke off before its end", backend=self._name)
                call.text = "".join(tokens)
            return Completion(
                text=call.text,
                finish_reason=finish_reason,
                usage=reply.usage or usage_of(request, tokens),
                model=self._model(request),
                logprobs=token_logprobs(reply, tokens, request.logprobs),
                first_token_s=clock() - call.asked_s - between,
                seconds=clock() - call.asked_s,
            )

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Answers as scripted, a token per chunk; the last chunk has no text."""
        with self._recorded("stream", request) as call:
            self._check(request)
            deadline = _deadline(request)
            async with self._slots.hold(deadline):
                call.started_s = asyncio.get_running_loop().time()
                reply, latency = await self._reply(call, request, deadline)
                tokens, finish_reason = cut(reply, request)
                logprobs = token_logprobs(reply, tokens, request.logprobs)
                await self._pause(latency, deadline)
                for n, token in enumerate(tokens):
                    if n:
                        await self._pause(self._seconds_per_token, deadline)
                    if n == reply.cut_after:
                        break
                    call.text += token
                    yield Chunk(text=token, logprobs=logprobs[n : n + 1])
                if reply.cut_after is not None:
                    raise BadReply("the stream broke off before its end", backend=self._name)
                yield Chunk(finish_reason=finish_reason, usage=reply.usage or usage_of(request, tokens))

    async def score(self, request: ScoreRequest) -> Scores:
        """Scores as scripted."""
        with self._recorded("score", request) as call:
            self._check(request)
            deadline = _deadline(request)
            async with self._slots.hold(deadline):
                call.started_s = asyncio.get_running_loop().time()
                await self._fail(call, deadline)
                await self._pause(self._latency_of(call), deadline)
                values = await self._scores_of(request, deadline)
                if len(values) != len(request.continuations):
                    raise InvalidRequest(
                        f"the script gives {len(values)} scores for {len(request.continuations)} continuations"
                    )
            counts = [len(tokens_of(c)) for c in request.continuations]
            return Scores(
                scores=tuple(
                    ContinuationScore(text=c, logprob=v, tokens=n)
                    for c, v, n in zip(request.continuations, values, counts, strict=True)
                ),
                usage=Usage(prompt_tokens=prompt_tokens_of(request) + sum(counts), calls=1),
            )

    async def health(self) -> Health:
        """Says no while `down` is set, after `aclose`, on a scripted failure, or if every reply is a fault.

        Takes the fixed latency, if there is one, and uses up no scripted reply.
        """
        clock = asyncio.get_running_loop().time
        with self._recorded("health", None) as call:
            try:
                await self._fail(call, math.inf)
                if isinstance(self._replies, (Exception, type, Hang)):
                    await self._raise(self._replies, math.inf)
                await self._pause(self._latency if isinstance(self._latency, (int, float)) else 0.0, math.inf)
            except BackendError as e:
                return Health(ok=False, detail=str(e), seconds=clock() - call.asked_s)
            return Health(ok=True, detail="generated 1 token", seconds=clock() - call.asked_s)

    async def aclose(self) -> None:
        """Fails what is running and waiting, and everything asked from now on, with `Unavailable`."""
        self._closed = True
        self._slots.abort(self._shut())
        for pause in tuple(self._pauses):
            _wake(pause)

    @contextmanager
    def _recorded(
        self, kind: Literal["generate", "stream", "score", "health"], request: AnyRequest | None
    ) -> Iterator[Call]:
        clock = asyncio.get_running_loop().time
        call = Call(kind=kind, request=request, index=None if request is None else self._asked, asked_s=clock())
        self._asked += request is not None
        self.calls.append(call)
        try:
            yield call
            call.outcome = "done"
        except (asyncio.CancelledError, GeneratorExit):
            call.outcome = "cancelled"
            raise
        except BaseException as e:
            call.outcome, call.error = "failed", e
            raise
        finally:
            call.ended_s = clock()

    def _check(self, request: AnyRequest) -> None:
        """Refuses what is not claimed."""
        can = self._capabilities
        refuse_unclaimed(request, can, backend=self._name)
        adapter = request.adapter
        if adapter is not None and not any(
            a == adapter or (adapter.version is None and a.name == adapter.name) for a in self._adapters
        ):
            has = ", ".join(sorted(map(str, self._adapters))) or "none"
            raise AdapterError(f"unknown adapter {str(adapter)!r}; it has: {has}", backend=self._name)
        if can.max_context is not None:
            room = request.max_tokens if isinstance(request, GenerateRequest) else 0
            if (need := prompt_tokens_of(request) + room) > can.max_context:
                raise Rejected(
                    f"the request needs {need} tokens; the context holds {can.max_context}",
                    backend=self._name,
                    status=400,
                )

    async def _reply(self, call: Call, request: GenerateRequest, deadline: float) -> tuple[Reply, float]:
        """The scripted reply and the seconds to its first token; raises or hangs if that is the script."""
        number = self._served
        self._served += 1
        await self._fail(call, deadline)
        source = self._pick(number, request)
        if callable(source) and not isinstance(source, type):
            answer = source(request)
            if inspect.isawaitable(answer):
                try:
                    async with asyncio.timeout_at(None if deadline == math.inf else deadline):
                        answer = await answer
                except TimeoutError:
                    raise self._too_slow() from None
            source = answer
        reply = Reply(source) if isinstance(source, str) else source
        if not isinstance(reply, Reply):
            await self._pause(self._latency_of(call), deadline)
            await self._raise(reply, deadline)
        return reply, self._latency_of(call) if reply.latency is None else checked_seconds(reply.latency)

    def _pick(self, number: int, request: GenerateRequest) -> Scripted | ReplyFunction:
        replies = self._replies
        if isinstance(replies, Mapping):
            question = question_of(request)
            if question in replies:
                return replies[question]
            return next((reply for key, reply in replies.items() if key in question), self._otherwise)
        if isinstance(replies, Sequence) and not isinstance(replies, str):
            if number >= len(replies):
                raise BackendError(
                    f"the script has {len(replies)} replies and was asked for number {number + 1}",
                    backend=self._name,
                    hint="give it more replies, or a function",
                )
            return replies[number]
        return replies

    async def _fail(self, call: Call, deadline: float) -> None:
        """Raises or hangs if the backend is closed or down, or a failure is scripted for this call."""
        if self._closed:
            raise self._shut()
        if self.down is not None:
            await self._raise(self.down, deadline)
        if callable(self._failures):
            fault = self._failures(call)
        else:
            fault = None if call.index is None else self._failures.get(call.index)
        if fault is not None:
            await self._raise(fault, deadline)

    async def _raise(self, fault: object, deadline: float) -> NoReturn:
        if isinstance(fault, Hang):
            await self._pause(math.inf, deadline)
        if isinstance(fault, type) and issubclass(fault, BackendError):
            raise fault("scripted failure", backend=self._name)
        if isinstance(fault, Exception):
            raise fault.with_traceback(None)
        raise InvalidRequest(f"a script holds text, Reply, Hang and errors, not {fault!r}")

    def _latency_of(self, call: Call) -> float:
        latency = self._latency
        if callable(latency):
            assert call.request is not None
            return checked_seconds(latency(call.request))
        if isinstance(latency, Sequence):
            assert call.index is not None
            return checked_seconds(latency[min(call.index, len(latency) - 1)])
        return latency

    async def _scores_of(self, request: ScoreRequest, deadline: float) -> Sequence[float]:
        if not callable(self._scores):
            return [self._scores.get(c, TOKEN_LOGPROB * len(tokens_of(c))) for c in request.continuations]
        values = self._scores(request)
        return values if isinstance(values, Sequence) else await self._raise(values, deadline)

    def _model(self, request: GenerateRequest) -> str:
        return self._name if request.adapter is None else str(request.adapter)

    def _too_slow(self) -> BackendTimeout:
        return BackendTimeout("no complete reply within timeout_s", backend=self._name)

    def _shut(self) -> Unavailable:
        return Unavailable("the backend was closed", backend=self._name)

    async def _pause(self, seconds: float, deadline: float) -> None:
        """Waits on the loop's clock; `aclose` and the deadline end it early."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        wake = loop.create_future()
        self._pauses.add(wake)
        until = min(end, deadline)
        timer = None if until == math.inf else loop.call_at(until, _wake, wake)
        try:
            await wake
        finally:
            self._pauses.discard(wake)
            if timer is not None:
                timer.cancel()
        if self._closed:
            raise self._shut()
        if deadline < end:
            raise self._too_slow()


def _deadline(request: AnyRequest) -> float:
    if request.timeout_s is None:
        return math.inf
    return asyncio.get_running_loop().time() + request.timeout_s


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
