"""How experts describe themselves, and the adapters they answer with."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from agora.errors import InvalidRequest
from agora.types.words import ID, Modality, Tier

_VERSIONED: Final = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,63})(@v(?P<version>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An immutable adapter, `name@vN`; a bare `name` is an alias that stands for its newest published version."""

    name: str
    version: int | None = None

    def __post_init__(self) -> None:
        if ID.fullmatch(self.name) is None:
            raise InvalidRequest(f"adapter name {self.name!r} must match {ID.pattern}")
        if self.version is not None and self.version < 1:
            raise InvalidRequest(f"adapter version {self.version} must be ≥ 1")

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Reads `name` or `name@v17`.

        Raises:
            InvalidRequest: If `text` has another form.
        """
        found = _VERSIONED.fullmatch(text)
        if found is None:
            raise InvalidRequest(f"adapter {text!r} must look like 'name' or 'name@v17'")
        version = found["version"]
        return cls(name=found["name"], version=int(version) if version else None)

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@v{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCard:
    """How an expert describes itself to those who route.

    Attributes:
        name: Unique in the square.
        description: One or two sentences: what it is good at.
        examples: Questions it answers well; routing compares new questions with these.
        keywords: Words of its field, for routing without embeddings.
        tier: Where it runs.
        modalities: What it takes.
        price_per_mtok: Money per million tokens, prompt and generated alike; 0 for a machine of one's own.
        max_tokens: Most tokens it generates for one answer.
        context_tokens: Most tokens it can read and generate in one request, if known.
    """

    name: str
    description: str
    examples: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    tier: Tier = Tier.END
    modalities: tuple[Modality, ...] = (Modality.TEXT,)
    price_per_mtok: float = 0.0
    max_tokens: int = 256
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        if ID.fullmatch(self.name) is None:
            raise InvalidRequest(f"expert name {self.name!r} must match {ID.pattern}")
        if not self.description.strip():
            raise InvalidRequest(f"expert {self.name!r} needs a description: routing reads it")
        if not (self.price_per_mtok >= 0 and math.isfinite(self.price_per_mtok)):
            raise InvalidRequest(f"price_per_mtok of expert {self.name!r} is {self.price_per_mtok}; it must be ≥ 0")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens of expert {self.name!r} is {self.max_tokens}; it must be ≥ 1")

    def cost_of(self, tokens: int) -> float:
        """Money for that many tokens."""
        return self.price_per_mtok * tokens / 1e6
