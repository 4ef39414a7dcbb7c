"""A vLLM server: one that agora starts and looks after, or one that someone else runs.

backend = await VLLMBackend.start("models/smollm2-135m")
answer = await backend.generate(GenerateRequest(prompt="Once upon a time"))
await backend.aclose()

A server that agora starts listens on 127.0.0.1 only, with an API key of its own, and ends with agora, however agora
ends (`experts.vllm_guard`). It counts as ready once it has generated a token: `/health` and `/v1/models` say 200 for an
engine that is dead. When it dies or hangs it is started again on the same port (`experts.vllm_supervisor`), with the
adapters it had; until then requests fail at once, and say why.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Self, Unpack

from agora.errors import ModelError, Unavailable
from agora.protocols import Capabilities
from experts.openai import VLLM
from experts.vllm_client import HttpOptions, VllmClient
from experts.vllm_launch import (
    HOST,
    MAX_LORA_RANK,
    MAX_LORAS,
    Launch,
    check_port,
    default_python,
    find_install,
    free_port,
    model_folder,
    port_is_free,
)
from experts.vllm_process import ServerProcess
from experts.vllm_supervisor import ServerState, Supervision, Supervisor

__all__ = ["VLLMBackend"]

PORT_TRIES: Final = 3
"""Free ports tried at the first start. Between being found free and being used by the server, seconds later, a port
may be taken by anyone; that it happens three times in a row on an orderly machine is out of the question."""

FOLDER_PREFIX: Final = "agora-vllm-"


class VLLMBackend(VllmClient):
    """A `Backend` on a vLLM server. Made by `start` or `attach`.

    Args:
        url: The server, with or without `/v1`.
        model: The server's name for the model.
        name: What to call the backend in errors and traces; the model's name by default.
        api_key: Sent as a bearer token; never shown.
        capabilities: What the server can do.
        folder: A folder of the backend's own, removed when it is closed; None for a server elsewhere.
        base: Folder of the base model, by which adapters are checked; None if it is not here.
        max_lora_rank: Highest rank of an adapter; None if that is not known.
        options: As of `OpenAIBackend`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        name: str = "",
        api_key: str | None = None,
        capabilities: Capabilities = VLLM,
        folder: Path | None = None,
        base: Path | None = None,
        max_lora_rank: int | None = None,
        **options: Unpack[HttpOptions],
    ) -> None:
        super().__init__(
            url,
            model,
            name=name,
            api_key=api_key,
            capabilities=capabilities,
            copies=None if folder is None else folder / "adapters",
            base=base,
            max_lora_rank=max_lora_rank,
            **options,
        )
        self._folder = folder
        self._supervisor: Supervisor | None = None

    @classmethod
    def attach(
        cls,
        url: str,
        model: str,
        *,
        name: str = "",
        api_key: str | None = None,
        capabilities: Capabilities = VLLM,
        **options: Unpack[HttpOptions],
    ) -> Self:
        """Uses a server that someone else runs. Nothing is asked of it before the first request.

        Adapters can be loaded if it was started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and
        finds the same files under the same path; it is not known whether they fit its model before it says so.

        Args:
            url: The server, with or without `/v1`.
            model: Its name for the model.
            name: What to call the backend in errors and traces; the model's name by default.
            api_key: Sent as a bearer token; never shown.
            capabilities: What it can do, where that is less than `experts.openai.VLLM`.
            options: As of `OpenAIBackend`.

        Raises:
            InvalidRequest: If an argument is out of range.
        """
        return cls(url, model, name=name, api_key=api_key, capabilities=capabilities, **options)

    @classmethod
    async def start(
        cls,
        model: str | os.PathLike[str],
        *,
        name: str = "",
        python: str | os.PathLike[str] | None = None,
        port: int | None = None,
        dtype: str | None = None,
        max_context: int | None = None,
        adapters: bool = False,
        max_lora_rank: int = MAX_LORA_RANK,
        max_loras: int = MAX_LORAS,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        supervision: Supervision | None = None,
        **options: Unpack[HttpOptions],
    ) -> Self:
        """Starts a server and waits until it has generated a token.

        Args:
            model: A model folder, or a hub id; an existing folder is taken for one.
            name: What to call the backend in errors and traces; the model's name by default.
            python: Interpreter of the environment that vLLM is installed in; `vllm_launch.default_python` if None.
            port: TCP port on 127.0.0.1; None for a free one. It stays the same over restarts.
            dtype: Number format of the weights; None for vLLM's choice, or float32 without a GPU.
            max_context: Tokens of prompt and answer together; None for the model's own, or without a GPU what fits.
            adapters: Whether LoRA adapters can be loaded, which costs memory and some speed.
            max_lora_rank: Highest rank of an adapter; vLLM makes room for the next of 8, 16, 32, 64, 128, 256, …
            max_loras: Adapters that answer in one batch; requests for others wait for the next one.
            args: Further arguments of vLLM, as they are; they win over what is said here by default.
            env: Further environment variables of the server.
            supervision: How the server is looked after.
            options: As of `OpenAIBackend`.

        Raises:
            InvalidRequest: If an argument is out of range.
            ModelError: If there is no such interpreter, no vLLM in it, or vLLM ends before it is ready; with the
                lines of its log that say why.
            Unavailable: If the port is taken, or the server is not ready in time.
        """
        local = await asyncio.to_thread(model_folder, model)
        launch = Launch(
            model=local or str(model),
            served_as=local.name if local else str(model),
            port=port or 0,
            dtype=dtype,
            max_context=max_context,
            adapters=adapters,
            max_lora_rank=max_lora_rank,
            max_loras=max_loras,
            args=tuple(args),
            env=dict(env or {}),
        )
        interpreter = default_python() if python is None else Path(python)
        supervision = supervision or Supervision()
        for tried in range(1, PORT_TRIES + 1):
            chosen = replace(launch, port=port or free_port())
            try:
                return await cls._started(chosen, interpreter, supervision, local, name=name, **options)
            except (ModelError, Unavailable):
                if port is not None or tried == PORT_TRIES or await asyncio.to_thread(port_is_free, chosen.port):
                    raise
        raise AssertionError("the last try returns or raises")

    @classmethod
    async def _started(
        cls,
        launch: Launch,
        python: Path,
        supervision: Supervision,
        base: Path | None,
        *,
        name: str,
        **options: Unpack[HttpOptions],
    ) -> Self:
        key = secrets.token_urlsafe(24)
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=FOLDER_PREFIX))
        backend = None
        try:
            install = await find_install(python, {**os.environ, **launch.env}, folder)
            environment = launch.environment(install, key)
            backend = cls(
                f"http://{HOST}:{launch.port}",
                launch.served_as,
                name=name,
                api_key=key,
                capabilities=replace(VLLM, adapters=launch.adapters),
                folder=folder,
                base=base,
                max_lora_rank=launch.rank if launch.adapters else None,
                **options,
            )

            async def run() -> ServerProcess:
                check_port(launch.port)
                return await ServerProcess.launch(
                    launch.command(install),
                    environment=environment,
                    folder=folder,
                    grace_s=supervision.grace_s,
                    secret=key,
                )

            await backend._supervise(run, supervision, options.get("rng"))
        except BaseException:
            if backend is not None:
                await backend.aclose()
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        return backend

    def __repr__(self) -> str:
        return f"VLLMBackend({self._url!r}, {self._model!r}, name={self._name!r})"

    @property
    def pid(self) -> int | None:
        """The server's process, which leads its process group; None for a server that someone else runs."""
        process = None if self._supervisor is None else self._supervisor.process
        return None if process is None else process.pid

    @property
    def state(self) -> ServerState | None:
        """How the server is; None for one that someone else runs."""
        return None if self._supervisor is None else self._supervisor.state

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines that the server wrote, oldest first; none for a server that someone else runs."""
        process = None if self._supervisor is None else self._supervisor.process
        return () if process is None else process.lines

    # -- Behind it

    async def aclose(self) -> None:
        """Ends the server if it was started here, with all its processes; what runs fails with `Unavailable`."""
        try:
            await super().aclose()
        finally:
            if self._supervisor is not None:
                await self._supervisor.aclose()
            if self._folder is not None:
                await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _supervise(
        self, run: Callable[[], Awaitable[ServerProcess]], supervision: Supervision, rng: random.Random | None
    ) -> None:
        self._supervisor = Supervisor(
            name=self._name,
            launch=run,
            check=self._one_token,
            prepare=self._prepare,
            on_down=self._let_go,
            supervision=supervision,
            rng=rng or random.Random(),
        )
        await self._supervisor.start()

    async def _prepare(self) -> None:
        """What a server that generates lacks before it can take requests."""
        await self.probe()
        await self._adapters.restore()

    def _down(self) -> Unavailable | None:
        return None if self._supervisor is None else self._supervisor.down()

    def _saw_life(self) -> None:
        if self._supervisor is not None:
            self._supervisor.saw_life()
