"""`[nodes.NAME]`: the kinds of machines that answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from agora.config.table import Table
from agora.config.values import (
    AnyTier,
    Count,
    FilePath,
    Name,
    NotNegative,
    Positive,
    Source,
    Text,
    Texts,
    Url,
    Variable,
)
from agora.types import Tier

LAST_PORT: Final = 65535
"""The largest number of a TCP port."""


class LocalNode(Table):
    """`[nodes.NAME]` with `kind = "local"`: a model in this process."""

    kind: Literal["local"]
    model: Name
    tier: AnyTier = Tier.END


class CapabilitiesConfig(Table):
    """What a server can do beyond the ordinary; absent for what its kind claims by itself."""

    chat: bool | None = None
    completion: bool | None = None
    score: bool | None = None
    logprobs: bool | None = None
    json_schema: bool | None = None
    seed: bool | None = None
    adapters: bool | None = None
    continues: bool | None = None
    max_context: Count | None = None


class OpenAINode(Table):
    """`[nodes.NAME]` with `kind = "openai"`: an OpenAI-compatible server.

    Attributes:
        kind: `openai`.
        url: Base URL, up to and including `/v1`.
        model: The server's name for its model.
        api_key_env: Name of the environment variable that holds the API key.
        tier: Where it stands.
        server: What kind of server it is, which tells what it can do; absent for one that can chat and no more.
        connect_timeout_s: Seconds for opening a connection.
        first_token_timeout_s: Seconds until the first token of a stream.
        timeout_s: Seconds for a whole request.
        max_tokens_field: `max_completion_tokens` for servers whose reasoning models refuse `max_tokens`.
        max_running: Most requests sent to it at once; absent for any number.
        max_waiting: Most requests waiting for that; further ones are refused as overloaded.
        capabilities: What it can do in particular, where that differs from what `server` tells.
    """

    kind: Literal["openai"]
    url: Url
    model: Text
    api_key_env: Variable | None = None
    tier: AnyTier = Tier.CLOUD
    server: Literal["openai", "vllm"] | None = None
    connect_timeout_s: Positive | None = None
    first_token_timeout_s: Positive | None = None
    timeout_s: Positive | None = None
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    max_running: Count | None = None
    max_waiting: Annotated[int, Field(ge=0)] | None = None
    capabilities: CapabilitiesConfig = CapabilitiesConfig()

    @property
    def adapters(self) -> bool:
        """Whether it claims to answer with adapters."""
        claimed = self.capabilities.adapters
        return self.server == "vllm" if claimed is None else claimed


class FakeNode(Table):
    """`[nodes.NAME]` with `kind = "fake"`: no model, scripted answers, for trying things out.

    Attributes:
        kind: `fake`.
        reply: What it always answers; absent to repeat the question.
        replies: Answers by a piece of the question; the first piece that occurs counts, else `reply`.
        latency_s: Seconds before each answer.
        seconds_per_token: Seconds for each word of an answer.
        fail: What happens in place of an answer.
        fail_first: With `fail`: only the first so many requests fail; absent for all.
        max_running: Most requests answered at once; absent for any number.
        max_waiting: Most requests waiting for that; further ones are refused as overloaded.
        tier: Where it pretends to stand.
        capabilities: What it claims.
    """

    kind: Literal["fake"]
    reply: Text | None = None
    replies: dict[str, Text] = Field(default_factory=dict)
    latency_s: NotNegative = 0.0
    seconds_per_token: NotNegative = 0.0
    fail: Literal["unavailable", "timeout", "overloaded", "bad_reply", "rejected", "hang"] | None = None
    fail_first: Count | None = None
    max_running: Count | None = None
    max_waiting: Annotated[int, Field(ge=0)] | None = None
    tier: AnyTier = Tier.END
    capabilities: CapabilitiesConfig = CapabilitiesConfig()

    @model_validator(mode="after")
    def _fits(self) -> FakeNode:
        if self.fail_first is not None and self.fail is None:
            raise ValueError("fail_first needs fail: which failure?")
        return self


class VllmNode(Table):
    """`[nodes.NAME]` with `kind = "vllm"`: a vLLM server that agora starts and looks after.

    A vLLM server that someone else runs is a node of kind "openai" with `server = "vllm"`, or this one with `url`.

    Attributes:
        kind: `vllm`.
        model: The weights to serve: an alias of the catalogue, a folder, or a hub id. With `url`, the server's name for
            them.
        url: A server that someone else runs, up to and including `/v1`; nothing is started then.
        python: Interpreter of the environment that vLLM is installed in; absent for the one that AGORA_VLLM_PYTHON
            names, else `.venv-vllm` (`make vllm`) if it is there, else the one agora runs on.
        api_key_env: With `url`: name of the environment variable that holds the API key.
        tier: Where it stands.
        port: TCP port on 127.0.0.1; absent for a free one. Further replicas listen on the ports after it.
        dtype: Number format of the weights; absent for vLLM's own choice, or float32 without a GPU.
        max_context: Tokens of prompt and answer together; absent for the model's own limit, or without a GPU what its
            cache has room for.
        max_lora_rank: Largest rank of an adapter; absent for 16. Adapters can be loaded if this is given, or if an
            expert has one.
        args: Further arguments of `vllm serve`, as they are.
        env: Further environment variables of the server.
        start_timeout_s: Seconds until it must have generated a token.
        max_running: Most requests sent to it at once; absent for any number.
        max_waiting: Most requests waiting for that; further ones are refused as overloaded.
        timeout_s: Seconds for a whole request.
        first_token_timeout_s: Seconds until the first token of a stream.
        replicas: Least servers that are started.
        max_replicas: Most servers that are started, as there is more to do; absent for no more than `replicas`. With
            `url` nothing is started, and how many are wanted is only told in the metrics.
        target_queue: Requests per server, running and waiting, that are aimed at; absent for 16.
        target_ttft_s: Seconds to the first token, of nine in ten, that are aimed at; absent for any.
    """

    kind: Literal["vllm"]
    model: Source
    url: Url | None = None
    python: FilePath | None = None
    api_key_env: Variable | None = None
    tier: AnyTier = Tier.EDGE
    port: Annotated[int, Field(ge=1, le=LAST_PORT)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    max_context: Annotated[int, Field(ge=2)] | None = None
    max_lora_rank: Count | None = None
    args: Texts = ()
    env: dict[Variable, Annotated[str, StringConstraints(max_length=10_000)]] = Field(default_factory=dict)
    start_timeout_s: Positive | None = None
    max_running: Count | None = None
    max_waiting: Annotated[int, Field(ge=0)] | None = None
    timeout_s: Positive | None = None
    first_token_timeout_s: Positive | None = None
    replicas: Count = 1
    max_replicas: Count | None = None
    target_queue: Positive | None = None
    target_ttft_s: Positive | None = None

    @property
    def scales(self) -> bool:
        """Whether there may be more or fewer servers of it, here or elsewhere."""
        return self.most_replicas > 1 or self.target_queue is not None or self.target_ttft_s is not None

    @property
    def most_replicas(self) -> int:
        """Most servers."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @model_validator(mode="after")
    def _fits(self) -> VllmNode:
        if self.most_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, fewer than replicas, which is {self.replicas}")
        if self.port is not None and self.port + self.most_replicas - 1 > LAST_PORT:
            raise ValueError(f"{self.most_replicas} replicas from port {self.port} on go past {LAST_PORT}")
        started = ("python", "port", "dtype", "max_context", "max_lora_rank", "start_timeout_s")
        if self.url is not None and (said := [k for k in started if getattr(self, k) is not None]):
            raise ValueError(f"has a url, so nothing is started: leave out {', '.join(said)}")
        if self.url is None and self.api_key_env is not None:
            raise ValueError("api_key_env needs a url; a server that agora starts has a key of its own")
        return self


