"""What is known of a loaded model besides its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experts.adapters import LayerShape
from experts.engine.text import Codec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """May be kept after the model is gone: it holds no weights.

    Attributes:
        name: Of the model: that of its folder.
        codec: Its tokenizer.
        eos: Tokens that end a generation.
        max_context: Tokens of prompt and answer together, if the model has a limit.
        layers: Linear layers that adapters can change, by name.
    """

    name: str
    codec: Codec
    eos: frozenset[int]
    max_context: int | None
    layers: Mapping[str, LayerShape]
