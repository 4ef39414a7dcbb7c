"""What is left to ask for of an answer, and how what comes is joined to what was given already."""

from __future__ import annotations

from collections.abc import Callable

from agora.network.course import Make
from agora.network.resume import Emitted, Joint, Skipper, can_continue, can_repeat, continued
from agora.network.ways import Way
from agora.protocols import Chunk, GenerateRequest


class Rest:
    """What is left to ask for once something was emitted.

    Args:
        request: The whole request.
        emitted: What was emitted.
    """

    def __init__(self, request: GenerateRequest, emitted: Emitted) -> None:
        self._request = request
        self.emitted = emitted
        self._continued = continued(request, emitted) if emitted else request
        self.make: Make = self._made
        self.fits: Callable[[Way], bool] = self._fits

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._continued is None

    def _fits(self, way: Way) -> bool:
        if not self.emitted:
            return True
        return can_continue(self._request, way.backend.capabilities) or can_repeat(self._request)

    def _made(self, way: Way) -> GenerateRequest:
        if self._continued is not None and can_continue(self._request, way.backend.capabilities):
            return self._continued
        return self._request

    def joined(self, way: Way) -> Callable[[Chunk], Chunk]:
        """What makes of a way's chunks those that are new."""
        if not self.emitted:
            return _as_it_is
        if can_continue(self._request, way.backend.capabilities):
            return Joint(self.emitted, chat=self._request.prompt is None).pass_on
        return Skipper(self.emitted, backend=way.backend.name).pass_on


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk
