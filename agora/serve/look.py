"""A look at a neighbour: one request for its card, bounded in time and size."""

from __future__ import annotations

import random
from typing import Final, Protocol
from urllib.parse import quote

from agora.serve.node_card import MAX_CARD_BYTES, NodeCard, read_card
from experts.http_reply import Patience
from experts.openai_http import Http, normal_url
from experts.retry import Retry

PATH: Final = "agora/card"
"""Where a card is, below `/v1`."""

NODE: Final = "Agora-Node"
"""Header by which a node that looks tells its id."""

LOOK_TIMEOUT_S: Final = 5.0
"""Seconds for a card. It takes a neighbour a millisecond; behind a bad mobile link or a busy event loop one second or
two."""


class Looks(Protocol):
    """Whoever can look at one neighbour; `Lookout`, but for tests without a network."""

    async def look(self, *, known: str | None = None) -> NodeCard:
        """Its card; raises a `BackendError` if there is none."""

    async def aclose(self) -> None:
        """Frees what it holds."""


class MakeLookout(Protocol):
    """Makes the one who looks at a neighbour."""

    def __call__(self, url: str, *, name: str, api_key: str | None, node: str) -> Looks:
        """For the neighbour at that URL."""


class Lookout:
    """Asks one neighbour for its card.

    Args:
        url: Where it listens.
        name: Its name in the configuration, for errors.
        api_key: The key that it gave to this node.
        node: The id of this node.

    Raises:
        InvalidRequest: If the URL cannot be used.
    """

    def __init__(self, url: str, *, name: str, api_key: str | None, node: str) -> None:
        self._name = name
        self._node = node
        self._http = Http(
            normal_url(url),
            backend=name,
            headers={"Authorization": f"Bearer {api_key.strip()}"} if api_key else {},
            connect_timeout_s=LOOK_TIMEOUT_S,
            retry=Retry(tries=1),
            max_reply_bytes=MAX_CARD_BYTES,
            rng=random.Random(),
        )

    async def look(self, *, known: str | None = None) -> NodeCard:
        """Reads its card.

        Args:
            known: The revision that is known already, whose experts need not be told again.

        Raises:
            BadReply: If what comes is no card, or a wrong one.
            BackendError: If none comes.
        """
        patience = Patience(self._name, total_s=LOOK_TIMEOUT_S, first_token_s=LOOK_TIMEOUT_S)
        path = PATH if known is None else f"{PATH}?known={quote(known, safe='')}"
        with self._http.redacting():
            async with await self._http.get(path, patience, headers={NODE: self._node}) as reply:
                return read_card(await reply.whole())

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._http.aclose()
