"""The clients' side in a simulation: they really train, and what they send is really encoded and read again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np

from agora.errors import AdapterError
from fed.adapter import Adapter, Vector
from fed.chain import Chain, Memory, norm_of
from fed.download import Version, encode_version
from fed.update import Expected, Update, decode, encode
from fed.words import ClientInfo, Job, Trained, Trainer

HEADER_BYTES: Final = 512
"""Taken for a header where messages are not encoded: an update's has about 700 bytes, a small version's 300."""


@dataclass(frozen=True, slots=True)
class Came:
    """An update as the server has it, its numbers included."""

    delta: Vector
    examples: int
    steps: int
    norm: float
    loss: float | None


class Uplink(Protocol):
    """How a job's result gets from a client to the server."""

    early: bool
    """Whether training is over before the update is sent, since only then its size is known."""

    def down_bytes(self, job: Job, start: Adapter) -> int:
        """Bytes that are sent to a client for a job."""

    def up_bytes(self, start: Adapter) -> int:
        """Bytes of an update, where they are known without it."""

    def send(self, job: Job, start: Adapter) -> bytes:
        """Trains, and makes the message; only where `early`.

        Raises:
            AgoraError: If training fails, or its result cannot be sent.
        """

    def receive(self, job: Job, start: Adapter, info: ClientInfo, message: bytes | None) -> Came:
        """The update at the server.

        Raises:
            AgoraError: If it cannot be read, or was to be trained now and training fails.
        """

    def settle(self, job: Job, *, accepted: bool) -> None:
        """A job's fate is known."""

    def save(self) -> dict[tuple[str, str], bytes]:
        """What clients remember, by client and model."""

    def load(self, saved: dict[tuple[str, str], bytes]) -> None:
        """Goes on from what `save` told."""


class Direct:
    """Nothing is encoded: four bytes a number and a header. Training is done when its result is needed."""

    early = False

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def down_bytes(self, job: Job, start: Adapter) -> int:
        """See `Uplink`."""
        return 4 * start.spec.size + HEADER_BYTES

    def up_bytes(self, start: Adapter) -> int:
        """See `Uplink`."""
        return 4 * start.spec.size + HEADER_BYTES

    def send(self, job: Job, start: Adapter) -> bytes:
        """Never asked for."""
        raise NotImplementedError

    def receive(self, job: Job, start: Adapter, info: ClientInfo, message: bytes | None) -> Came:
        """See `Uplink`."""
        trained = self._trainer.train(start, job)
        _check(trained, job, start)
        loss = trained.metrics.get("loss")
        return Came(trained.delta, trained.examples, trained.steps, norm_of(trained.delta), loss)

    def settle(self, job: Job, *, accepted: bool) -> None:
        """Nothing is remembered."""

    def save(self) -> dict[tuple[str, str], bytes]:
        """Nothing is remembered."""
        return {}

    def load(self, saved: dict[tuple[str, str], bytes]) -> None:
        """Nothing is remembered."""


class Wired:
    """Every update goes through the chain, onto the wire, and is read again with all checks.

    Args:
        trainer: Trains for all clients.
        chain: What is done to the numbers.
        federation: Name in the headers.
    """

    early = True

    def __init__(self, trainer: Trainer, chain: Chain, federation: str) -> None:
        self._trainer, self._chain, self._federation = trainer, chain, federation
        self._memories: dict[tuple[str, str], Memory] = {}
        self._sizes: dict[tuple[str, int | None], tuple[int, int]] = {}

    def down_bytes(self, job: Job, start: Adapter) -> int:
        """See `Uplink`."""
        key = (job.model, job.rank)
        known = self._sizes.get(key)
        if known is None or known[0] != job.version:
            sent = Version(federation=self._federation, model=job.model, number=job.version, adapter=start)
            known = self._sizes[key] = (job.version, len(encode_version(sent)))
        return known[1]

    def up_bytes(self, start: Adapter) -> int:
        """Never asked for."""
        raise NotImplementedError

    def send(self, job: Job, start: Adapter) -> bytes:
        """See `Uplink`."""
        trained = self._trainer.train(start, job)
        _check(trained, job, start)
        # Real seconds differ from run to run, and with them the length of the header, and so when it arrives.
        metrics = {name: value for name, value in trained.metrics.items() if name != "seconds"}
        trained = replace(trained, metrics=metrics)
        key = (job.client, job.model)
        update, memory = Update.of(
            job, trained, start, federation=self._federation, chain=self._chain, memory=self._memories.get(key)
        )
        message = encode(update)
        self._memories[key] = memory
        return message

    def receive(self, job: Job, start: Adapter, info: ClientInfo, message: bytes | None) -> Came:
        """See `Uplink`."""
        assert message is not None
        expected = Expected.of(job, start.spec, federation=self._federation, chain=self._chain)
        update = decode(message, expected=expected)
        return Came(update.delta, update.examples, update.steps, update.norm, update.metrics.get("loss"))

    def settle(self, job: Job, *, accepted: bool) -> None:
        """See `Uplink`."""
        key = (job.client, job.model)
        memory = self._memories.get(key)
        if memory is not None:
            self._memories[key] = memory.settle(job.id, accepted=accepted)

    def save(self) -> dict[tuple[str, str], bytes]:
        """See `Uplink`."""
        return {key: memory.pack() for key, memory in sorted(self._memories.items())}

    def load(self, saved: dict[tuple[str, str], bytes]) -> None:
        """See `Uplink`."""
        self._memories = {key: Memory.unpack(data) for key, data in saved.items()}


def _check(trained: Trained, job: Job, start: Adapter) -> None:
    if trained.delta.shape != (start.spec.size,) or trained.delta.dtype != np.float32:
        raise AdapterError(
            f"job {job.id} of {job.client!r} gave {trained.delta.dtype} of shape {trained.delta.shape}; "
            f"its start has {start.spec.size} float32 numbers"
        )
