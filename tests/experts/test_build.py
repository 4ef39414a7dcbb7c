"""From a configuration to a square: every kind of node, and nothing left open when one fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agora.config import Config, parse_config
from agora.errors import (
    AdapterError,
    BackendTimeout,
    BadReply,
    ConfigError,
    InvalidRequest,
    ModelError,
    Overloaded,
    Rejected,
    Unavailable,
)
from agora.protocols import Backend, Capabilities
from agora.types import Modality, Tier
from experts import nodes
from experts.build import check_keys, expert_cards, open_square, ready_names
from experts.models import ModelStore
from experts.ready import ready_experts

EXPERT = '[experts.a]\nnode = "n"\ndescription = "d"\n'


def config(text: str, file: Path | None = None) -> Config:
    return parse_config(text, file=file)


def fake(options: str = "", more: str = EXPERT) -> Config:
    return config(f'[nodes.n]\nkind = "fake"\n{options}\n{more}')


async def ask(config: Config, question: str = "what is it?", **options: Any) -> str:
    square = await open_square(config, **options)
    try:
        return (await square.experts[0].ask(question)).text
    finally:
        await square.aclose()


async def test_a_ready_expert_brings_its_card_and_prompt_and_the_file_overrides_them() -> None:
    square = await open_square(
        fake(
            'tier = "edge"',
            '[experts.money]\nnode = "n"\nready = "finance"\nkeywords = ["coin"]\nmax_tokens = 7\nprice_per_mtok = 2\n'
            'temperature = 0.5\n[experts.b]\nnode = "n"\ndescription = "pictures"\nmodalities = ["image", "text"]\n'
            'system_prompt = "Look."\n',
        )
    )
    money, b = square
    ready = ready_experts()["finance"]
    assert money.card.description == ready.card.description
    assert money.card.examples == ready.card.examples
    assert money.card.keywords == ("coin",)
    assert (money.card.max_tokens, money.card.price_per_mtok, money.temperature) == (7, 2, 0.5)
    assert money.system_prompt == ready.system_prompt
    assert (money.card.tier, money.node) == (Tier.EDGE, "n")
    assert b.card.modalities == (Modality.IMAGE, Modality.TEXT)
    assert b.system_prompt == "Look."
    assert money.backend is b.backend


async def test_a_scripted_node_repeats_or_answers_by_a_piece_of_the_question() -> None:
    assert await ask(fake()) == "what is it?"
    assert await ask(fake('reply = "this"')) == "this"
    both = fake('reply = "this"\nreplies = { "the time" = "noon" }')
    assert await ask(both, "what is the time?") == "noon"
    assert await ask(both, "what is it?") == "this"


@pytest.mark.looptime
async def test_a_scripted_node_takes_its_time_and_serves_so_many_at_once() -> None:
    square = await open_square(fake('reply = "a b c"\nlatency_s = 2\nseconds_per_token = 0.5\nmax_running = 1'))
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(square.experts[0].ask("q?") for _ in range(2)))
    assert asyncio.get_running_loop().time() - began == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        ("unavailable", Unavailable),
        ("timeout", BackendTimeout),
        ("overloaded", Overloaded),
        ("bad_reply", BadReply),
        ("rejected", Rejected),
    ],
)
async def test_a_scripted_node_fails_as_told_and_only_as_often(fail: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await ask(fake(f'fail = "{fail}"'))
    square = await open_square(fake(f'reply = "yes"\nfail = "{fail}"\nfail_first = 1'))
    with pytest.raises(error):
        await square.experts[0].ask("q?")
    assert (await square.experts[0].ask("q?")).text == "yes"
    assert (await square.health())["a"].ok
    dead = await open_square(fake(f'fail = "{fail}"'))
    assert not (await dead.health())["a"].ok


@pytest.mark.looptime
async def test_a_scripted_node_can_hang() -> None:
    square = await open_square(fake('fail = "hang"'))
    with pytest.raises(BackendTimeout):
        await square.experts[0].ask("q?", timeout_s=100)


async def test_claimed_capabilities_are_those_of_the_file() -> None:
    square = await open_square(fake("capabilities = { score = false, json_schema = true, max_context = 512 }"))
    can = square.experts[0].backend.capabilities
    assert (can.score, can.json_schema, can.logprobs) == (False, True, True)
    assert square.experts[0].card.context_tokens == 512


async def test_an_adapter_of_a_scripted_node_is_asked_for() -> None:
    square = await open_square(fake("", EXPERT + 'adapter = { name = "tone@v2" }\n'))
    answer = await square.experts[0].ask("q?")
    assert answer.adapter == "tone@v2"


async def test_a_server_is_asked_with_its_key_its_model_and_its_time_outs() -> None:
    seen: list[tuple[str | None, dict[str, Any]]] = []

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        seen.append((request.headers.get("Authorization"), body))
        choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        return web.json_response({"id": "1", "model": "m1", "choices": [choice], "usage": usage})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    text = (
        f'[nodes.n]\nkind = "openai"\nurl = "http://127.0.0.1:{port}/v1"\nmodel = "m1"\napi_key_env = "KEY"\n'
        "connect_timeout_s = 1\nfirst_token_timeout_s = 2\ntimeout_s = 3\nmax_running = 2\nmax_waiting = 0\n"
        'max_tokens_field = "max_completion_tokens"\n' + EXPERT
    )
    try:
        assert await ask(config(text), environment={"KEY": "sk-1"}) == "hello"
    finally:
        await runner.cleanup()
    ((authorization, body),) = seen
    assert authorization == "Bearer sk-1"
    assert body["model"] == "m1"
    assert "max_completion_tokens" in body


@pytest.mark.parametrize(("server", "score"), [("", False), ('server = "openai"', False), ('server = "vllm"', True)])
async def test_the_kind_of_server_tells_what_it_can_do(server: str, score: bool) -> None:
    text = f'[nodes.n]\nkind = "openai"\nurl = "http://127.0.0.1:9"\nmodel = "m"\n{server}\n{EXPERT}'
    square = await open_square(config(text))
    assert square.experts[0].backend.capabilities.score is score
    assert square.experts[0].card.tier is Tier.CLOUD
    await square.aclose()


async def test_all_missing_api_keys_are_told_at_once_and_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    node = 'kind = "openai"\nurl = "http://127.0.0.1:9"\nmodel = "m"\n'
    text = f'[nodes.n]\n{node}api_key_env = "ONE"\n[nodes.m]\n{node}api_key_env = "TWO"\n[nodes.k]\n{node}'
    text += EXPERT + EXPERT.replace("a]", "b]").replace('"n"', '"m"') + EXPERT.replace("a]", "c]").replace('"n"', '"k"')
    monkeypatch.setattr(nodes, "OPENERS", {})
    with pytest.raises(ConfigError) as caught:
        await open_square(config(text), environment={"TWO": ""})
    assert "nodes.n.api_key_env: the environment variable ONE is not set" in caught.value.message
    assert "nodes.m.api_key_env: the environment variable TWO is not set" in caught.value.message


KEYS = (
    '[nodes.n]\nkind = "openai"\nurl = "http://127.0.0.1:9"\nmodel = "m"\napi_key_env = "ONE"\n'
    '[nodes.m]\nkind = "vllm"\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\napi_key_env = "TWO"\n'
    '[nodes.unused]\nkind = "vllm"\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\napi_key_env = "THREE"\n'
    '[neighbours.edge]\nurl = "http://127.0.0.1:9"\napi_key_env = "FOUR"\n'
    '[neighbours.open]\nurl = "http://127.0.0.1:9"\n' + EXPERT + EXPERT.replace("a]", "b]").replace('"n"', '"m"')
)


async def test_keys_of_vllm_servers_and_of_neighbours_are_missed_together() -> None:
    said = "the environment variable {} is not set"
    one, two = f"nodes.n.api_key_env: {said.format('ONE')}", f"nodes.m.api_key_env: {said.format('TWO')}"
    four = f"neighbours.edge.api_key_env: {said.format('FOUR')}"
    with pytest.raises(ConfigError) as caught:
        check_keys(config(KEYS), environment={"FOUR": ""}, neighbours=True)
    assert caught.value.message.endswith(f": {one}; {two}; {four}")
    with pytest.raises(ConfigError) as caught:
        await open_square(config(KEYS), environment={"ONE": "x"})
    assert caught.value.message.endswith(f": {two}")
    keys = {"ONE": "x", "TWO": "y", "FOUR": "z"}
    check_keys(config(KEYS), environment=keys, neighbours=True)
    await (await open_square(config(KEYS), environment={"ONE": "x", "TWO": "y"})).aclose()


async def test_a_local_node_runs_a_model_with_its_adapters(
    tiny_model: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    text = (
        f'[models.m]\nsource = "{tiny_model}"\nthreads = 1\nmax_batch = 2\nmax_context = 64\n'
        f'[nodes.n]\nkind = "local"\nmodel = "m"\n{EXPERT}max_tokens = 4\n'
        f'adapter = {{ name = "red@v1", folder = "{tiny_adapters["red@v1"]}" }}\n'
        '[experts.b]\nnode = "n"\ndescription = "d"\nmax_tokens = 4\n'
    )
    square = await open_square(config(text), store=ModelStore(tmp_path))
    try:
        with_adapter, without = square
        assert with_adapter.backend is without.backend
        assert with_adapter.card.context_tokens == 64
        answers = await asyncio.gather(with_adapter.ask("hello"), without.ask("hello"))
        assert [a.adapter for a in answers] == ["red@v1", None]
        assert all(0 < a.usage.completion_tokens <= 4 for a in answers)
    finally:
        await square.aclose()


async def test_an_adapter_that_is_none_is_an_error_and_closes_the_node(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experts.local import LocalBackend

    closed: list[str] = []
    aclose = LocalBackend.aclose

    async def watched(self: LocalBackend) -> None:
        closed.append(self.name)
        await aclose(self)

    monkeypatch.setattr(LocalBackend, "aclose", watched)
    text = (
        f'[models.m]\nsource = "{tiny_model}"\nthreads = 1\n[nodes.n]\nkind = "local"\nmodel = "m"\n{EXPERT}'
        f'adapter = {{ name = "red@v1", folder = "{tmp_path}" }}\n'
    )
    with pytest.raises(AdapterError):
        await open_square(config(text), store=ModelStore(tmp_path / "cache"))
    assert closed == ["n"]


async def test_a_model_that_is_not_here_is_fetched_only_if_allowed(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []

    class Store(ModelStore):
        def pull(self, source: str, **options: Any) -> Path:
            from experts.progress import PullProgress

            options["progress"](PullProgress(phase="downloading"))
            raise ModelError("the line is dead")

    text = f'[models.m]\nsource = "smollm2-135m"\n[nodes.n]\nkind = "local"\nmodel = "m"\n{EXPERT}'
    store = Store(tmp_path)
    with pytest.raises(ModelError, match="not on this machine") as caught:
        await open_square(config(text), store=store, progress=lambda source, p: told.append((source, p.phase)))
    assert caught.value.hint == "type: agora models pull smollm2-135m"
    assert told == []
    with pytest.raises(ModelError, match="the line is dead"):
        await open_square(config(text), store=store, pull=True, progress=lambda s, p: told.append((s, p.phase)))
    assert told == [("smollm2-135m", "downloading")]


class Closing:
    """A backend that knows whether it was closed."""

    capabilities = Capabilities()

    def __init__(self) -> None:
        self.closed = 0

    async def aclose(self) -> None:
        self.closed += 1


TWO_NODES = '[nodes.n]\nkind = "fake"\n[nodes.m]\nkind = "local"\nmodel = "x"\n[models.x]\nsource = "x"\n' + (
    EXPERT + EXPERT.replace("a]", "b]").replace('"n"', '"m"')
)


@pytest.mark.looptime
@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_when_one_node_fails_those_already_open_are_closed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Closing()

    async def quick(*_: object) -> Any:
        return opened

    async def slow(*_: object) -> Any:
        await asyncio.sleep(5)
        raise ModelError("no such weights")

    monkeypatch.setattr("experts.paths.OPENERS", {"fake": quick, "local": slow})
    opening = asyncio.ensure_future(open_square(config(TWO_NODES)))
    if how == "fails":
        with pytest.raises(ModelError, match="no such weights"):
            await opening
    else:
        await asyncio.sleep(1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    assert opened.closed == 1


@pytest.mark.looptime
async def test_nodes_are_opened_at_the_same_time_and_only_those_that_experts_are_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    async def slow(name: str, *_: object) -> Backend:
        await asyncio.sleep(5)
        opened.append(name)
        backend: Any = Closing()
        return backend

    monkeypatch.setattr("experts.paths.OPENERS", {"fake": slow, "local": slow})
    began = asyncio.get_running_loop().time()
    square = await open_square(config(TWO_NODES + '[nodes.idle]\nkind = "fake"\n'))
    assert asyncio.get_running_loop().time() - began == pytest.approx(5.0)
    assert sorted(opened) == ["m", "n"]
    assert [e.node for e in square] == ["n", "m"]


def test_a_ready_expert_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r'experts.a.ready = "law": allowed: communications, .*education'):
        expert_cards(fake("", '[experts.a]\nnode = "n"\nready = "law"\n'))
    assert set(ready_names()) == set(ready_experts())


def test_a_card_that_cannot_be_is_refused() -> None:
    with pytest.raises((ConfigError, InvalidRequest)):
        config(f'[nodes.n]\nkind = "fake"\n{EXPERT.replace("[experts.a]", "[experts.-]")}')
