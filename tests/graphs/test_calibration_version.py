"""Whatever changes an expert's answers makes another version of it, as far as it can be known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agora.config import Config, load_config
from agora.errors import AdapterError
from agora.network.multipath import MultipathBackend
from agora.network.path import Path as NetPath
from agora.network.ways import Way
from agora.protocols import Backend
from agora.routing.trust import Version
from agora.square import Expert, Square
from agora.types import AdapterRef, ExpertCard, Tier
from experts.adapters import AdapterInfo
from experts.engine.registry import AdapterRegistry, Registered
from experts.fake import FakeBackend
from experts.neighbour import Line, NeighbourBackend
from graphs.build import departure_of
from graphs.calibrating import policy_folder, version_of
from graphs.calibration_version import adapter_now, asked_for, fingerprint


def expert(name: str, backend: Backend, *, tier: Tier = Tier.END, price: float = 1.0, **more: object) -> Expert:
    card = ExpertCard(name=name, description="an expert", tier=tier, price_per_mtok=price)
    return Expert(card=card, backend=backend, **more)  # type: ignore[arg-type]


def test_versions_follow_the_model_that_the_configuration_names(tmp_path: Path) -> None:
    file = tmp_path / "agora.toml"
    file.write_text(
        'models.small.source = "smollm2-135m"\n'
        '[nodes.here]\nkind = "local"\nmodel = "small"\n'
        '[nodes.there]\nkind = "openai"\nurl = "http://127.0.0.1:1/v1"\nmodel = "gpt-x"\n'
        '[experts.a]\nnode = "here"\ndescription = "a"\n[experts.b]\nnode = "there"\ndescription = "b"\n'
        '[vertical]\npolicy = "learned"\n'
    )
    config: Config = load_config(file)
    a, b = expert("a", FakeBackend(name="here"), node="here"), expert("b", FakeBackend(name="there"), node="there")
    assert version_of(a, config) == Version(expert="a", adapter=None, base="smollm2-135m")
    assert version_of(b, config).base == "gpt-x"
    assert version_of(a).base == "here"
    assert version_of(dataclasses.replace(a, adapter=AdapterRef.parse("x@v3")), config).adapter == "x@v3"
    assert policy_folder(config) == tmp_path / "learned"
    assert policy_folder(Config()).name == "vertical"


def test_how_an_expert_is_spoken_to_belongs_to_its_version() -> None:
    plain = expert("small", FakeBackend(name="m1"))
    cooler = dataclasses.replace(plain, temperature=1.0)
    terse = dataclasses.replace(plain, system_prompt="Be brief.")
    shorter = dataclasses.replace(plain, card=dataclasses.replace(plain.card, max_tokens=8))
    versions = [version_of(e) for e in (plain, cooler, terse, shorter)]
    assert len(set(versions)) == 4 and len({v.file for v in versions}) == 4
    assert version_of(dataclasses.replace(plain, system_prompt="Be brief.")) == versions[2]
    assert versions[0].settings == "" and "settings" in versions[1].words


class Serving(FakeBackend):
    """A backend that tells which adapters it has."""

    def __init__(self, adapters: Mapping[AdapterRef, AdapterInfo] | Sequence[AdapterRef]) -> None:
        super().__init__(name="serving")
        self.adapters = adapters


def weights(sha256: str) -> AdapterInfo:
    return AdapterInfo(rank=8, modules=("q",), parameters=1, sha256=sha256, config_sha256="c" * 64)


REFS = [AdapterRef.parse(t) for t in ("sst2", "sst2@v1", "sst2@v2", "sst2@v10", "other@v11", "other")]


@given(held=st.lists(st.sampled_from(REFS), unique=True), asked=st.sampled_from(REFS))
def test_an_alias_stands_for_what_requests_find(held: list[AdapterRef], asked: AdapterRef) -> None:
    registry = AdapterRegistry("b")
    for n, ref in enumerate(held):
        registry.add(Registered(ref, f"a{n}", weights(f"{n}" * 64)))
    now = adapter_now(dataclasses.replace(expert("e", Serving(registry.infos)), adapter=asked))
    try:
        found = registry.find(asked)
    except AdapterError:
        assert now == str(asked)
    else:
        told = f"{found.info.sha256[:8]}.{found.info.config_sha256[:8]}"
        assert now == (f"{found.ref}#{told}" if found.ref.version is None else str(found.ref))


def test_an_alias_that_moves_makes_another_version() -> None:
    backend = Serving([AdapterRef.parse("sst2@v1")])
    one = dataclasses.replace(expert("e", backend), adapter=AdapterRef.parse("sst2"))
    before, told = version_of(one), fingerprint(one)
    assert before.adapter == "sst2@v1"
    backend.adapters = [AdapterRef.parse("sst2@v1"), AdapterRef.parse("sst2@v2")]
    assert version_of(one).adapter == "sst2@v2" and version_of(one) != before
    assert fingerprint(one) != told
    # The same name with other weights is another adapter, too.
    ref = AdapterRef.parse("sst2")
    backend.adapters = {ref: weights("a" * 64)}
    first = version_of(one)
    backend.adapters = {ref: weights("b" * 64)}
    assert version_of(one) != first


def test_over_several_ways_every_end_counts() -> None:
    ends = [Serving([AdapterRef.parse("sst2@v1")]) for _ in range(2)]
    ways = [Way(path=NetPath(name=n, links=(), target="there"), backend=b) for n, b in zip("ab", ends, strict=True)]
    one = dataclasses.replace(expert("e", MultipathBackend(ways, name="m")), adapter=AdapterRef.parse("sst2"))
    assert adapter_now(one) == "sst2@v1"
    ends[1].adapters = [AdapterRef.parse("sst2@v2")]
    assert adapter_now(one) == "sst2@v1 or sst2@v2"


async def test_what_a_neighbour_tells_of_its_expert_is_part_of_the_version() -> None:
    def reached(told: str) -> Expert:
        line = Line(node="a" * 16, max_hops=3)
        backend = NeighbourBackend(
            "http://127.0.0.1:1", "finance", name="there.finance", line=line, way=("b" * 16,), told_version=told
        )
        return expert("there.finance", backend, node="there")

    experts = [reached("77aa"), reached("88bb"), reached("")]
    first, second, silent = map(version_of, experts)
    assert (first.base, second.base, silent.base) == ("finance#77aa", "finance#88bb", "finance")
    assert len({first, second, silent}) == 3
    # Told on, it is what the node said that has it: the same on every way.
    assert [fingerprint(e) for e in experts] == ["77aa", "88bb", ""]
    for e in experts:
        await e.backend.aclose()


def test_a_fingerprint_follows_what_makes_the_answers_and_tells_no_prompt() -> None:
    plain = expert("a", FakeBackend(name="m1"))
    others = [
        dataclasses.replace(plain, system_prompt="You know the secret."),
        dataclasses.replace(plain, temperature=0.5),
        dataclasses.replace(plain, adapter=AdapterRef.parse("x@v1")),
        expert("a", FakeBackend(name="m2")),
    ]
    told = [fingerprint(e) for e in (plain, *others)]
    assert len(set(told)) == 5
    assert all(len(t) == 16 and int(t, 16) >= 0 for t in told)
    # Its price, and what others do to a text before it comes here, change no answer.
    dearer = dataclasses.replace(plain, card=dataclasses.replace(plain.card, price_per_mtok=7.0, tier=Tier.CLOUD))
    table = Config().vertical.model_copy(update={"redact": ("email",)})
    assert fingerprint(dearer, Config().model_copy(update={"vertical": table})) == told[0]


def test_only_what_is_sampled_depends_on_the_samples() -> None:
    assert asked_for(("entropy", "p_true"), 5) == asked_for(("entropy", "p_true"), 9) == ("entropy", "p_true")
    assert asked_for(("self_consistency",), 5) != asked_for(("self_consistency",), 9)


def test_everything_that_is_done_before_a_text_leaves_makes_another_version_of_those_it_leaves_for() -> None:
    ways: list[dict[str, object]] = [{}, {"redact": ("email",)}, {"redact": ("phone",)}, {"condense_tokens": 64}]
    ways += [{"condense_tokens": 65}, {"extract": 4}, {"extract": 4, "redact": ("email",)}]
    configs = [Config().model_copy(update={"vertical": Config().vertical.model_copy(update=w)}) for w in ways]
    edge, end = expert("a", FakeBackend(name="m"), tier=Tier.EDGE), expert("a", FakeBackend(name="m"))
    assert len({version_of(edge, c) for c in configs}) == len(ways)
    assert len({version_of(end, c) for c in configs}) == 1
    assert version_of(edge, configs[0]) == version_of(edge)
    assert [departure_of(c, Square()) is not None for c in configs] == [bool(w) for w in ways]
