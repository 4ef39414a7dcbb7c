"""The three real tiers, as a user would write them into agora.toml, and the square of them over recorded answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from agora.config import Config, load_config
from agora.protocols import Backend, Capabilities
from agora.square import Expert, Square
from agora.types import AdapterRef
from benchmarks.tiers_parts.recording import RecordedBackend
from experts.build import expert_cards, system_prompt_of
from experts.models import ModelStore
from experts.nodes import OPENERS, Opener, Opening

END: Final = "end"
EDGE: Final = "edge"
CLOUD: Final = "cloud"
TIERS: Final = (END, EDGE, CLOUD)

SMALL: Final = "smollm2-135m"
LARGE: Final = "qwen2.5-coder-1.5b"

SST2_PROMPT: Final = "You judge film reviews. Answer with one word: positive or negative."
"""What the edge expert is told, and was trained with."""

PRICES: Final[Mapping[str, float]] = {END: 0.1345, EDGE: 0.1350, CLOUD: 1.5437}
"""Money per million tokens: one for each billion parameters, since a token costs about 2·parameters operations to read
or to generate (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). 134.5 million in SmolLM2-135M, 0.46 million more
with the adapter, 1,543.7 million in Qwen2.5-Coder-1.5B, as their configurations and files tell."""

MAX_TOKENS: Final[Mapping[str, int]] = {END: 128, EDGE: 8, CLOUD: 400}
"""Tokens of one answer. The 135M model only repeats itself past 128; the edge's answer is a word; of the cloud's
solutions to grade-school problems hardly one takes more."""

CAPABILITIES: Final[Mapping[str, Capabilities]] = {
    END: Capabilities(completion=True, score=True, logprobs=True, seed=True, max_context=2048),
    EDGE: Capabilities(completion=True, score=True, logprobs=True, seed=True, adapters=True, max_context=2048),
    CLOUD: Capabilities(completion=True, score=True, logprobs=True, seed=True, max_context=2048),
}
"""What the backends can do, known without opening them."""

CONFIG: Final = """\
# Written by `python -m benchmarks.tiers`: three real tiers on one machine.
# Try it: agora ask --config {file} "Is this film review positive or negative?\\n\\na gorgeous , witty film ."

# Questions here are one question each: nothing is to be split.
[graph]
name = "vertical"
planner = "static"

[[graph.subtasks]]
id = "answer"
question = "{{question}}"

# The end tier: a 135M model as it is. llama.cpp and 4 bits, as on a phone: several times the speed of float32 here.
[nodes.phone]
kind = "llamacpp"
source = "{small}"
tier = "end"
max_context = 2048
threads = {threads}

# The edge tier: the same base, with an adapter for film reviews. llama.cpp takes no adapters of safetensors.
[models.small]
source = "{small}"
max_context = 2048
threads = {threads}

[nodes.roadside]
kind = "local"
model = "small"
tier = "edge"

# The cloud tier: 1.5 billion parameters.
[nodes.centre]
kind = "llamacpp"
source = "{large}"
tier = "cloud"
max_context = 2048
threads = {threads}

[experts.end]
node = "phone"
description = "A small assistant for short questions of every kind."
price_per_mtok = {price_end}
max_tokens = {max_end}

[experts.edge]
node = "roadside"
description = "Says whether a film review is positive or negative."
system_prompt = "{edge_prompt}"
adapter = {{ name = "{adapter}", folder = "{folder}" }}
price_per_mtok = {price_edge}
max_tokens = {max_edge}

[experts.cloud]
node = "centre"
description = "A larger model: grade-school maths step by step, code, and other questions that need thought."
system_prompt = "{cloud_prompt}"
price_per_mtok = {price_cloud}
max_tokens = {max_cloud}

[vertical]
experts = ["end", "edge", "cloud"]
policy = "{policy}"
"""

CLOUD_PROMPT: Final = "Reason briefly in plain words, without LaTeX. End with: The answer is"
"""What the cloud expert is told. Told to answer in a word where it can, it answers problems with a bare, wrong
number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """The three experts over recorded answers.

    Attributes:
        config: What they were made of, read from `file`.
        file: The agora.toml.
        square: The experts, named after their tiers.
        backends: What remembers their answers, by tier.
    """

    config: Config
    file: Path
    square: Square
    backends: Mapping[str, RecordedBackend]

    def expert(self, tier: str) -> Expert:
        """The expert of a tier."""
        found = self.square.get(tier)
        assert found is not None
        return found


def write_config(file: Path, *, adapter: Path, sha256: str, policy: Path, threads: int) -> Config:
    """Writes the agora.toml of the three tiers, and reads it as `agora` does.

    Args:
        file: Where.
        adapter: Folder of the edge expert's adapter.
        sha256: Of the adapter's weights: part of its name, for an adapter of one name never changes.
        policy: Folder for what `agora calibrate` finds.
        threads: CPU threads of each model.
    """
    text = CONFIG.format(
        file=file,
        small=SMALL,
        large=LARGE,
        threads=threads,
        edge_prompt=SST2_PROMPT,
        cloud_prompt=CLOUD_PROMPT,
        adapter=f"sst2-{sha256[:8]}@v1",
        folder=adapter.as_posix(),
        policy=policy.as_posix(),
        **{f"price_{tier}": price for tier, price in PRICES.items()},
        **{f"max_{tier}": most for tier, most in MAX_TOKENS.items()},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def open_tiers(
    config: Config,
    file: Path,
    *,
    answers: Path,
    store: ModelStore,
    fresh: bool = False,
    openers: Mapping[str, Opener] = OPENERS,
) -> Tiers:
    """The square of the three tiers; each model is opened when it is asked what it was not asked before.

    Args:
        config: What `write_config` returned.
        file: Where it wrote.
        answers: Folder of the recorded answers.
        store: Where the models are.
        fresh: Whether what is recorded is not to be used.
        openers: How each kind of node is opened.
    """
    opening = Opening(config=config, store=store, pull=True)

    def recorded(tier: str) -> RecordedBackend:
        name = config.experts[tier].node
        node = config.nodes[name]
        return RecordedBackend(
            lambda: openers[node.kind](name, node, opening),
            answers / f"{tier}.jsonl",
            name=name,
            # The adapter is part of every request; how many threads there are changes nothing that is said.
            identity=f"{node.kind}:{LARGE if tier == CLOUD else SMALL}",
            capabilities=CAPABILITIES[tier],
            fresh=fresh,
        )

    backends = {tier: recorded(tier) for tier in TIERS}
    return Tiers(
        config=config,
        file=file,
        square=Square([_expert(config, tier, backends[tier]) for tier in TIERS]),
        backends=backends,
    )


def _expert(config: Config, tier: str, backend: Backend) -> Expert:
    (card,) = (c for c in expert_cards(config) if c.name == tier)
    asked = config.experts[tier]
    return Expert(
        card=replace(card, context_tokens=backend.capabilities.max_context),
        backend=backend,
        system_prompt=system_prompt_of(config, tier),
        adapter=AdapterRef.parse(asked.adapter.name) if asked.adapter else None,
        temperature=asked.temperature,
        node=asked.node,
    )
