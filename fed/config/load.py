"""Reads `fed.toml`: every table is checked, and what they say of each other."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from agora.config.problems import Key, Problem, error_of, nearest, read_text, shown
from agora.errors import AgoraError, ConfigError
from fed.aggregate.rules import RULES, default
from fed.chain import STAGES, Chain
from fed.config.grouping import read_clusters
from fed.config.settings import (
    AggregateSettings,
    DataSettings,
    FedConfig,
    FleetSettings,
    ModelSettings,
    RunSettings,
    ServerSettings,
)
from fed.config.tables import Wrong, plain, read, told
from fed.data import GLUE, INSTRUCTIONS, PARTITIONS, Iid, Template
from fed.fleet import SPEEDS, fleet
from fed.pace import PRESETS, Pace
from fed.trainer.settings import AdapterSettings, TrainSettings

FILE_NAME: Final = "fed.toml"

MAX_FILE_BYTES: Final = 1_000_000
"""Bytes of a configuration file, as for `agora.toml`."""

DEFAULT_K: Final = 4
"""Buffer of the preset `fedbuff` where the file does not say: `Pace`'s own."""

COHORT: Final = 16
"""Jobs at once where the file does not say: `Pace`'s own. With fewer clients there are as many as clients."""

TABLES: Final = (
    *("model", "data", "adapter", "training", "server", "aggregate", "chain", "clusters", "hierarchy", "fleet", "run"),
)
"""All that may stand in the file."""

_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "jsonl": ("path", "template"),
    "glue": ("name",),
    "instructions": ("name",),
    "title_abstract": ("name", "folder"),
}
"""Keys of `[data]` that a kind of data cannot do without."""

_ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    "path": ("jsonl",),
    "template": ("jsonl",),
    "eval_path": ("jsonl",),
    "name": ("glue", "instructions", "title_abstract"),
    "folder": ("glue", "instructions", "title_abstract"),
    "eval_split": ("glue",),
}
"""Kinds of data that have these keys of `[data]`."""

_NAMES: Final[Mapping[str, tuple[str, ...]]] = {"glue": tuple(GLUE), "instructions": tuple(INSTRUCTIONS)}

D = TypeVar("D")


def template() -> str:
    """The commented `fed.toml` that `agora fed init` writes."""
    return resources.files("fed").joinpath("template.toml").read_text(encoding="utf-8")


def load_config(path: Path | str = FILE_NAME) -> FedConfig:
    """Reads and checks a configuration.

    Raises:
        ConfigError: If the file cannot be read or anything in it is wrong; the message tells all that is.
    """
    file = Path(path).expanduser().absolute()
    if not file.exists():
        raise ConfigError(f"{file} does not exist", hint="'agora fed init' writes one that runs as it stands")
    return parse_config(read_text(file, max_bytes=MAX_FILE_BYTES), file=file)


def parse_config(text: str, *, file: Path | None) -> FedConfig:
    """Checks the text of a configuration.

    Args:
        text: TOML.
        file: Where it was read, for messages and relative paths; None to count them from the working folder.

    Raises:
        ConfigError: If anything in it is wrong.
    """
    origin = str(file) if file else "the configuration"
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{origin}: not valid TOML: {e}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: not valid TOML: nested too deeply") from None
    reading = _Reading(given, file.parent if file else Path.cwd())
    config = reading.config()
    if reading.problems or config is None:
        raise error_of(reading.problems, origin=origin, text=text)
    return replace(config, file=file)


