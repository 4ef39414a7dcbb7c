"""An expert by its name, looked up whenever it is needed: those of neighbours come and go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from agora.errors import NoExpert
from agora.protocols import Capabilities, Chunk, Completion, GenerateRequest, Health, Load, ScoreRequest, Scores
from agora.square import Expert, Square
from agora.types import ExpertCard


@dataclass(frozen=True, slots=True)
class Named:
    """Who has that name in the square at the moment of asking.

    Attributes:
        square: Where to look.
        name: Whom to look for.
    """

    square: Square
    name: str

    def here(self) -> Expert:
        """The expert.

        Raises:
            NoExpert: If nobody of that name is here now.
        """
        expert = self.square.get(self.name)
        if expert is None:
            raise _missing(self.name)
        return expert

    def here_or_nobody(self) -> Expert:
        """The expert, or one of that name who fails with `NoExpert` whatever it is asked."""
        return self.square.get(self.name) or Expert(
            card=ExpertCard(name=self.name, description="not here"), backend=_Nobody(self.name)
        )


@dataclass(frozen=True, slots=True)
class _Nobody:
    """The backend of an expert who is not here."""

    name: str

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    @property
    def load(self) -> Load:
        return Load()

    async def generate(self, request: GenerateRequest) -> Completion:
        raise _missing(self.name)

    def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        raise _missing(self.name)

    async def score(self, request: ScoreRequest) -> Scores:
        raise _missing(self.name)

    async def health(self) -> Health:
        return Health(ok=False, detail=str(_missing(self.name)))

    async def aclose(self) -> None:
        pass


def _missing(name: str) -> NoExpert:
    return NoExpert(f"expert {name!r} is not here now")
