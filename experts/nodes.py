"""Opens the nodes of a configuration, each by its kind."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from agora.config import CapabilitiesConfig, Config, FakeNode, LlamaCppNode, LocalNode, NodeConfig, OpenAINode, VllmNode
from agora.errors import (
    BackendError,
    BackendTimeout,
    BadReply,
    ConfigError,
    ModelError,
    Overloaded,
    Rejected,
    Unavailable,
)
from agora.protocols import Backend, Capabilities
from agora.scheduling.scaling import Targets
from agora.types import AdapterRef
from experts.models import ModelStore
from experts.progress import ProgressCallback, PullProgress
from experts.retry import Retry
from experts.slots import Slots


class OnPull(Protocol):
    """Told how far each fetch of a model is."""

    def __call__(self, source: str, progress: PullProgress, /) -> None:
        """Called from the fetching threads; what it raises ends the fetch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What is needed to open a node.

    Attributes:
        config: The whole configuration.
        store: Where models are.
        pull: Whether a model that is not on this machine may be fetched.
        on_pull: Told how far a fetch is.
        environment: Where API keys are looked up.
        label: What to call the backend in errors and traces; absent for the node's name.
        local_address: IP address of this machine that connections to the node go out from; None for any.
        slots: What limits the requests to the node, if several backends share that.
        retry: When to ask a server again; None for the usual.
    """

    config: Config
    store: ModelStore
    pull: bool = False
    on_pull: OnPull | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ, repr=False)
    label: str | None = None
    local_address: str | None = None
    slots: Slots | None = None
    retry: Retry | None = None

    @property
    def connecting(self) -> dict[str, Any]:
        """How to connect to a server, in the words of its backend."""
        return {"local_address": self.local_address, "slots": self.slots, "retry": self.retry}

    async def folder(self, source: str) -> Path:
        """The folder of a model.

        Raises:
            ModelError: If it is not here and may not, or cannot, be fetched.
        """
        progress: ProgressCallback | None = None
        if self.on_pull is not None:
            progress = functools.partial(self.on_pull, source)
        return await asyncio.to_thread(self.store.resolve, source, pull=self.pull, progress=progress)

    async def gguf(self, source: str) -> Path:
        """The GGUF file of a model: the file itself, or that of an alias of the catalogue.

        Raises:
            ModelError: If it is not here and may not, or cannot, be fetched.
        """
        if source.endswith(".gguf"):
            return Path(source)
        try:
            return await asyncio.to_thread(self.store.gguf_path, source)
        except ModelError:
            if not self.pull:
                raise
        progress = None if self.on_pull is None else functools.partial(self.on_pull, source)
        return await asyncio.to_thread(self.store.pull_gguf, source, progress=progress)

    def adapters(self, node: str) -> dict[AdapterRef, Path | None]:
        """The adapters that experts on a node answer with, and their folders."""
        experts = self.config.experts.values()
        wanted = [e.adapter for e in experts if node in (e.node, *e.also) and e.adapter is not None]
        return {AdapterRef.parse(a.name): a.folder for a in wanted}


Opener = Callable[[str, NodeConfig, Opening], Awaitable[Backend]]
"""Opens the node of that name; what it has half opened when it fails or is cancelled, it closes itself."""

_FAULTS: Final[Mapping[str, type[BackendError]]] = {
    "unavailable": Unavailable,
    "timeout": BackendTimeout,
    "overloaded": Overloaded,
    "bad_reply": BadReply,
    "rejected": Rejected,
}


def _claimed(config: CapabilitiesConfig, otherwise: Capabilities) -> Capabilities:
    said = {k: v for k, v in config if v is not None}
    return dataclasses.replace(otherwise, **said)


async def _open_fake(name: str, node: NodeConfig, opening: Opening) -> Backend:
    from experts.fake import FakeBackend
    from experts.script import Fault, Hang, echo

    assert isinstance(node, FakeNode)
    fault: Fault | None = None
    if node.fail is not None:
        failed = f'scripted to fail: fail = "{node.fail}"'
        fault = Hang() if node.fail == "hang" else _FAULTS[node.fail](failed, backend=name)
    first = node.fail_first

    def failures(call: object) -> Fault | None:
        index = getattr(call, "index", None)
        # Health checks have no index: they fail as long as everything does.
        return fault if first is None or (index is not None and index < first) else None

    adapters = [str(ref) for ref in opening.adapters(name)]
    usual = Capabilities(completion=True, score=True, logprobs=True, seed=True, adapters=bool(adapters))
    return FakeBackend(
        dict(node.replies) if node.replies else node.reply if node.reply is not None else echo,
        name=name,
        capabilities=_claimed(node.capabilities, usual),
        latency=node.latency_s,
        seconds_per_token=node.seconds_per_token,
        failures=failures,
        adapters=adapters,
        max_running=node.max_running,
        max_waiting=node.max_waiting,
        otherwise=node.reply if node.reply is not None else echo,
    )


async def _open_openai(name: str, node: NodeConfig, opening: Opening) -> Backend:
    from experts.openai import OPENAI, VLLM, OpenAIBackend

    assert isinstance(node, OpenAINode)
    presets = {None: Capabilities(), "openai": OPENAI, "vllm": VLLM}
    # What is absent is left to the backend's own defaults.
    options = {
        "connect_timeout_s": node.connect_timeout_s,
        "first_token_timeout_s": node.first_token_timeout_s,
        "total_timeout_s": node.timeout_s,
        "max_tokens_field": node.max_tokens_field,
        "scorer": "vllm" if node.server == "vllm" else None,
        "max_running": node.max_running,
        "max_waiting": node.max_waiting,
        **opening.connecting,
    }
    said: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    return OpenAIBackend(
        node.url,
        node.model,
        name=opening.label or name,
        api_key=opening.environment.get(node.api_key_env) if node.api_key_env else None,
        capabilities=_claimed(node.capabilities, presets[node.server]),
        **said,
    )


async def _open_local(name: str, node: NodeConfig, opening: Opening) -> Backend:
    assert isinstance(node, LocalNode)
    model = opening.config.models[node.model]
    folder = await opening.folder(model.source)
    # Torch takes seconds to import: not before it is known that there is a model, and not on the event loop.
    await asyncio.to_thread(importlib.import_module, "experts.local")
    from experts.local import LocalBackend

    said: dict[str, Any] = {k: v for k, v in model if k != "source" and v is not None}
    backend = await LocalBackend.open(folder, name=name, **said)
    try:
        for ref, where in opening.adapters(name).items():
            assert where is not None
            await backend.load_adapter(ref, where)
    except BaseException:
        await backend.aclose()
        raise
    return backend


async def _open_llamacpp(name: str, node: NodeConfig, opening: Opening) -> Backend:
    from experts.llama.library import library

    assert isinstance(node, LlamaCppNode)
    # Without the extra there is nothing to fetch a model for; with it, loading it takes a moment.
    await asyncio.to_thread(library)
    file = await opening.gguf(node.source)
    # It brings torch: not before it is known that there is a model, and not on the event loop.
    await asyncio.to_thread(importlib.import_module, "experts.llamacpp")
    from experts.llamacpp import LlamaCppBackend

    wishes = ("max_batch", "max_queue", "max_context", "threads", "gpu_layers")
    said: dict[str, Any] = {k: v for k, v in node if k in wishes and v is not None}
    return await LlamaCppBackend.open(file, name=name, **said)


def scaling_targets(node: NodeConfig) -> Targets | None:
    """What is aimed at where the number of a node's servers may change; None where it does not."""
    if not isinstance(node, VllmNode) or not node.scales:
        return None
    said = {"queue": node.target_queue, "ttft_s": node.target_ttft_s}
    given: dict[str, Any] = {k: v for k, v in said.items() if v is not None}
    return Targets(least=node.replicas, most=node.most_replicas, **given)


