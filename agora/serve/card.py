"""`GET /v1/agora/card` and `GET /v1/agora/neighbours`: what this node tells of itself and of those around it."""

from __future__ import annotations

from typing import Final

import orjson
from aiohttp import web

from agora.serve.errors import JSON
from agora.serve.look import NODE
from agora.serve.neighbours import Neighbours
from agora.types import to_plain
from experts.passage import is_node_id

CARD_PATH: Final = "/v1/agora/card"
NEIGHBOURS_PATH: Final = "/v1/agora/neighbours"

NEIGHBOURS: Final = web.AppKey("neighbours", Neighbours)
"""Where an application keeps its neighbours; an application without any sets it too, and tells of its own experts."""


def routes() -> list[web.RouteDef]:
    """The routes of this module."""
    return [web.get(CARD_PATH, card), web.get(NEIGHBOURS_PATH, neighbours)]


async def card(request: web.Request) -> web.Response:
    """The card of this node; `?known=REVISION` leaves out the experts while they are those of that revision."""
    here = request.app[NEIGHBOURS]
    asker = request.headers.get(NODE, "")
    if is_node_id(asker):
        here.heard_of(asker)
    return _json(here.card(known=request.query.get("known")))


async def neighbours(request: web.Request) -> web.Response:
    """How each neighbour is."""
    here = request.app[NEIGHBOURS]
    return _json({"object": "list", "data": [to_plain(n) for n in here.state()]})


def _json(value: object) -> web.Response:
    # Loads change all the time: a copy kept somewhere would send requests to those who have no time.
    return web.Response(body=orjson.dumps(value), content_type=JSON, headers={"Cache-Control": "no-store"})
