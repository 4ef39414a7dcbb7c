"""fed.toml: its words, its checks, and how it is read."""

from fed.config.dump import to_plain, to_toml
from fed.config.load import FILE_NAME, load_config, parse_config, template
from fed.config.settings import (
    AggregateSettings,
    ChangeSettings,
    ClusterSettings,
    DataSettings,
    FedConfig,
    FleetSettings,
    ModelSettings,
    RunSettings,
    ServerSettings,
)

__all__ = [
    "FILE_NAME",
    "AggregateSettings",
    "ChangeSettings",
    "ClusterSettings",
    "DataSettings",
    "FedConfig",
    "FleetSettings",
    "ModelSettings",
    "RunSettings",
    "ServerSettings",
    "load_config",
    "parse_config",
    "template",
    "to_plain",
    "to_toml",
]