async def _open_vllm(name: str, node: NodeConfig, opening: Opening) -> Backend:
    from experts.replicas import ReplicaSet
    from experts.vllm import VLLMBackend
    from experts.vllm_supervisor import Supervision

    assert isinstance(node, VllmNode)
    options = {
        "total_timeout_s": node.timeout_s,
        "first_token_timeout_s": node.first_token_timeout_s,
        "max_running": node.max_running,
        "max_waiting": node.max_waiting,
        **opening.connecting,
    }
    wishes = ("python", "dtype", "max_context", "max_lora_rank")
    said: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    adapters = opening.adapters(name)
    backend: VLLMBackend | ReplicaSet
    if node.url is not None:
        key = opening.environment.get(node.api_key_env) if node.api_key_env else None
        if node.api_key_env and not key:
            raise ConfigError(
                f"nodes.{name}.api_key_env: the environment variable {node.api_key_env} is not set",
                hint="set it to the server's API key",
            )
        backend = VLLMBackend.attach(node.url, node.model, name=opening.label or name, api_key=key, **said)
    else:
        said |= {k: v for k, v in node if k in wishes and v is not None}
        if node.start_timeout_s is not None:
            said["supervision"] = Supervision(start_timeout_s=node.start_timeout_s)
        folder = await opening.folder(node.model)
        targets = scaling_targets(node)

        async def start(number: int = 0) -> VLLMBackend:
            return await VLLMBackend.start(
                folder,
                name=name if targets is None else f"{name}/{number}",
                port=None if node.port is None else node.port + number,
                # Whoever says how large they may be wants to load some later.
                adapters=bool(adapters) or node.max_lora_rank is not None,
                args=node.args,
                env=node.env,
                **said,
            )

        backend = await start() if targets is None else await ReplicaSet.start(start, targets, name=name)
    try:
        for ref, where in adapters.items():
            if where is not None:
                await backend.load_adapter(ref, where)
    except BaseException:
        await backend.aclose()
        raise
    return backend


OPENERS: Final[Mapping[str, Opener]] = MappingProxyType(
    {
        "local": _open_local,
        "llamacpp": _open_llamacpp,
        "openai": _open_openai,
        "vllm": _open_vllm,
        "fake": _open_fake,
    }
)
"""How each kind of node is opened."""
