"""What a run of `agora fed` is made of, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from agora.config.values import Count, Device, FilePath, Name, NotNegative, Positive, Source, Text
from agora.errors import ConfigError
from fed.chain import Chain
from fed.config.tables import APART
from fed.data import Iid, Split, Template
from fed.fleet import Move
from fed.pace import Pace
from fed.trainer.settings import AdapterSettings, TrainSettings

EVAL_ROWS: Final = 200
"""Rows to judge on: the standard error of an accuracy of 0.85 is then 0.025, and SmolLM2-135M takes some ten seconds
on two cores."""

EVERY_S: Final = 30.0
"""Seconds of real time between two checkpoints, as in `fed.simulator.words`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """`[model]`: the base model, which stays as it is.

    Attributes:
        source: An alias of the catalogue (`agora models list`), a folder (`./NAME`), or a hub id.
        dtype: Number format of the frozen weights; what is trained is float32.
        device: `cpu`, `cuda`, `cuda:1`, …
        threads: CPU threads; None for torch's own choice. Another number gives other last bits.
    """

    source: Source
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Device = "cpu"
    threads: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """`[data]`: the rows, and who has which.

    Attributes:
        source: Kind of data; what else is needed depends on it.
        path: The file, of `jsonl`.
        name: Task of `glue`, set of `instructions`, file of `title_abstract`.
        folder: Folder with the data sets; None for a hub.
        split: `train` or what else the data has.
        limit: Rows to read at most.
        template: How rows of `jsonl` become examples.
        clients: How many clients; None where the partition can tell.
        partition: How rows are divided.
        eval_rows: Rows that every model is judged on; 0 for none.
        eval_path: File they are read from, of `jsonl`; None to hold them back from the rows.
        eval_split: Split they are read from, of the others; None to hold them back from the rows.
        eval_per_client: Rows held back at each client, on which the model it belongs to is judged, too.
    """

    source: Literal["jsonl", "glue", "instructions", "title_abstract"]
    path: FilePath | None = None
    name: Text | None = None
    folder: FilePath | None = None
    split: Text = "train"
    limit: Count | None = None
    template: Template | None = field(default=None, metadata=APART)
    clients: Count | None = None
    partition: Split = field(default_factory=Iid, metadata=APART)
    eval_rows: int = EVAL_ROWS
    eval_path: FilePath | None = None
    eval_split: Text | None = None
    eval_per_client: int = 0

    def __post_init__(self) -> None:
        if self.eval_rows < 0:
            raise ConfigError(f"eval_rows is {self.eval_rows}; it must be a whole number from 0")
        if self.eval_per_client < 0:
            raise ConfigError(f"eval_per_client is {self.eval_per_client}; it must be a whole number from 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSettings:
    """`[[fleet.changes]]`: a client comes or goes."""

    at: NotNegative
    client: Text
    what: Move


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """`[fleet]`: modelled machines and links; see `fed.fleet.fleet`.

    Attributes:
        speeds: Distribution of the clients' speeds (`fed.fleet.SPEEDS`).
        parameters: Its own: `sigma` of the lognormal, `factors` of the tiers.
        seconds_per_step: What its factors are multiplied by: a median client's seconds for a training step.
        up_bytes_per_s: Of every link; None for endless.
        down_bytes_per_s: Of every link; None for endless.
        round_trip_s: Of every link.
        jitter: σ of a lognormal factor on each job's compute time.
        loss: Probability that a job comes to nothing.
        loss_of: The same by client.
        silent: Share of lost jobs that nobody tells of.
        ranks: LoRA ranks, dealt out to the clients in turn; None for the server's own.
        changes: Who comes and goes.
        seed: Of all that; None for that of the run.
    """

    speeds: Text = "constant"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seconds_per_step: Positive = 1.0
    up_bytes_per_s: Positive | None = None
    down_bytes_per_s: Positive | None = None
    round_trip_s: NotNegative = 0.0
    jitter: NotNegative = 0.0
    loss: float = 0.0
    loss_of: Mapping[str, float] = field(default_factory=dict)
    silent: float = 0.0
    ranks: tuple[Count, ...] | None = None
    changes: tuple[ChangeSettings, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """`[run]`.

    Attributes:
        seed: Of everything random.
        evaluate_every: Versions of a model between two judgements; 0 for the first and the last only.
        checkpoint_every: Versions between two checkpoints; None to go by time.
        checkpoint_s: Seconds of real time between two, where `checkpoint_every` is None.
        out: Folder of the results.
        name: What the run is called in headers and reports.
    """

    seed: int = 0
    evaluate_every: int = 1
    checkpoint_every: Count | None = None
    checkpoint_s: NotNegative = EVERY_S
    out: FilePath = Path("fed-run")
    name: Name = "federation"

    def __post_init__(self) -> None:
        if self.evaluate_every < 0:
            raise ConfigError(f"evaluate_every is {self.evaluate_every}; it must be a whole number from 0")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to 2⁶³ − 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """`[server]`: a preset of `fed.pace.PRESETS`, and what of it is changed."""

    preset: str
    pace: Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateSettings:
    """`[aggregate]`: a rule of `fed.aggregate.rules.RULES`, and its settings."""

    rule: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """`[clusters]`: how clients are grouped, and the settings of that."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedConfig:
    """All of `fed.toml`; each part is a table.

    Attributes:
        model: The base model.
        data: The rows.
        server: How fast it goes about it.
        adapter: What is trained.
        training: How.
        aggregate: How versions are made.
        chain: What updates go through before they travel.
        clusters: How clients are grouped; None for one model.
        fleet: Machines and links.
        run: The rest.
        file: Where it was read.
    """

    model: ModelSettings
    data: DataSettings
    server: ServerSettings
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    aggregate: AggregateSettings = field(default_factory=lambda: AggregateSettings(rule="delta"))
    chain: Chain = field(default_factory=Chain)
    clusters: ClusterSettings | None = None
    fleet: FleetSettings = field(default_factory=FleetSettings)
    run: RunSettings = field(default_factory=RunSettings)
    file: Path | None = field(default=None, compare=False)
