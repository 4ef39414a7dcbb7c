"""LoRA adapters on a vLLM server: checked here, loaded there by immutable name, and loaded again after a restart."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from agora.errors import AdapterError, BadReply, Rejected, Unavailable
from agora.types import AdapterRef
from experts.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterInfo, LayerShape, check_adapter, layer_shapes
from experts.files import sha256_of
from experts.http_reply import Patience
from experts.openai_http import Http
from experts.openai_wire import parse_object, shown

_log = logging.getLogger(__name__)

LOAD: Final = "load_lora_adapter"
UNLOAD: Final = "unload_lora_adapter"

NOT_ALLOWED: Final = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"

Shapes = Mapping[str, LayerShape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An adapter that the server has from here: what it is, and the folder that the server reads."""

    info: AdapterInfo
    folder: Path


class VllmAdapters:
    """The adapters of one server.

    Args:
        http: The server.
        backend: The backend's name, for errors.
        patience: Makes the time limit of one request to the server.
        copies: Where adapters are copied to before the server reads them, so that it reads what was checked, also
            later: it reads them again when it has put them out of its memory, and after a restart. None for a server
            elsewhere, which reads the folder given.
        base: Reads the base model's layers; called off the event loop, once. None where it is not known.
        max_rank: Highest rank the server has room for; None if that is not known.
    """

    def __init__(
        self,
        http: Http,
        *,
        backend: str,
        patience: Callable[[], Patience],
        copies: Path | None = None,
        base: Callable[[], Shapes | None] | None = None,
        max_rank: int | None = None,
    ) -> None:
        self._http = http
        self._backend = backend
        self._patience = patience
        self._copies = copies
        self._base = base
        self._shapes: Shapes | None = None
        self._max_rank = max_rank
        self._held: dict[AdapterRef, Held] = {}
        self._known: dict[AdapterRef, AdapterInfo] = {}
        self._busy = asyncio.Lock()

    @property
    def held(self) -> Mapping[AdapterRef, AdapterInfo]:
        """Those loaded from here."""
        return MappingProxyType({ref: held.info for ref, held in self._held.items()})

    async def load(self, ref: AdapterRef, folder: Path) -> AdapterInfo:
        """Has the server load an adapter; see `VLLMBackend.load_adapter`."""
        if ref.version is None:
            raise self._error(f"adapter {str(ref)!r} has no version", hint=f"load it as '{ref}@v1'")
        async with self._busy:
            info = await asyncio.to_thread(self._checked, folder)
            if self._max_rank is not None and info.rank > self._max_rank:
                raise self._error(
                    f"adapter {str(ref)!r} has rank {info.rank}; the server was started for at most {self._max_rank}",
                    hint="set max_lora_rank",
                )
            known = self._known.get(ref)
            if known is not None and (known.sha256, known.config_sha256) != (info.sha256, info.config_sha256):
                raise self._error(
                    f"{str(ref)!r} has been loaded with other weights; an adapter is immutable",
                    hint="publish the new weights under the next version",
                )
            if ref in self._held:
                return info
            folder = await asyncio.to_thread(self._copied, ref, folder, info)
            await self._load(ref, folder)
            self._held[ref] = Held(info=info, folder=folder)
            self._known[ref] = info
            return info

    async def unload(self, ref: AdapterRef) -> None:
        """Has the server forget an adapter; see `VLLMBackend.unload_adapter`."""
        async with self._busy:
            try:
                await self._post(UNLOAD, {"lora_name": str(ref)})
            except Rejected as e:
                self._held.pop(ref, None)
                raise self._refused(e, f"adapter {str(ref)!r} cannot be unloaded") from None
            # Its copy stays until the end: a request that runs may have the server read it once more.
            self._held.pop(ref, None)

    async def restore(self) -> None:
        """Loads all of them again, on a server that has just been started.

        Raises:
            AdapterError: If the server refuses one that it took before.
            BackendError: If the server cannot be asked.
        """
        for ref, held in self._held.items():
            await self._load(ref, held.folder)
            _log.info("%s: adapter %s is loaded again", self._backend, ref)

    async def served(self) -> Mapping[str, str]:
        """All adapters that the server has, whoever loaded them: their names, and the folders it read."""
        async with await self._http.get("models", self._patience()) as reply:
            data = await reply.whole()
        cards = parse_object(data, backend=self._backend).get("data")
        if not isinstance(cards, list) or not all(isinstance(c, dict) for c in cards):
            raise BadReply(f"/models gave no list of models: {shown(data)}", backend=self._backend)
        # What has a parent is an adapter of it.
        return {str(c.get("id")): str(c.get("root")) for c in cards if c.get("parent") is not None}

    async def _load(self, ref: AdapterRef, folder: Path) -> None:
        there = (await self.served()).get(str(ref))
        if there == str(folder):
            return  # Loaded by a request whose answer was lost, or before this process was started.
        if there is not None:
            raise self._error(
                f"{str(ref)!r} is loaded already, from {there}, and nobody can tell whether its weights are these",
                hint="unload it first, or publish these weights under the next version",
            )
        try:
            await self._post(LOAD, {"lora_name": str(ref), "lora_path": str(folder)})
        except Rejected as e:
            raise self._refused(e, f"adapter {str(ref)!r} is refused by the server") from None
        except Unavailable as e:
            # vLLM says 500 to whatever its engine finds wrong with an adapter, and also when the engine is dead.
            if "HTTP 500" not in e.message or "EngineCore" in e.message or "EngineDead" in e.message:
                raise
            why = e.message.removeprefix(f"{self._backend}: ")
            raise self._error(f"adapter {str(ref)!r} is refused by the server: {why}") from None

    async def _post(self, path: str, body: Mapping[str, Any]) -> None:
        async with await self._http.post(path, body, self._patience(), retry=False) as reply:
            await reply.whole()

    def _checked(self, folder: Path) -> AdapterInfo:
        if self._base is not None and self._shapes is None:
            self._shapes = self._base()
        return check_adapter(folder, self._shapes)

    def _copied(self, ref: AdapterRef, folder: Path, info: AdapterInfo) -> Path:
        """The folder that the server is to read."""
        if self._copies is None:
            return folder.absolute()
        target = self._copies / f"{ref}-{info.sha256[:12]}-{info.config_sha256[:12]}"
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, sha256 in ((WEIGHTS_FILE, info.sha256), (CONFIG_FILE, info.config_sha256)):
                shutil.copyfile(folder / name, target / name)
                if sha256_of(target / name) != sha256:
                    raise self._error(f"{folder / name} changed while it was being read", hint="load it again")
        except OSError as e:
            raise self._error(f"{folder} cannot be copied to {target}: {e.strerror}") from None
        return target

    def _refused(self, error: Rejected, what: str) -> AdapterError:
        why = error.message.removeprefix(f"{self._backend}: ")
        # A path that is not there is told without the adapter's name, which is in all of vLLM's own answers.
        no_path = error.status in (404, 405) and "adapter" not in why and "lora" not in why.lower()
        return self._error(f"{what}: {why}", hint=NOT_ALLOWED if no_path else None)

    def _error(self, message: str, *, hint: str | None = None) -> AdapterError:
        return AdapterError(message, backend=self._backend, hint=hint)


def base_layers(folder: Path) -> Shapes | None:
    """The layers of the model in a folder, without its weights; None if this transformers does not know it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return layer_shapes(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (ValueError, KeyError, OSError, ImportError) as e:
        _log.warning("whether adapters fit %s is left to the server to check: %s", folder, e)
        return None
