"""agora.toml: its words, its checks, and how it is read."""

from agora.config.load import check_config, default_config, find_config, load_config, parse_config, template
from agora.config.schema import (
    AdapterConfig,
    CapabilitiesConfig,
    Config,
    ExpertConfig,
    FakeNode,
    GraphConfig,
    LocalNode,
    ModelConfig,
    NodeConfig,
    OpenAINode,
    ServerConfig,
    StoreConfig,
    SubtaskConfig,
)

__all__ = [
    "AdapterConfig",
    "CapabilitiesConfig",
    "Config",
    "ExpertConfig",
    "FakeNode",
    "GraphConfig",
    "LocalNode",
    "ModelConfig",
    "NodeConfig",
    "OpenAINode",
    "ServerConfig",
    "StoreConfig",
    "SubtaskConfig",
    "check_config",
    "default_config",
    "find_config",
    "load_config",
    "parse_config",
    "template",
]
