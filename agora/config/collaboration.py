"""`[vertical]`, `[multi_access]` and `[links.NAME]`: climbing from tier to tier, and several ways to the same help."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from agora.config.table import Table
from agora.config.values import Count, FilePath, Name, NotNegative, Positive, Text, Texts

HERE: Final = "here"
"""What links call this machine."""

Share = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]


class VerticalConfig(Table):
    """`[vertical]`: how far up a question climbs.

    Attributes:
        experts: Who may answer, the cheapest first; absent for all, by tier and price.
        policy: Folder that `agora calibrate` wrote; absent for `vertical` in the user's data folder.
        trade_off: Money that an answer's being right is worth: the λ of cascade routing is its inverse. Absent for what
            the fitted policy was chosen for.
        accept: Confidence at which an answer is taken while nothing is calibrated.
        signals: What is asked of an expert's answers beyond what comes with them.
        samples: Answers sampled for self-consistency, where that is among the signals.
        max_risk: Most accuracy that may be lost against always asking the top tier; absent for no guarantee.
        confidence: Probability with which `max_risk` holds.
        stream_cost: Most money for all questions since the start.
        stream_seconds: Most seconds of answering for all questions since the start.
        condense_tokens: Tokens to which the end tier condenses a longer text before it leaves; absent for no limit.
        extract: Most passages of a text that the end tier pulls out before it leaves, those that have something to do
            with what is asked; absent for the whole text.
        redact: Kinds of personal data that the end tier replaces before a text leaves.
        cache: Whether answers are kept and given again to the same request of the same API key; never sampled or
            private ones.
        cache_entries: Most answers kept.
    """

    experts: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] | None = None
    policy: FilePath | None = None
    trade_off: Positive | None = None
    accept: Share = 0.7
    signals: Texts = ()
    samples: Annotated[int, Field(ge=2, le=64)] = 5
    max_risk: Probability | None = None
    confidence: Probability = 0.95
    stream_cost: Positive | None = None
    stream_seconds: Positive | None = None
    condense_tokens: Annotated[int, Field(ge=16)] | None = None
    extract: Count | None = None
    redact: Texts = ()
    cache: bool = False
    cache_entries: Count = 1024

    @property
    def departure(self) -> dict[str, Any]:
        """The keys that say what is done to a text before it leaves the end tier, as far as they are set."""
        said = {
            "redact": sorted(self.redact),
            "condense_tokens": self.condense_tokens,
            "extract": self.extract,
        }
        return {key: value for key, value in said.items() if value}


class MultiAccessConfig(Table):
    """`[multi_access]`: how one of several paths to the same help is chosen.

    Attributes:
        seconds_per_money: Seconds of waiting that one unit of money is worth: the β of time + β·money.
        on_time: Probability with which a path should meet a deadline.
        hedge: Whether a second copy is sent on another path when no first token came in time.
        hedge_share: Most extra requests, as a share of all.
        explore: Whether paths are tried now and then that are not thought to be the best (Thompson sampling).
        scheduler: In which order subtasks that wait for a place are asked: `heft` by the longest way to the end behind
            them, `fifo` as they came.
        max_relays: Most relays on a path.
    """

    seconds_per_money: NotNegative = 0.0
    on_time: Probability = 0.95
    hedge: bool = True
    hedge_share: Share = 0.05
    explore: bool = True
    scheduler: Literal["heft", "fifo"] = "heft"
    max_relays: Annotated[int, Field(ge=0, le=16)] = 2


class LinkConfig(Table):
    """`[links.NAME]`: a link between two machines. What is absent is learned from what is observed.

    Attributes:
        source: `here`, or a neighbour that passes requests on.
        target: A node or a neighbour.
        technology: Kind of link.
        up_mbps: Megabits per second from source to target.
        down_mbps: Megabits per second back.
        rtt_ms: Round-trip time of a small packet.
        price_per_mb: Money per megabyte, either way.
        availability: Share of the time that it works.
        local_address: IP address of this machine whose interface the link goes out by, for links from `here`.
        url: Where the target listens on this link, if not where its node or neighbour says.
        trace: Table of recorded bandwidth that the link follows from the start on: CSV, gzipped if its name ends in
            `.gz`, with `t_s` and one or both of `down_mbps` and `up_mbps`, or `mbps` for both ways alike.
        trace_loop: Whether it begins again at its end, or else stays as it was last.
        trace_speed: How many times as fast it is played.
    """

    source: Name = HERE
    target: Name
    technology: Literal["5g", "4g", "wifi", "v2v", "ethernet"]
    up_mbps: Positive | None = None
    down_mbps: Positive | None = None
    rtt_ms: NotNegative | None = None
    price_per_mb: NotNegative = 0.0
    availability: Annotated[float, Field(gt=0, le=1)] | None = None
    local_address: Text | None = None
    url: Text | None = None
    trace: FilePath | None = None
    trace_loop: bool = True
    trace_speed: Positive = 1.0

    @model_validator(mode="after")
    def _fits(self) -> LinkConfig:
        if self.source == self.target:
            raise ValueError(f"goes from {self.source!r} to itself")
        if self.local_address is not None and self.source != HERE:
            raise ValueError(f'local_address is for links from "{HERE}"')
        if self.trace is None and (played := sorted(self.model_fields_set & {"trace_loop", "trace_speed"})):
            raise ValueError(f"{played[0]} says how a trace is played: it needs trace, the file")
        return self
