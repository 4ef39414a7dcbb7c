"""The routers by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from agora.protocols import Embedder
from agora.routing.embedding import EmbeddingRouter
from agora.routing.fallback import FallbackRouter
from agora.routing.keywords import KeywordRouter
from agora.routing.router import Router

NO_EMBEDDER: Final = "no embedding model is there"
"""Said in every explanation where embeddings were wanted and could not be had."""


def _embedding(embedder: Embedder | None) -> Router:
    if embedder is None:
        return KeywordRouter(note=NO_EMBEDDER)
    return FallbackRouter(EmbeddingRouter(embedder), KeywordRouter())


def _keywords(embedder: Embedder | None) -> Router:
    return KeywordRouter()


ROUTERS: Final[Mapping[str, Callable[[Embedder | None], Router]]] = MappingProxyType(
    {"embedding": _embedding, "keywords": _keywords}
)
"""Makes a router from the embedder at hand, if there is one. `embedding` falls back to keywords, and says so."""
