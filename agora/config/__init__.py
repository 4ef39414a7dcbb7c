"""agora.toml: its words, its checks, and how it is read."""

from agora.config.collaboration import HERE, LinkConfig, MultiAccessConfig, VerticalConfig
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
    "HERE",
    "AdapterConfig",
    "CapabilitiesConfig",
    "Config",
    "ExpertConfig",
    "FakeNode",
    "GraphConfig",
    "LinkConfig",
    "LlamaCppNode",
    "LocalNode",
    "ModelConfig",
    "MultiAccessConfig",
    "NeighbourConfig",
    "NodeConfig",
    "OpenAINode",
    "ServerConfig",
    "StoreConfig",
    "SubtaskConfig",
    "VerticalConfig",
    "VllmNode",
    "check_config",
    "default_config",
    "find_config",
    "load_config",
    "may_join",
    "parse_config",
    "template",
]
