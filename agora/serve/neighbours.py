"""The other nodes that this one works with: who they are, whether they answer, and which of their experts are here.

There is no centre: every node looks at its own neighbours' cards from time to time, and lets their experts into its
square and out of it by what it sees. A neighbour leaves when it fails twice: two looks in a row, or one look after a
request that got no proper reply, so that a node which dies in the middle of work is gone within the time of a refused
connection, while one whose expert merely fails keeps its place. It is looked at again ever after, less and less often,
and at once when it asks for our card.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final

from agora.config import NeighbourConfig
from agora.errors import BackendError, BackendTimeout, ConfigError
from agora.serve.look import Lookout, MakeLookout
from agora.serve.neighbour import FAILURES, KnownNeighbour, NeighbourState
from agora.serve.node_card import CardWriter, Node, NodeCard, WrongCard, version
from agora.serve.offers import Offer, chosen, offers_of, standing
from agora.square import Expert, Square
from agora.types import Tier
from experts.neighbour import TIMEOUT_S, Line, NeighbourBackend
from experts.slots import Slots
from graphs.calibration_version import fingerprint

log = logging.getLogger(__name__)

GAP_S: Final = 0.25
"""Shortest time between two looks at a neighbour, whatever asks for them: an expert that fails many requests a second
must not make as many looks."""

FIRST_LOOK_S: Final = 1.0
"""Seconds that `start` waits for the neighbours' first cards: a node that says it is ready then knows its square."""

HOLD_S: Final = 10.0
"""Seconds for which no way around is taken to a node that has just gone: two usual `refresh_s`, in which those on the
way have seen for themselves whether it is gone or only the link to it. Without it, all that a killed node was asked
was sent once more towards it, by way of whoever had not looked yet (3 of 6 times some of it stayed unanswered)."""

HEARD_GAP_S: Final = 1.0
"""Shortest time between two rounds of looks because somebody unknown asked for our card."""


