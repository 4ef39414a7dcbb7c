"""`[server]` and `[neighbours.NAME]`: where agora listens, what it allows, and which other nodes it works with."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field, model_validator

from agora.config.table import Table
from agora.config.values import AnyTier, Count, FilePath, Name, NotNegative, Positive, Text, Url, Variable

DEFAULT_PORT: Final = 8711
"""Port of the gateway: registered for nothing, beside none of the usual model servers (8000, 8080, 11434)."""

MAX_HOPS: Final = 3
"""Machines that a request may pass after the one it was sent to: end → edge → cloud, and one detour."""


class ServerConfig(Table):
    """`[server]`: where agora listens, and what it allows.

    Attributes:
        host: Address to bind to; 127.0.0.1 is reachable from this machine only.
        port: TCP port.
        name: What the node is called among its neighbours; absent for the machine's host name.
        tier: Where this machine stands; its card tells it to those who say nothing of it themselves. A node that passes
            requests on, and has no experts of its own, is the cloud to them without it.
        keys: File of API keys, kept as hashes (`agora keys`); absent for a server that asks for none, which is refused
            on any address but a loopback one.
        max_body_bytes: Largest body of a request.
        max_connections: Most connections at once.
        max_running: Most requests worked on at once.
        max_waiting: Most requests waiting for that; further ones get 429.
        requests_per_minute: Most requests of one key in a minute; absent for any number.
        neighbour_share: Share of `max_running` that work from neighbours may take.
        max_hops: Machines that a request may pass after this one.
        max_runs: Most runs (`/v1/runs`) worked on at once; further ones wait.
        header_timeout_s: Seconds for the head of a request to arrive.
        body_timeout_s: Seconds for its body.
        request_timeout_s: Most seconds for answering one request.
        drain_s: Seconds that requests in flight have to end after SIGTERM.
    """

    host: Text = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = DEFAULT_PORT
    name: Name | None = None
    tier: AnyTier | None = None
    keys: FilePath | None = None
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**20
    max_connections: Count = 1024
    max_running: Count = 256
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    requests_per_minute: Count | None = None
    neighbour_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_hops: Annotated[int, Field(ge=0, le=16)] = MAX_HOPS
    max_runs: Count = 16
    header_timeout_s: Positive = 10.0
    body_timeout_s: Positive = 30.0
    request_timeout_s: Positive = 600.0
    drain_s: NotNegative = 30.0


class NeighbourConfig(Table):
    """`[neighbours.NAME]`: another `agora serve` whose experts may be asked from here.

    Attributes:
        url: Where it listens.
        api_key_env: Name of the environment variable that holds the API key it gave this node.
        experts: Names of its experts that may be asked; absent for all.
        tier: Where its machine stands: what may not go as far is not sent to it, whatever it says of its experts. It is
            `end` for another machine of one's own, which only this key can say. Absent for what its card tells, at
            least `edge`; while nothing is told, `cloud`.
        refresh_s: Seconds between two looks at its cards and its health.
        timeout_s: Seconds for a whole request.
        max_running: Most requests sent to it at once; absent for any number.
    """

    url: Url
    api_key_env: Variable | None = None
    experts: Annotated[tuple[Text, ...], Field(strict=False)] | None = None
    tier: AnyTier | None = None
    refresh_s: Positive = 5.0
    timeout_s: Positive | None = None
    max_running: Count | None = None

    @model_validator(mode="after")
    def _someone(self) -> NeighbourConfig:
        if self.experts == ():
            raise ValueError("experts is empty: leave it out to ask all of them")
        return self
