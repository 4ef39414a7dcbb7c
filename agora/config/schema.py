"""What may stand in `agora.toml`: one class for each table, checked by pydantic.

The classes say which keys there are, of which type and within which limits. What needs more than one table to be
checked (an expert's node, a node's model) is in `agora.config.load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import platformdirs
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from agora.config.collaboration import LinkConfig, MultiAccessConfig, VerticalConfig
from agora.config.nodes import NodeConfig
from agora.config.serving import NeighbourConfig, ServerConfig
from agora.config.table import Table
from agora.config.values import (
    AdapterName,
    Count,
    Database,
    Device,
    FilePath,
    Name,
    NotNegative,
    Positive,
    Source,
    Text,
    Texts,
)
from agora.errors import InvalidRequest
from agora.types import LABELS, MAX_SUBTASKS, Modality, Subtask, TaskGraph, Tier, reach_of

DEFAULT_MAX_TOKENS: Final = 192
"""Tokens of one answer: ~150 words, 14 s of the smallest packaged model on two CPU cores, alone or with four others."""


class ModelConfig(Table):
    """`[models.NAME]`: weights that run in this process.

    Attributes:
        source: An alias of the catalogue (`agora models list`), a folder with safetensors (`./NAME`), or a hub id.
        dtype: Number format of the weights in memory; absent for float32.
        max_batch: Most requests decoded together.
        max_queue: Most requests waiting; further ones are refused as overloaded.
        max_context: Tokens of prompt and answer together, where less than the model's own limit is wanted.
        threads: CPU threads of one operation; absent for torch's own choice.
        device: `cpu`, `cuda`, `cuda:1`, …
    """

    source: Source
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_batch: Count | None = None
    max_queue: Annotated[int, Field(ge=0)] | None = None
    max_context: Annotated[int, Field(ge=2)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    device: Device | None = None


class AdapterConfig(Table):
    """An expert's LoRA adapter.

    Attributes:
        name: `name@vN`.
        folder: Where its safetensors are, for a local node; a server knows its adapters by name.
    """

    name: AdapterName
    folder: FilePath | None = None


class ExpertConfig(Table):
    """`[experts.NAME]`: someone who can be asked; either a ready one or described here.

    Attributes:
        node: Which node answers.
        also: Other nodes that answer the same, and neighbours that have an expert of this name; for graph
            "multi_access".
        ready: Name of a ready expert to start from; the other keys override what it brings.
        description: What it is good at, one or two sentences.
        examples: Questions it answers well.
        keywords: Words of its field.
        system_prompt: What it is told before every question.
        adapter: LoRA adapter to answer with.
        modalities: What it takes.
        price_per_mtok: Money per million tokens.
        max_tokens: Most tokens of one answer.
        temperature: 0 for greedy decoding.
    """

    node: Name
    also: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    ready: Text | None = None
    description: Text | None = None
    examples: Texts | None = None
    keywords: Texts | None = None
    system_prompt: Text | None = None
    adapter: AdapterConfig | None = None
    modalities: (
        Annotated[tuple[Annotated[Modality, Field(strict=False)], ...], Field(strict=False, min_length=1)] | None
    ) = None
    price_per_mtok: NotNegative = 0.0
    max_tokens: Count = DEFAULT_MAX_TOKENS
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0

    @model_validator(mode="after")
    def _described(self) -> ExpertConfig:
        if self.ready is None and self.description is None:
            raise ValueError('needs either ready = "…" (see: agora experts list --ready) or a description')
        return self


def _label(value: object) -> object:
    try:
        return reach_of(value)
    except InvalidRequest:
        raise ValueError(f"must be one of {', '.join(LABELS)}") from None


Reach = Annotated[Tier, BeforeValidator(_label)]


class SubtaskConfig(Table):
    """`[[graph.subtasks]]`: one subtask of a fixed plan; see `agora.types.Subtask`.

    Attributes:
        reach: How far up from this machine it may go, and whatever uses its answer: `local`, `edge` or `cloud`.
    """

    id: Text
    question: Text
    inputs: Texts = ()
    expert: Name | None = None
    max_tokens: Count | None = None
    reach: Reach = Tier.CLOUD


class GraphConfig(Table):
    """`[graph]`: how experts reason together.

    Attributes:
        name: Which graph.
        planner: Who splits the question into subtasks.
        planner_expert: The expert that plans, for planner "llm".
        subtasks: The plan, for planner "static"; `{question}` in them stands for the question.
        router: Who chooses the expert of a subtask.
        synthesiser: Who makes one answer of the parts.
        synthesiser_expert: The expert that does so, for synthesiser "llm".
        max_parallel: Most subtasks running at once.
        max_attempts: Most experts tried for one subtask.
        deadline_s: Seconds for a whole run; absent for no limit.
        cost: Most money for a run.
        tokens: Most tokens for a run.
    """

    name: Text = "horizontal"
    planner: Text = "rules"
    planner_expert: Name | None = None
    subtasks: Annotated[tuple[SubtaskConfig, ...], Field(strict=False, max_length=MAX_SUBTASKS)] = ()
    router: Text = "embedding"
    synthesiser: Text = "sections"
    synthesiser_expert: Name | None = None
    max_parallel: Annotated[int, Field(ge=1, le=1024)] = 16
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    deadline_s: Positive | None = None
    cost: Positive | None = None
    tokens: Count | None = None

    @property
    def plan(self) -> TaskGraph | None:
        """The fixed plan, or None if there are no `subtasks`.

        Raises:
            InvalidPlan: If they do not make a valid task graph.
        """
        if not self.subtasks:
            return None
        return TaskGraph(tuple(Subtask(**dict(s)) for s in self.subtasks))


class StoreConfig(Table):
    """`[store]`: where runs are kept.

    Attributes:
        path: SQLite file; absent for `runs.sqlite` in the user's data folder.
        url: PostgreSQL server instead (extra `postgres`), without a password.
    """

    path: FilePath | None = None
    url: Database | None = None

    @model_validator(mode="after")
    def _one(self) -> StoreConfig:
        if self.path is not None and self.url is not None:
            raise ValueError("has both path and url; leave one out")
        return self

    @property
    def where(self) -> Path | str:
        """The server's URL, or else the SQLite file, default filled in."""
        return self.url or self.path or platformdirs.user_data_path("agora") / "runs.sqlite"


class Config(Table):
    """The whole of `agora.toml`, validated."""

    server: ServerConfig = ServerConfig()
    models: dict[Name, ModelConfig] = Field(default_factory=dict)
    nodes: dict[Name, NodeConfig] = Field(default_factory=dict)
    experts: dict[Name, ExpertConfig] = Field(default_factory=dict)
    neighbours: dict[Name, NeighbourConfig] = Field(default_factory=dict)
    graph: GraphConfig = GraphConfig()
    vertical: VerticalConfig = VerticalConfig()
    multi_access: MultiAccessConfig = MultiAccessConfig()
    links: dict[Name, LinkConfig] = Field(default_factory=dict)
    store: StoreConfig = StoreConfig()

    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """The file this was read from; None for the built-in configuration."""
        return self._file

    @property
    def origin(self) -> str:
        """What to call this configuration in messages."""
        return str(self._file) if self._file else "the built-in configuration"