class LlamaCppNode(Table):
    """`[nodes.NAME]` with `kind = "llamacpp"`: a GGUF model in this process, by llama.cpp (extra `llamacpp`).

    Attributes:
        kind: `llamacpp`.
        source: An alias of the catalogue whose weights come as GGUF, or a `.gguf` file (`./NAME.gguf`).
        tier: Where it stands.
        max_batch: Most requests decoded together.
        max_queue: Most requests waiting; further ones are refused as overloaded.
        max_context: Tokens of prompt and answer together of one request.
        threads: CPU threads; absent for one per physical core.
        gpu_layers: Layers on the GPU, where llama.cpp was built for one; -1 for all.
    """

    kind: Literal["llamacpp"]
    source: Source
    tier: AnyTier = Tier.END
    max_batch: Count | None = None
    max_queue: Annotated[int, Field(ge=0)] | None = None
    max_context: Annotated[int, Field(ge=2)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    gpu_layers: Annotated[int, Field(ge=-1)] | None = None


NodeConfig = Annotated[LocalNode | OpenAINode | VllmNode | LlamaCppNode | FakeNode, Field(discriminator="kind")]

NODE_KINDS: Final[Mapping[str, type[Table]]] = {
    "local": LocalNode,
    "openai": OpenAINode,
    "vllm": VllmNode,
    "llamacpp": LlamaCppNode,
    "fake": FakeNode,
}
"""The table of each kind of node."""
