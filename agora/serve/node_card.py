"""A node's card: who it is, and which experts can be asked through it. How it is written, and how strictly it is read.

    {"node": {"id": "9f3a…", "name": "edge-2", "version": "0.2.0"},
     "revision": "9f3a…-7",
     "loads": {"e0": {"running": 3, "waiting": 0}},
     "experts": [{"name": "finance", "description": "…", …, "capabilities": {…}, "engine": "e0",
                  "path": ["9f3a…"], "origin": "9f3a…", "origin_name": "edge-2", "name_there": "finance", "hops": 0,
                  "made_of": "77aa…"}]}

`path` holds the machines that a request to the expert passes, this node first, its own (`origin`) last. Whoever sees
itself in a path drops it, so that routes neither form circles nor outlive their end by counting up: a path-vector
protocol, as BGP is (RFC 4271, section 9.1.2). Experts with the same `engine` share its load. A reader who names the
`revision` it knows gets `experts: null` for as long as that holds, and the loads alone. `made_of` stands for the model,
adapter and prompt of an expert: what was learned of its answers counts for as long as it stays the same.

There are no prompts, keys or addresses in a card.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from agora.config.values import AnyTier, Name, NotNegative
from agora.errors import BadReply
from agora.protocols import Backend, Capabilities, Load
from agora.square import Expert, Square
from agora.types import ExpertCard, Modality, to_plain
from agora.types.tasks import MAX_TOKENS
from experts.passage import MOST_HOPS
from graphs.calibration_version import aliases_now, fingerprint

MAX_CARD_BYTES: Final = 2**20
"""Largest card read. 256 experts as wordy as the ready ones (2.1 kB each) are half of it."""

MAX_EXPERTS: Final = 256
"""Most experts on one card: what a router ranks in milliseconds."""

MAX_EXAMPLES: Final = 16
"""Most examples of an expert told to other nodes; twice those of a ready one. Whoever routes embeds them all."""

MAX_KEYWORDS: Final = 64
"""Most keywords of an expert told to other nodes; the ready ones have some 40."""

MAX_TEXT_CHARS: Final = 500
"""Most characters of one example or keyword told to other nodes."""

MAX_DESCRIPTION_CHARS: Final = 2_000
"""Most characters of a description told to other nodes."""

MAX_EXPERT_BYTES: Final = 16 * 1024
"""Most bytes of one expert on a card; eight times a ready one."""

MAX_LOAD: Final = 10**6
"""Most requests that anybody is believed to be busy with."""


def _printable(value: object) -> object:
    """Text of another machine ends up in terminals and logs: without control characters it can only be read."""
    return "".join(c if c.isprintable() else " " for c in value).strip() if isinstance(value, str) else value


class _Read(BaseModel):
    # Unknown keys are ignored: a newer node may tell more.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


NodeId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
_Text = Annotated[str, BeforeValidator(_printable), StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]
_Examples = Annotated[tuple[_Text, ...], Field(strict=False, max_length=MAX_EXAMPLES)]
_Keywords = Annotated[tuple[_Text, ...], Field(strict=False, max_length=MAX_KEYWORDS)]
_Engine = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]{1,16}$")]
_Path = Annotated[tuple[NodeId, ...], Field(strict=False, min_length=1, max_length=MOST_HOPS + 1)]
_Modalities = Annotated[
    tuple[Annotated[Modality, Field(strict=False)], ...], Field(strict=False, min_length=1, max_length=len(Modality))
]
_Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class Node(_Read):
    """Who a node is: an id that is new with each start, the name its owner gave it, agora's version, and where its
    machine stands, if its owner says."""

    id: NodeId
    name: Name
    version: Annotated[str, BeforeValidator(_printable), StringConstraints(max_length=64)] = ""
    tier: AnyTier | None = None


class ToldLoad(_Read):
    """How busy an engine is."""

    running: Annotated[int, Field(ge=0, le=MAX_LOAD)]
    waiting: Annotated[int, Field(ge=0, le=MAX_LOAD)]


class ToldCapabilities(_Read):
    """What an expert can do over HTTP; scores and adapters stay at home."""

    chat: bool = True
    completion: bool = False
    logprobs: bool = False
    json_schema: bool = False
    seed: bool = False
    max_context: _Tokens | None = None


class ToldExpert(_Read):
    """One expert of a card."""

    name: Name
    description: Annotated[
        str, BeforeValidator(_printable), StringConstraints(min_length=1, max_length=MAX_DESCRIPTION_CHARS)
    ]
    examples: _Examples = ()
    keywords: _Keywords = ()
    tier: AnyTier
    modalities: _Modalities = (Modality.TEXT,)
    price_per_mtok: NotNegative
    max_tokens: _Tokens
    context_tokens: _Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    capabilities: ToldCapabilities
    engine: _Engine
    path: _Path
    origin: NodeId
    origin_name: Name
    name_there: Name
    hops: Annotated[int, Field(ge=0, le=MOST_HOPS)]
    made_of: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,64}$")] = ""

    @model_validator(mode="after")
    def _consistent(self) -> ToldExpert:
        if len(set(self.path)) != len(self.path):
            raise ValueError("its path passes a machine twice")
        if self.path[-1] != self.origin:
            raise ValueError("its path does not end at its origin")
        if self.hops != len(self.path) - 1:
            raise ValueError(f"hops is {self.hops}, and its path has {len(self.path) - 1}")
        return self

    def card(self, name: str) -> ExpertCard:
        """Its card here, under the name that it has here."""
        return ExpertCard(
            name=name,
            description=self.description,
            examples=self.examples,
            keywords=self.keywords,
            tier=self.tier,
            modalities=self.modalities,
            price_per_mtok=self.price_per_mtok,
            max_tokens=self.max_tokens,
            context_tokens=self.context_tokens,
        )

    def can(self) -> Capabilities:
        """What it claims."""
        return Capabilities(**dict(self.capabilities))


class _Card(_Read):
    node: Node
    revision: Annotated[str, StringConstraints(pattern=r"^[0-9a-zA-Z-]{1,64}$")]
    loads: Annotated[dict[_Engine, ToldLoad], Field(max_length=MAX_EXPERTS)]
    experts: Annotated[tuple[Any, ...], Field(strict=False, max_length=MAX_EXPERTS)] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCard:
    """A card that was read and found right.

    Attributes:
        node: Who tells it.
        revision: Changes whenever the experts do.
        loads: How busy each engine is.
        experts: Those that can be asked; None if they are those of the revision that the reader named.
        refused: What was wrong with entries that were left out.
    """

    node: Node
    revision: str
    loads: Mapping[str, Load]
    experts: tuple[ToldExpert, ...] | None
    refused: tuple[str, ...] = ()


class WrongCard(BadReply):
    """What came is no card, or one that cannot be believed: it vouches for nobody."""


def read_card(data: bytes) -> NodeCard:
    """Reads what a neighbour says of itself; an entry that is wrong is left out, and the others count.

    Raises:
        WrongCard: If it is no card at all, or the card as a whole is wrong.
    """
    try:
        card = _Card.model_validate(orjson.loads(data))
    except orjson.JSONDecodeError as e:
        raise WrongCard(f"its card is not valid JSON: {e}") from None
    except ValidationError as e:
        raise WrongCard(f"its card is wrong: {_first(e)}") from None
    experts: tuple[ToldExpert, ...] | None = None
    refused: tuple[str, ...] = ()
    if card.experts is not None:
        experts, refused = _entries(card.node, card.experts)
    return NodeCard(
        node=card.node,
        revision=card.revision,
        loads={k: Load(running=v.running, waiting=v.waiting) for k, v in card.loads.items()},
        experts=experts,
        refused=refused,
    )


def _entries(node: Node, entries: tuple[Any, ...]) -> tuple[tuple[ToldExpert, ...], tuple[str, ...]]:
    good: dict[str, ToldExpert] = {}
    refused: list[str] = []
    for n, entry in enumerate(entries):
        try:
            told = ToldExpert.model_validate(entry)
        except ValidationError as e:
            refused.append(f"experts[{n}]: {_first(e)}")
            continue
        if told.path[0] != node.id:
            refused.append(f"experts[{n}] ({told.name}): its path does not begin at the node that tells it")
        elif told.name in good:
            refused.append(f"experts[{n}] ({told.name}): the name occurs twice")
        elif told.hops == 0 and told.name_there != told.name:
            refused.append(f"experts[{n}] ({told.name}): its own expert is said to be called {told.name_there}")
        else:
            good[told.name] = told
    return tuple(good.values()), tuple(refused)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, on one bounded line, without repeating what was sent."""
    found = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part)[:40] for part in found["loc"][:4])
    return f"{where}: {found['msg']}"[:200] if where else str(found["msg"])[:200]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where an expert that was learnt from a neighbour really is.

    Attributes:
        path: Machines that a request passes from here, the neighbour first.
        origin_name: What the last of them is called.
        name_there: What the expert is called on it.
    """

    path: tuple[str, ...]
    origin_name: str
    name_there: str


class CardWriter:
    """Writes the card of this node.

    Args:
        node: Who this is.
        square: Whose experts are told.
        max_hops: Longest way told on, in machines that a request passes after those who read the card.
        made_of: What stands for what makes an expert's answers.
    """

    def __init__(
        self, node: Node, square: Square, *, max_hops: int, made_of: Callable[[Expert], str] = fingerprint
    ) -> None:
        self._node = node
        self._square = square
        self._max_hops = max_hops
        self._made_of = made_of
        self._seen: Hashable = None
        self._aliases: Hashable = ()
        self._moves = 0
        self._experts: list[dict[str, Any]] = []
        self._engines: dict[str, Backend] = {}
        self._labels = itertools.count()

    @property
    def revision(self) -> str:
        """Changes whenever somebody joins or leaves, and when an adapter's alias stands for another one."""
        aliases = aliases_now(self._square.experts)
        if aliases != self._aliases:
            self._aliases = aliases
            self._moves += 1
        return f"{self._node.id}-{self._square.version}" + (f"-{self._moves}" if self._moves else "")

    def write(self, ways: Mapping[str, Way], *, known: str | None = None) -> dict[str, Any]:
        """The card as it is now, as plain JSON values.

        Args:
            ways: Where the experts are that came from neighbours, by their names here.
            known: The revision that the reader has.
        """
        revision = self.revision
        if self._seen != revision:
            self._seen = revision
            self._collect(ways)
        loads = {e: backend.load for e, backend in self._engines.items()}
        return {
            "node": self._node.model_dump(exclude_none=True),
            "revision": revision,
            "loads": {
                e: {"running": min(v.running, MAX_LOAD), "waiting": min(v.waiting, MAX_LOAD)} for e, v in loads.items()
            },
            "experts": None if known == revision else self._experts,
        }

    def _collect(self, ways: Mapping[str, Way]) -> None:
        """What stays the same until somebody joins or leaves: nearer experts first, as far as a card can hold them."""
        # A label stays with its backend and is never given to another one: readers count by it.
        labels = {id(backend): label for label, backend in self._engines.items()}
        self._experts, self._engines = [], {}
        size = 0
        for expert in sorted(self._square, key=lambda e: len(ways[e.name].path) if e.name in ways else 0):
            way = ways.get(expert.name)
            if way is not None and len(way.path) >= self._max_hops:
                continue
            label = labels.get(id(expert.backend)) or labels.setdefault(id(expert.backend), f"e{next(self._labels)}")
            entry = self._entry(expert, way, label)
            taken = len(orjson.dumps(entry))
            if taken > MAX_EXPERT_BYTES:
                # Its examples are what is long; the description alone can still be routed by.
                entry |= {"examples": [], "keywords": []}
                taken = len(orjson.dumps(entry))
            size += taken
            if len(self._experts) >= MAX_EXPERTS or size > MAX_CARD_BYTES // 2:
                break
            self._experts.append(entry)
            self._engines[label] = expert.backend

    def _entry(self, expert: Expert, way: Way | None, engine: str) -> dict[str, Any]:
        card = expert.card
        can = expert.backend.capabilities
        path = (self._node.id, *(way.path if way else ()))
        return {
            **to_plain(card),
            "description": card.description[:MAX_DESCRIPTION_CHARS],
            "examples": [t for t in card.examples if len(t) <= MAX_TEXT_CHARS][:MAX_EXAMPLES],
            "keywords": [t for t in card.keywords if len(t) <= MAX_TEXT_CHARS][:MAX_KEYWORDS],
            "temperature": expert.temperature,
            "capabilities": {f: getattr(can, f) for f in ToldCapabilities.model_fields},
            "engine": engine,
            "path": list(path),
            "origin": path[-1],
            "origin_name": way.origin_name if way else self._node.name,
            "name_there": way.name_there if way else expert.name,
            "hops": len(path) - 1,
            "made_of": self._made_of(expert),
        }


def version() -> str:
    """The version of agora that runs here."""
    try:
        return importlib.metadata.version("agora-llm")
    except importlib.metadata.PackageNotFoundError:
        return ""
