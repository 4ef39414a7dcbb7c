"""A request's way from machine to machine: how many it may still pass, which it has passed, and how long it may take.

The gateway sets the passage of every request it works on, and whatever is asked of a neighbour on its behalf carries
it on in five headers:

| header | what it tells |
| --- | --- |
| `Agora-Hops` | machines that the request may pass after the one that receives it |
| `Agora-Path` | ids of the machines it has passed, the first one first |
| `Agora-Timeout` | seconds left: a duration, since clocks of different machines differ |
| `Agora-Reach` | highest tier whose machines may see it: `local`, `edge` or `cloud`, which is left out |
| `X-Request-Id` | what all of them call it in their logs |

Hops bound the work that one request can make in the square; the path stops loops at once, before the hops run out.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from agora.errors import InvalidRequest, LoopDetected, TooManyHops
from agora.types import Tier, label_of, lowest, reach_of

HOPS: Final = "Agora-Hops"
PATH: Final = "Agora-Path"
TIMEOUT: Final = "Agora-Timeout"
REACH: Final = "Agora-Reach"
REQUEST_ID: Final = "X-Request-Id"

MOST_HOPS: Final = 16
"""Hops that any request may have; the limit of `[server] max_hops`."""

MOST_SECONDS: Final = 7 * 24 * 3600.0
"""Longest time-out taken over from another machine: a week, more than any run has."""

SHORTEST_S: Final = 0.001
"""Smallest time-out sent: less is over before it arrives, and would be written as 0."""

_NODE_ID = re.compile(r"[0-9a-f]{16}")
_HOPS = re.compile(r"[0-9]{1,2}")
_SECONDS = re.compile(r"[0-9]{1,7}(\.[0-9]{1,6})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")


def new_node_id() -> str:
    """The id of a node: random for each start of its process, 64 bits, so that no two of a square are the same."""
    return secrets.token_hex(8)


def is_node_id(text: str) -> bool:
    """Whether `text` has the form of a node's id."""
    return _NODE_ID.fullmatch(text) is not None


def is_request_id(text: str) -> bool:
    """Whether `text` may be taken over as a request's id: short, and safe in a header and a log."""
    return _REQUEST_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """The way of one request.

    Attributes:
        hops: Machines that it may still pass after this one.
        path: Ids of the machines it has passed, the first one first, this one last.
        request_id: What to call it in logs; empty if nobody gave it a name.
        deadline: Event-loop time at which nobody waits for the answer any more; infinite for no limit.
        reach: The highest tier whose machines may see it.
    """

    hops: int
    path: tuple[str, ...]
    request_id: str = ""
    deadline: float = math.inf
    reach: Tier = Tier.CLOUD

    @classmethod
    def begin(cls, *, node: str, max_hops: int, request_id: str = "", timeout_s: float | None = None) -> Passage:
        """The passage of a request that comes from an ordinary client, or from this machine itself.

        Args:
            node: This machine's id.
            max_hops: Machines that it may pass after this one.
            request_id: What to call it.
            timeout_s: Seconds that may be taken for it; None for any.
        """
        deadline = math.inf if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        return cls(hops=max_hops, path=(node,), request_id=request_id, deadline=deadline)

    @classmethod
    def read(cls, headers: Mapping[str, str], *, node: str, max_hops: int) -> Passage | None:
        """The passage of a request that another node sent.

        Args:
            headers: Of the request; their names in any case if the mapping does not mind, as those of aiohttp do not.
            node: This machine's id.
            max_hops: Machines that any request may pass after this one, whatever it asks for.

        Returns:
            None if the request comes from an ordinary client, which sends neither `Agora-Hops` nor `Agora-Path`.

        Raises:
            InvalidRequest: If a header is malformed.
            LoopDetected: If the request has been here before.
        """
        hops, path = _one(headers, HOPS), _one(headers, PATH)
        if hops is None and path is None:
            return None
        if hops is None or path is None:
            there, missing = (HOPS, PATH) if path is None else (PATH, HOPS)
            raise InvalidRequest(f"header {there} came without {missing}", hint="nodes of agora send both")
        if _HOPS.fullmatch(hops) is None or int(hops) > MOST_HOPS:
            raise InvalidRequest(f"header {HOPS} is {_shown(hops)}; allowed: 0 to {MOST_HOPS}")
        passed = tuple(p.strip(" \t") for p in path.split(",", MOST_HOPS + 1))
        if len(passed) > MOST_HOPS or not all(map(is_node_id, passed)):
            raise InvalidRequest(
                f"header {PATH} is {_shown(path)}; it must be 1 to {MOST_HOPS} ids of nodes, separated by commas"
            )
        if node in passed:
            raise LoopDetected(
                f"the request came back to this node after {len(passed)} hops: {' → '.join(passed)} → {node}",
                hint="the neighbours' cards should have kept it from going in a circle; ask another expert",
            )
        request_id = _one(headers, REQUEST_ID)
        if request_id is not None and not is_request_id(request_id):
            raise InvalidRequest(f"header {REQUEST_ID} is {_shown(request_id)}; it must match {_REQUEST_ID.pattern}")
        left = _seconds(_one(headers, TIMEOUT))
        return cls(
            hops=min(int(hops), max_hops),
            path=(*passed, node),
            request_id=request_id or "",
            deadline=math.inf if left is None else asyncio.get_running_loop().time() + left,
            reach=reach_told(headers),
        )

    @property
    def left_s(self) -> float:
        """Seconds until nobody waits any more; infinite for no limit, 0 if the time is up."""
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def allow(self, way: tuple[str, ...]) -> None:
        """Checks that the request may go on.

        Args:
            way: Ids of the machines that it would pass: the next one first, the one that answers last.

        Raises:
            TooManyHops: If it may not pass that many.
            LoopDetected: If it has passed one of them before.
        """
        if self.hops < len(way):
            raise TooManyHops(
                f"the request would have to pass {len(way)} more machine{'s' * (len(way) > 1)}, and may pass "
                f"{self.hops}",
                hint="ask a node that is nearer, or raise [server] max_hops",
            )
        if met := [w for w in way if w in self.path]:
            raise LoopDetected(
                f"the request would come back to {met[0]}, which it has passed", hint="ask another expert"
            )

    def headers(self, timeout_s: float | None = None) -> dict[str, str]:
        """What is sent to the next machine.

        Args:
            timeout_s: Seconds after which this machine stops waiting for it; the deadline counts where that is sooner.
        """
        left = min(self.left_s, math.inf if timeout_s is None else timeout_s, MOST_SECONDS)
        sent = {HOPS: str(max(0, self.hops - 1)), PATH: ",".join(self.path)}
        if left < MOST_SECONDS:
            sent[TIMEOUT] = f"{max(left, SHORTEST_S):.3f}"
        if self.request_id:
            sent[REQUEST_ID] = self.request_id
        if (reach := lowest(self.reach, current_reach())) is not Tier.CLOUD:
            sent[REACH] = label_of(reach)
        return sent


