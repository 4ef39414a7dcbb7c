"""Which adapters can be asked for, and under which name the engine knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agora.errors import AdapterError
from agora.types import AdapterRef
from experts.adapters import AdapterInfo


@dataclass(frozen=True, slots=True, eq=False)
class Registered:
    """An adapter on the model; `name` is the engine's own and never used twice, so it never means old weights."""

    ref: AdapterRef
    name: str
    info: AdapterInfo


class AdapterRegistry:
    """The loaded adapters of one backend.

    Args:
        backend: Its name, for errors.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._adapters: dict[AdapterRef, Registered] = {}
        self._names = 0

    @property
    def infos(self) -> Mapping[AdapterRef, AdapterInfo]:
        """What can be asked for now."""
        return {ref: adapter.info for ref, adapter in self._adapters.items()}

    def find(self, ref: AdapterRef) -> Registered:
        """The adapter of that name; a bare name stands for its newest loaded version.

        Raises:
            AdapterError: If it is not loaded.
        """
        if (exact := self._adapters.get(ref)) is not None:
            return exact
        versions = [r for r in self._adapters if r.name == ref.name and r.version is not None]
        if ref.version is not None or not versions:
            raise self._unknown(ref)
        return self._adapters[max(versions, key=lambda r: r.version or 0)]

    def same(self, ref: AdapterRef, info: AdapterInfo) -> bool:
        """Whether this very adapter is loaded under this name.

        Raises:
            AdapterError: If another one is: an adapter never changes.
        """
        there = self._adapters.get(ref)
        if there is None:
            return False
        if (there.info.sha256, there.info.config_sha256) != (info.sha256, info.config_sha256):
            raise AdapterError(
                f"adapter {ref} is loaded already, with other weights: an adapter never changes",
                backend=self._backend,
                hint="give the new weights a new version",
            )
        return True

    def new_name(self) -> str:
        """A name for the engine, without the dots that peft could not take."""
        self._names += 1
        return f"adapter{self._names}"

    def add(self, adapter: Registered) -> None:
        """Lets it be asked for."""
        self._adapters[adapter.ref] = adapter

    def pop(self, ref: AdapterRef) -> Registered:
        """Lets it no longer be asked for.

        Raises:
            AdapterError: If it is not loaded.
        """
        if ref not in self._adapters:
            raise self._unknown(ref)
        return self._adapters.pop(ref)

    def _unknown(self, ref: AdapterRef) -> AdapterError:
        known = ", ".join(sorted(str(r) for r in self._adapters)) or "none"
        return AdapterError(
            f"adapter {ref} is not loaded; loaded: {known}", backend=self._backend, hint="load it, or ask for another"
        )
