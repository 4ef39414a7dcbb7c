"""Choosing who answers: routers that rank the experts in the square for a subtask, and can explain it."""

from agora.routing.embedding import EmbeddingRouter
from agora.routing.fallback import FallbackRouter
from agora.routing.keywords import KeywordRouter
from agora.routing.order import Weights
from agora.routing.registry import ROUTERS
from agora.routing.router import Candidate, Ranking, Router

__all__ = [
    "ROUTERS",
    "Candidate",
    "EmbeddingRouter",
    "FallbackRouter",
    "KeywordRouter",
    "Ranking",
    "Router",
    "Weights",
]