def reach_told(headers: Mapping[str, str]) -> Tier:
    """The highest tier whose machines may see a request, by its headers: whoever sent it, be it no node at all.

    Raises:
        InvalidRequest: If it is none of the labels.
    """
    label = _one(headers, REACH)
    return Tier.CLOUD if label is None else reach_of(label, what=f"header {REACH}")


_CURRENT: Final[ContextVar[Passage | None]] = ContextVar("agora_passage", default=None)


_REACH: Final[ContextVar[Tier]] = ContextVar("agora_reach", default=Tier.CLOUD)


def current_reach() -> Tier:
    """The highest tier whose machines may see what is being asked here."""
    return _REACH.get()


@contextmanager
def bounded(reach: Tier) -> Iterator[None]:
    """What is asked of neighbours in this block, and in tasks begun in it, tells them to keep to this reach."""
    token = _REACH.set(lowest(reach, _REACH.get()))
    try:
        yield
    finally:
        _REACH.reset(token)


def current_passage() -> Passage | None:
    """The passage of the request that is being worked on here, if a gateway set one."""
    return _CURRENT.get()


@contextmanager
def passing(passage: Passage) -> Iterator[None]:
    """Everything asked of neighbours in this block, and in tasks begun in it, belongs to that passage."""
    token = _CURRENT.set(passage)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _one(headers: Mapping[str, str], name: str) -> str | None:
    """The value of a header that may occur once."""
    many = headers.getall(name, []) if hasattr(headers, "getall") else [v for k, v in headers.items() if k == name]
    if len(many) > 1:
        raise InvalidRequest(f"header {name} came {len(many)} times")
    return many[0] if many else None


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if _SECONDS.fullmatch(text) is None or not 0 < float(text) <= MOST_SECONDS:
        raise InvalidRequest(
            f"header {TIMEOUT} is {_shown(text)}; it must be seconds, above 0 and at most {MOST_SECONDS:.0f}, like 12.5"
        )
    return float(text)


def _shown(value: str) -> str:
    return repr(value if len(value) <= 80 else f"{value[:80]}…")