class Neighbours:
    """Keeps the neighbours' experts in the square for as long as they can be asked.

    Args:
        square: Where they join.
        config: The neighbours, by their names here.
        node_id: The id of this node.
        node_name: What this node is called.
        max_hops: Machines that a request which begins here may pass.
        environment: Where API keys are looked up; that of the process if None.
        rng: Where the jitter comes from.
        lookouts: What makes the one who looks at a neighbour.
        made_of: What stands for what makes an expert's answers, for this node's card.
        tier: Where this machine stands; None if nobody says.
        on_tiers: Told where the neighbours that are up stand, by their names here, whenever that changes.

    Raises:
        ConfigError: If an environment variable that should hold a key is not set.
    """

    def __init__(
        self,
        square: Square,
        config: Mapping[str, NeighbourConfig],
        *,
        node_id: str,
        node_name: str,
        max_hops: int,
        environment: Mapping[str, str] | None = None,
        rng: random.Random | None = None,
        lookouts: MakeLookout = Lookout,
        made_of: Callable[[Expert], str] = fingerprint,
        tier: Tier | None = None,
        on_tiers: Callable[[Mapping[str, Tier]], None] = lambda _: None,
    ) -> None:
        self._square = square
        self._lookouts = lookouts
        self._max_hops = max_hops
        self._rng = rng or random.Random()
        self._node = Node(id=node_id, name=node_name, version=version(), tier=tier)
        self._on_tiers = on_tiers
        self._told_tiers: Mapping[str, Tier] = {}
        self._writer = CardWriter(self._node, square, max_hops=max_hops, made_of=made_of)
        self._keys = _keys(config, os.environ if environment is None else environment)
        self._all = {name: self._neighbour(name, c) for name, c in config.items()}
        self._joined: dict[str, tuple[Offer, NeighbourBackend]] = {}
        self._ending: set[NeighbourBackend] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_at = float("-inf")
        self._gone: dict[str, float] = {}
        self._closed = False

    def _neighbour(self, name: str, config: NeighbourConfig) -> KnownNeighbour:
        wake = asyncio.Event()
        line = Line(
            node=self._node.id,
            max_hops=self._max_hops,
            slots=Slots(config.max_running, owner=name),
            on_trouble=partial(self._suspect, name),
            on_unknown=partial(self._lied, name),
        )
        lookout = self._lookouts(config.url, name=name, api_key=self._keys[name], node=self._node.id)
        return KnownNeighbour(name, config, lookout, line, wake)

    async def start(self) -> None:
        """Begins to look at them; returns when each was looked at once, or after `FIRST_LOOK_S`."""
        for neighbour in self._all.values():
            self._spawn(self._watch(neighbour))
        if self._all:
            first = [asyncio.ensure_future(n.looked.wait()) for n in self._all.values()]
            try:
                await asyncio.wait(first, timeout=FIRST_LOOK_S)
            finally:
                for waiting in first:
                    waiting.cancel()

    async def aclose(self) -> None:
        """Stops looking; their experts leave, and what they are asked now fails as unavailable. Safe to call twice."""
        self._closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for neighbour in self._all.values():
            neighbour.up = False
            neighbour.offers = ()
        backends = [*self._ending, *(backend for _, backend in self._joined.values())]
        for name in list(self._joined):
            self._leave(name)
        await asyncio.gather(*(b.aclose() for b in backends), *(n.lookout.aclose() for n in self._all.values()))

    @property
    def node(self) -> Node:
        """Who this node is."""
        return self._node

    def state(self) -> tuple[NeighbourState, ...]:
        """How each neighbour is, in the order of the configuration."""
        return tuple(
            n.state(tuple(name for name, (offer, _) in self._joined.items() if offer.neighbour == n.name))
            for n in self._all.values()
        )

    def card(self, *, known: str | None = None) -> dict[str, Any]:
        """The card of this node, as plain JSON values.

        Args:
            known: The revision that the reader has; its experts are left out then.
        """
        return self._writer.write({name: offer.way for name, (offer, _) in self._joined.items()}, known=known)

    def heard_of(self, node: str) -> None:
        """A node asked for our card, so it lives. If it is none that is up, it may be one of those that are down."""
        down = [n for n in self._all.values() if not n.up]
        now = asyncio.get_running_loop().time()
        known = any(n.up and n.node is not None and n.node.id == node for n in self._all.values())
        if down and not known and now - self._heard_at >= HEARD_GAP_S:
            self._heard_at = now
            for neighbour in down:
                neighbour.wake.set()

    async def _watch(self, neighbour: KnownNeighbour) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            neighbour.wake.clear()
            began = clock()
            await self._look(neighbour)
            neighbour.looked.set()
            try:
                async with asyncio.timeout(neighbour.delay_s(self._rng)):
                    await neighbour.wake.wait()
            except TimeoutError:
                continue
            if (early := began + GAP_S - clock()) > 0:
                await asyncio.sleep(early)

    async def _look(self, neighbour: KnownNeighbour) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            card = await neighbour.lookout.look(known=neighbour.revision)
            self._check(neighbour, card)
        except BackendError as e:
            # A card that is wrong vouches for nobody; one that does not come may come in a moment.
            self._missed(neighbour, e, for_good=isinstance(e, WrongCard))
        except Exception as e:
            log.exception("looking at neighbour %s failed", neighbour.name)
            self._missed(neighbour, e)
        else:
            neighbour.rtt_s = clock() - began
            self._seen(neighbour, card)

    def _check(self, neighbour: KnownNeighbour, card: NodeCard) -> None:
        if card.node.id == self._node.id:
            raise WrongCard("it is this very node: its url leads back here; take it out of [neighbours]")
        for other in self._all.values():
            if other is not neighbour and other.up and other.node is not None and other.node.id == card.node.id:
                raise WrongCard(f"it says it is node {card.node.id}, which is neighbour {other.name} already")
        if card.experts is None and card.revision != neighbour.revision:
            raise WrongCard("its card leaves out the experts of a revision that was not asked for")

    def _seen(self, neighbour: KnownNeighbour, card: NodeCard) -> None:
        if neighbour.node is None or neighbour.node.id != card.node.id:
            # Started anew: its labels stand for other engines, and what was told of the old one is over.
            neighbour.engines = {}
            neighbour.told.clear()
        if card.experts is not None:
            neighbour.tier = standing(card.experts, card.node, configured=neighbour.config.tier)
            offers, refused = offers_of(
                neighbour.name,
                card.experts,
                node=self._node.id,
                max_hops=self._max_hops,
                wanted=neighbour.config.experts,
                tier=neighbour.tier,
            )
            if card.revision != neighbour.revision:
                neighbour.lies.clear()
            neighbour.offers, neighbour.revision = offers, card.revision
            for reason in (*card.refused, *refused):
                neighbour.say_once(f"left out: {reason}")
        neighbour.node = card.node
        self._gone.pop(card.node.id, None)
        for label, load in card.loads.items():
            neighbour.engine(label).told(load)
        used = card.loads.keys() | {o.told.engine for o in neighbour.offers}
        neighbour.engines = {k: e for k, e in neighbour.engines.items() if k in used or e.asked}
        neighbour.failures, neighbour.suspected, neighbour.error = 0, False, None
        if not neighbour.up:
            neighbour.up, neighbour.since = True, time.time()
            log.info("neighbour %s (%s) is here", neighbour.name, card.node.name)
        self._settle()

    def _missed(self, neighbour: KnownNeighbour, error: Exception, *, for_good: bool = False) -> None:
        neighbour.failures = max(neighbour.failures + 1, FAILURES if neighbour.suspected or for_good else 0)
        neighbour.suspected = False
        neighbour.error = str(error)
        if neighbour.failures < FAILURES:
            return
        if neighbour.up:
            neighbour.up, neighbour.since = False, time.time()
            log.warning("neighbour %s is gone: %s", neighbour.name, error)
            if neighbour.node is not None:
                self._gone[neighbour.node.id] = asyncio.get_running_loop().time()
        else:
            neighbour.say_once(f"cannot be asked: {error}")
        neighbour.revision, neighbour.offers = None, ()
        # A refused connection has broken what was on it, and a node that drains still answers. One that does not
        # reply at all may hold its requests for ever: they are ended here, so that others are asked.
        self._settle(hung=neighbour.name if isinstance(error, BackendTimeout) else None)

    def _suspect(self, name: str) -> None:
        neighbour = self._all[name]
        neighbour.suspected = True
        neighbour.wake.set()

    def _lied(self, name: str, expert: str) -> None:
        neighbour = self._all[name]
        if expert not in neighbour.lies:
            neighbour.lies.add(expert)
            neighbour.wake.set()  # it may just have left, and others with it
            log.warning("neighbour %s tells of expert %s, and does not know it when asked: left out", name, expert)
            self._settle()

    def _settle(self, *, hung: str | None = None) -> None:
        """Makes the square hold those that should be there, and no others."""
        if self._closed:
            return
        tiers = {name: n.tier for name, n in self._all.items() if n.up and n.tier is not None}
        if tiers != self._told_tiers:
            self._told_tiers = tiers
            self._on_tiers(tiers)
        held = self._held()
        offers = [
            o
            for n in self._all.values()
            if n.up
            for o in n.offers
            if o.told.name not in n.lies and held.isdisjoint(o.told.path)
        ]
        taken = {e.name for e in self._square} - self._joined.keys()
        for offer in offers:
            if offer.name in taken:
                self._all[offer.neighbour].say_once(f"left out: {offer.name}: the name is taken here")
        wanted = chosen(offers, taken)
        for name, (offer, backend) in list(self._joined.items()):
            if wanted.get(name) != offer:
                self._leave(name)
                self._ending.add(backend)
                self._spawn(self._end(backend, at_once=offer.neighbour == hung))
        for name, offer in wanted.items():
            if name in self._joined:
                continue
            if self._all[offer.neighbour].may_join():
                self._join(offer)
            else:
                self._all[offer.neighbour].say_once("is held back: its experts come and go too fast")

    def _held(self) -> set[str]:
        """Ids of the nodes that went a moment ago."""
        now = asyncio.get_running_loop().time()
        self._gone = {node: at for node, at in self._gone.items() if now - at < HOLD_S}
        return set(self._gone)

    def _join(self, offer: Offer) -> None:
        neighbour = self._all[offer.neighbour]
        backend = NeighbourBackend(
            neighbour.config.url,
            offer.told.name,
            name=offer.name,
            line=neighbour.line,
            way=offer.told.path,
            engine=neighbour.engine(offer.told.engine),
            told_version=offer.told.made_of,
            capabilities=offer.told.can(),
            api_key=self._keys[offer.neighbour],
            timeout_s=neighbour.config.timeout_s or TIMEOUT_S,
        )
        expert = Expert(card=offer.card, backend=backend, temperature=offer.told.temperature, node=offer.node)
        self._square.join(expert)
        self._joined[offer.name] = (offer, backend)

    def _leave(self, name: str) -> None:
        del self._joined[name]
        if self._square.get(name) is not None:
            self._square.leave(name)

    async def _end(self, backend: NeighbourBackend, *, at_once: bool) -> None:
        if not at_once:
            await backend.idle()
        await backend.aclose()
        self._ending.discard(backend)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _keys(config: Mapping[str, NeighbourConfig], environment: Mapping[str, str]) -> dict[str, str | None]:
    """The API key for each neighbour; all missing ones are told at once."""
    named = {name: c.api_key_env for name, c in config.items()}
    missing = [
        f"neighbours.{name}.api_key_env: the environment variable {variable} is not set"
        for name, variable in named.items()
        if variable and not environment.get(variable)
    ]
    if missing:
        raise ConfigError("; ".join(missing), hint="set it to the key that the neighbour gave to this node")
    return {name: environment[variable] if variable else None for name, variable in named.items()}
