"""Keeps a server running: notices when it dies or hangs, and starts it again, more patiently each time."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from agora.errors import AgoraError, InvalidRequest, ModelError, Unavailable
from agora.protocols import Health
from experts.vllm_process import ServerProcess

_log = logging.getLogger(__name__)

T = TypeVar("T")

Phase = Literal["starting", "up", "down", "closed"]

START_TIMEOUT_S: Final = 900.0
"""Seconds for a start: 40 to 75 were measured for a small model on 2 CPU cores; a large one read from a network disk
and compiled for a GPU takes minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """How a server is looked after.

    The wait before try n after a death is uniform in [w/2, w] with w = min(backoff_cap_s, backoff_s·2ⁿ⁻¹): exponential
    back-off with equal jitter, so that a server which cannot start does not keep the machine busy with trying.

    Attributes:
        start_timeout_s: Seconds until a start must have generated a token.
        poll_s: Seconds between looks at a server that is starting.
        check_every_s: Seconds without a success after which it is asked for a token. A server that answers requests
            is not asked; the default costs an idle CPU server less than 1 % of its time.
        checks: Checks that must fail in a row before it is started again; what else it is asked must fail too.
        backoff_s: Longest wait before the first new start, in seconds.
        backoff_cap_s: Longest wait before any, in seconds.
        stable_s: Seconds up after which the waits begin at `backoff_s` again.
        grace_s: Seconds that it has to end by itself.

    Raises:
        InvalidRequest: If a value is out of range.
    """

    start_timeout_s: float = START_TIMEOUT_S
    poll_s: float = 0.25
    check_every_s: float = 15.0
    checks: int = 3
    backoff_s: float = 1.0
    backoff_cap_s: float = 60.0
    stable_s: float = 120.0
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if self.checks < 1:
            raise InvalidRequest(f"checks is {self.checks}; it must be ≥ 1")
        for name in ("start_timeout_s", "poll_s", "check_every_s", "backoff_s", "backoff_cap_s", "grace_s"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be above 0 seconds")

    def wait(self, failures: int, rng: random.Random) -> float:
        """Seconds before the next start, after that many failures in a row, from 1."""
        longest = min(self.backoff_cap_s, self.backoff_s * 2.0 ** min(failures - 1, 64))
        return rng.uniform(longest / 2, longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """How a supervised server is.

    Attributes:
        phase: `starting`; `up`; `down`, waiting to be started again; `closed`.
        since: When it became up, or ceased to be, in Unix time.
        why: Why it is not up; empty if it is, or has never been.
        restarts: How often it was started again.
        next_start: When it will be started again, in Unix time, if it is down.
    """

    phase: Phase
    since: float
    why: str = ""
    restarts: int = 0
    next_start: float | None = None


class Supervisor:
    """Looks after one server process.

    Args:
        name: The backend's name, for errors.
        launch: Starts the process.
        check: Has it generate a token, in bounded time.
        prepare: Makes a server that generates ready for requests: loads its adapters.
        on_down: Told, as an error for whoever waits, that it is down.
        supervision: How patiently.
        rng: Where the jitter comes from.
    """

    def __init__(
        self,
        *,
        name: str,
        launch: Callable[[], Awaitable[ServerProcess]],
        check: Callable[[], Coroutine[Any, Any, Health]],
        prepare: Callable[[], Coroutine[Any, Any, None]],
        on_down: Callable[[Unavailable], None],
        supervision: Supervision,
        rng: random.Random,
    ) -> None:
        self._name = name
        self._launch = launch
        self._check = check
        self._prepare = prepare
        self._on_down = on_down
        self._how = supervision
        self._rng = rng
        self._process: ServerProcess | None = None
        self._watching: asyncio.Task[None] | None = None
        self._state = ServerState(phase="starting", since=time.time())
        self._last_life = 0.0

    @property
    def state(self) -> ServerState:
        """How the server is now."""
        return self._state

    @property
    def process(self) -> ServerProcess | None:
        """The process that runs, or ran last."""
        return self._process

    def saw_life(self) -> None:
        """To be told of every success: a server that answers need not be checked."""
        self._last_life = asyncio.get_running_loop().time()

    def down(self) -> Unavailable | None:
        """Why requests cannot be answered now; None if they can."""
        state = self._state
        if state.phase == "up":
            return None
        if state.phase == "closed":
            return Unavailable("the backend was closed", backend=self._name)
        if not state.why:
            return Unavailable("the vLLM server is still starting", backend=self._name)
        now = time.time()
        since = time.strftime("%H:%M:%S", time.localtime(state.since))
        told = f"the vLLM server is down since {since} ({max(now - state.since, 0):.0f} s): {state.why}"
        if state.next_start is None:
            hint = f"it is being started again, for the {_nth(state.restarts)} time; ask another backend meanwhile"
        else:
            left = max(state.next_start - now, 0)
            hint = f"it will be started again in {left:.0f} s; ask another backend meanwhile"
        return Unavailable(told, backend=self._name, hint=hint)

    async def start(self) -> None:
        """Starts the server for the first time, and from then on looks after it.

        Raises:
            ModelError: If the process ends before it is ready.
            Unavailable: If it is not ready in time.
            AgoraError: As `launch` and `prepare` do.
        """
        await self._bring_up()
        self._set("up")
        self._watching = asyncio.create_task(self._watch(), name=f"vllm-supervisor-{self._name}")
        self._watching.add_done_callback(self._unwatched)

    async def aclose(self) -> None:
        """Ends the server and everything it started; safe to call twice."""
        self._set("closed", why="the backend was closed")
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._process is not None:
            await self._process.stop()

    def _set(self, phase: Phase, *, why: str = "", next_start: float | None = None) -> None:
        old = self._state
        stays = old.phase != "up" and phase in ("starting", "down")
        self._state = ServerState(
            phase=phase,
            since=old.since if stays else time.time(),
            why=why,
            restarts=old.restarts + (phase == "starting"),
            next_start=next_start,
        )

    async def _bring_up(self) -> None:
        """Starts the process and waits until it can take requests; a failed one is ended."""
        process = self._process = await self._launch()
        try:
            await self._until_ready(process)
            self.saw_life()
            await self._until_prepared(process)
        except BaseException:
            await process.stop()
            raise

    async def _until_prepared(self, process: ServerProcess) -> None:
        async def prepared() -> bool:
            await self._prepare()
            return True

        try:
            async with asyncio.timeout(self._how.start_timeout_s):
                if await _unless_ended(process, prepared()) is None:
                    raise await self._ended(process)
        except TimeoutError:
            raise Unavailable(
                f"the vLLM server was not ready for requests {self._how.start_timeout_s:g} s after its first token"
                f"{process.said()}",
                backend=self._name,
            ) from None

    async def _until_ready(self, process: ServerProcess) -> None:
        health: Health | None = None
        try:
            async with asyncio.timeout(self._how.start_timeout_s):
                while True:
                    if process.ended.is_set():
                        raise await self._ended(process)
                    seen = await _unless_ended(process, self._check())
                    if seen is not None and seen.ok:
                        return
                    health = seen or health
                    await _unless_ended(process, asyncio.sleep(self._how.poll_s))
        except TimeoutError:
            last = f"; asked for one, it said: {health.detail}" if health is not None else ""
            raise Unavailable(
                f"the vLLM server did not generate a token within {self._how.start_timeout_s:g} s"
                f"{last}{process.said()}",
                backend=self._name,
                hint="give it more time with start_timeout_s, or try a smaller model",
            ) from None

    async def _ended(self, process: ServerProcess) -> ModelError:
        await process.stop()  # Its last words have all been read once nothing of it is left.
        return ModelError(
            f"{self._name}: the vLLM server could not start: {process.how()}",
            hint="check the model, and what the node says of dtype, max_context, args and env",
        )

    async def _watch(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            up_at = loop.time()
            why = await self._until_down(self._process)
            self._set("down", why=why or self._process.how())
            _log.warning("%s: the vLLM server is down: %s", self._name, self._state.why)
            error = self.down()
            assert error is not None
            self._on_down(error)
            await self._process.stop()
            why = why or self._process.how()  # By now with the last words of its log.
            failures = 1 if loop.time() - up_at >= self._how.stable_s else failures + 1
            while not await self._started_again(why, failures):
                why = self._state.why
                failures += 1
            self._set("up")
            _log.warning("%s: the vLLM server is up again", self._name)

    async def _started_again(self, why: str, failures: int) -> bool:
        """One wait and one try."""
        wait = self._how.wait(failures, self._rng)
        self._set("down", why=why, next_start=time.time() + wait)
        await asyncio.sleep(wait)
        self._set("starting", why=why)
        try:
            await self._bring_up()
        except AgoraError as e:
            text = e.message.removeprefix(f"{self._name}: ")
            self._set("down", why=text)
            _log.warning("%s: %s", self._name, text)
            return False
        return True

    async def _until_down(self, process: ServerProcess) -> str:
        """Waits until the server dies, which is told as "", or has failed too many checks, which is told in words."""
        loop = asyncio.get_running_loop()
        failed = 0
        while True:
            if await _unless_ended(process, _slept(self._how.check_every_s)) is None:
                return ""
            asked = loop.time()
            if asked - self._last_life < self._how.check_every_s:
                failed = 0
                continue
            health = await _unless_ended(process, self._check())
            if health is None:
                return ""
            if health.ok or self._last_life >= asked:
                failed = 0
                self.saw_life()
                continue
            failed += 1
            _log.warning("%s: health check %d of %d failed: %s", self._name, failed, self._how.checks, health.detail)
            if failed >= self._how.checks:
                detail = health.detail.removeprefix(f"{self._name}: ")
                return f"it runs, but {failed} times in a row it generated no token; last: {detail}"

    def _unwatched(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._set("down", why=f"looking after it failed: {error!r}")
            _log.error("%s: looking after the vLLM server failed", self._name, exc_info=error)


async def _slept(seconds: float) -> bool:
    await asyncio.sleep(seconds)
    return True


async def _unless_ended(process: ServerProcess, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work returns, or None if the server ends first; the work is cancelled then."""
    task = asyncio.ensure_future(work)
    ended = asyncio.ensure_future(process.ended.wait())
    try:
        await asyncio.wait((task, ended), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for t in (task, ended):
            t.cancel()
        await asyncio.gather(task, ended, return_exceptions=True)


def _nth(n: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{n}{'th' if n % 100 in (11, 12, 13) else ends.get(n % 10, 'th')}"