class _Reading:
    """One file being read: what is wrong is gathered, so that all of it is told at once."""

    def __init__(self, given: Mapping[str, Any], folder: Path) -> None:
        self.given, self.folder = given, folder
        self.problems: list[Problem] = []

    def config(self) -> FedConfig | None:
        """The configuration; None if anything is wrong with it."""
        for name in self.given:
            if name not in TABLES:
                self._wrong((name,), f"unknown key; {nearest(name, TABLES)}")
        if "hierarchy" in self.given:
            self._wrong(("hierarchy",), "a run through edges is not read from a file yet; leave the table out")
        model = self._table("model", ModelSettings)
        data = self._try(self._data)
        adapter = self._table("adapter", AdapterSettings)
        training = self._table("training", TrainSettings)
        server = self._try(self._server)
        fleeted = self._table("fleet", FleetSettings)
        run = self._table("run", RunSettings)
        aggregate = self._try(lambda: self._aggregate(adapter))
        chain = self._try(self._chain)
        clusters = None
        if "clusters" in self.given:
            count = data.clients if data else None
            clusters = self._try(lambda: read_clusters(self.given["clusters"], count, folder=self.folder))
        if adapter and training and training.freeze_a and adapter.method != "lora":
            self._wrong(("training", "freeze_a"), f"is for LoRA; the method is {adapter.method}")
        if aggregate and training and aggregate.rule == "freeze_a" and not training.freeze_a:
            self._wrong(("aggregate", "rule"), "needs freeze_a = true in [training]", aggregate.rule)
        if fleeted:
            self._fleet(fleeted)
        if fleeted and adapter and fleeted.ranks and adapter.method != "lora":
            self._wrong(("fleet", "ranks"), f"are LoRA's; the method is {adapter.method}")
        if self.problems:
            return None
        # None of them is missing where nothing is wrong.
        assert model and data and adapter and training and server and aggregate and chain is not None
        assert fleeted and run
        if not run.out.is_absolute():
            run = replace(run, out=self.folder / run.out)
        return FedConfig(
            model=model,
            data=data,
            adapter=adapter,
            training=training,
            server=server,
            aggregate=aggregate,
            chain=chain,
            clusters=clusters,
            fleet=fleeted,
            run=run,
        )

    def _wrong(self, key: Key, text: str, value: object = None) -> None:
        self.problems.append(Problem(key=key, text=text, value="" if value is None else shown(value)))

    def _try(self, make: Callable[[], D]) -> D | None:
        try:
            return make()
        except Wrong as e:
            self.problems += e.problems
            return None

    def _table(self, name: str, into: type[D]) -> D | None:
        return self._try(lambda: read(into, self.given.get(name, {}), (name,), folder=self.folder))

    def _data(self) -> DataSettings:
        key = ("data",)
        if not isinstance(self.given.get("data", {}), Mapping):
            return read(DataSettings, self.given["data"], key, folder=self.folder)
        given = dict(self.given.get("data", {}))
        inner, divided = given.pop("template", None), given.pop("partition", {})
        found: dict[str, Any] = {}
        with_inner = None if inner is None else self._try(lambda: self._template(inner))
        split = self._try(lambda: self._named(divided, ("data", "partition"), PARTITIONS, "iid"))
        data = read(DataSettings, given, key, folder=self.folder)
        if inner is not None:
            found["template"] = with_inner
        data = replace(data, partition=split or Iid(), **found)
        problems = list(_data_problems(data, {*given, *(["template"] if inner is not None else [])}))
        if divided == {} or not isinstance(divided, Mapping) or divided.get("kind") != "group":
            own_shares = getattr(split, "shares", None)
            if data.clients is None and own_shares is None and split is not None:
                problems.append(Problem(key=("data", "clients"), text="is required with this partition"))
        if problems:
            raise Wrong(problems)
        return data

    def _template(self, given: Any) -> Template:
        found = read(Template, given, ("data", "template"), folder=self.folder)
        try:
            found.reader()
        except AgoraError as e:
            raise Wrong([told(e, ("data", "template"), given)]) from None
        return found

    def _named(self, given: Any, key: Key, registry: Mapping[str, type[D]], usual: str) -> D:
        """What a table's `kind` names, made of the table's other keys."""
        if not isinstance(given, Mapping):
            raise Wrong([Problem(key=key, text=f"must be a table, written [{'.'.join(key)}]", value=shown(given))])
        settings = dict(given)
        kind = settings.pop("kind", usual)
        if not isinstance(kind, str) or kind not in registry:
            raise Wrong([Problem(key=(*key, "kind"), text=nearest(str(kind), registry), value=shown(kind))])
        return read(registry[kind], settings, key, folder=self.folder)

    def _server(self) -> ServerSettings:
        key = ("server",)
        given = self.given.get("server", {})
        if not isinstance(given, Mapping):
            read(Pace, given, key, folder=self.folder)
        settings = dict(given)
        preset = settings.pop("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise Wrong([Problem(key=("server", "preset"), text=nearest(str(preset), PRESETS), value=shown(preset))])
        pace = read(Pace, settings, key, folder=self.folder, make=lambda **given: pace_of(preset, given))
        if pace.publications is None and pace.jobs is None and pace.seconds is None:
            text = "nothing ends the run: set publications, jobs or seconds"
            raise Wrong([Problem(key=key, text=text)])
        return ServerSettings(preset=preset, pace=pace)

    def _aggregate(self, adapter: AdapterSettings | None) -> AggregateSettings:
        given = self.given.get("aggregate", {})
        if not isinstance(given, Mapping):
            raise Wrong([Problem(key=("aggregate",), text="must be a table, written [aggregate]", value=shown(given))])
        settings = dict(given)
        method = adapter.method if adapter else AdapterSettings().method
        rule = settings.pop("rule", default(method))
        if not isinstance(rule, str) or rule not in RULES:
            raise Wrong([Problem(key=("aggregate", "rule"), text=nearest(str(rule), RULES), value=shown(rule))])
        options = read(RULES[rule].options_type, settings, ("aggregate",), folder=self.folder)
        if adapter is not None and method not in RULES[rule].methods:
            fit = sorted(name for name, kind in RULES.items() if method in kind.methods)
            text = f"is not for {method} adapters; allowed: {', '.join(fit)}"
            raise Wrong([Problem(key=("aggregate", "rule"), text=text, value=shown(rule))])
        return AggregateSettings(rule=rule, settings={f.name: getattr(options, f.name) for f in fields(options)})

    def _chain(self) -> Chain:
        given = self.given.get("chain", [])
        if not isinstance(given, list) or not all(isinstance(entry, Mapping) for entry in given):
            raise Wrong([Problem(key=("chain",), text="must be tables, written [[chain]]", value=shown(given))])
        stages = []
        for number, entry in enumerate(given):
            key = ("chain", str(number))
            if "kind" not in entry:
                raise Wrong([Problem(key=(*key, "kind"), text=f"is required; allowed: {', '.join(STAGES)}")])
            settings = {name: value for name, value in entry.items() if name != "kind"}
            kind = entry["kind"]
            if not isinstance(kind, str) or kind not in STAGES:
                raise Wrong([Problem(key=(*key, "kind"), text=nearest(str(kind), STAGES), value=shown(kind))])
            stages.append(read(STAGES[kind], settings, key, folder=self.folder))
        try:
            return Chain(tuple(stages))
        except ConfigError as e:
            hint = f"; {e.hint}" if e.hint else ""
            raise Wrong([Problem(key=("chain",), text=e.message.removeprefix("chain: ") + hint)]) from None

    def _fleet(self, found: FleetSettings) -> None:
        """Makes one to see whether it can be: names of clients are known only when rows are divided."""
        names = [*found.loss_of, *(change.client for change in found.changes)]
        if found.speeds not in SPEEDS:
            self._wrong(("fleet", "speeds"), nearest(found.speeds, SPEEDS), found.speeds)
            return
        try:
            fleet(
                len(names) or 1,
                speeds=found.speeds,
                parameters=found.parameters,
                jitter=found.jitter,
                loss=found.loss,
                silent=found.silent,
            )
            for value in found.loss_of.values():
                fleet(1, loss=value)
        except ConfigError as e:
            self.problems.append(told(e, ("fleet",), plain(found)))
        except TypeError:
            self._wrong(("fleet", "parameters"), "must be numbers", str(dict(found.parameters)))


def pace_of(preset: str, settings: Mapping[str, Any]) -> Pace:
    """A preset with some of it changed.

    Args:
        preset: One of `PRESETS`.
        settings: Fields of `Pace`; `cohort` and `buffer` are what the preset is made from.

    Raises:
        ConfigError: If they do not go together.
    """
    make, others = PRESETS[preset], dict(settings)
    cohort = others.pop("cohort", COHORT)
    first = {"k": DEFAULT_K} if "k" in inspect.signature(make).parameters else {}
    return make(cohort, **first).but(**others)


def _data_problems(data: DataSettings, given: set[str]) -> Iterator[Problem]:
    for name in _NEEDED[data.source]:
        if name not in given:
            yield Problem(key=("data", name), text=f'is required with source = "{data.source}"')
    for name, kinds in _ONLY.items():
        if name in given and data.source not in kinds:
            text = f'is not for source = "{data.source}", but for {", ".join(kinds)}'
            yield Problem(key=("data", name), text=text)
    allowed = _NAMES.get(data.source)
    if allowed and data.name is not None and data.name not in allowed:
        yield Problem(key=("data", "name"), text=nearest(data.name, allowed), value=shown(data.name))
    for name, path in (("path", data.path), ("eval_path", data.eval_path)):
        if path is not None and not path.is_file():
            yield Problem(key=("data", name), text="is not a file", value=shown(str(path)))
    if data.folder is not None and not data.folder.is_dir():
        yield Problem(key=("data", "folder"), text="is not a folder", value=shown(str(data.folder)))
    if data.source == "instructions" and data.folder is None and data.name not in (None, "openorca"):
        yield Problem(key=("data", "folder"), text=f"is required for {data.name}: only openorca is on a hub")
