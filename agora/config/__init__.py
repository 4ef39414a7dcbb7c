"""agora.toml: its words, its checks, and how it is read."""

from agora.config.load import check_config, default_config, find_config, load_config, may_join, parse_config, template
from agora.config.nodes import (
    CapabilitiesConfig,
    FakeNode,
    LlamaCppNode,
    LocalNode,
    NodeConfig,
    OpenAINode,
    VllmNode,
)
from agora.config.schema import (
    AdapterConfig,
    Config,
    ExpertConfig,
    GraphConfig,
    ModelConfig,
    StoreConfig,
    SubtaskConfig,
)
from agora.config.serving import NeighbourConfig, ServerConfig

__all__ = [
    "AdapterConfig",
    "CapabilitiesConfig",
    "Config",
    "ExpertConfig",
    "FakeNode",
    "GraphConfig",
    "LlamaCppNode",
    "LocalNode",
    "ModelConfig",
    "NeighbourConfig",
    "NodeConfig",
    "OpenAINode",
    "ServerConfig",
    "StoreConfig",
    "SubtaskConfig",
    "VllmNode",
    "check_config",
    "default_config",
    "find_config",
    "load_config",
    "may_join",
    "parse_config",
    "template",
]
