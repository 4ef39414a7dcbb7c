from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from agora.errors import AdapterError, InvalidRequest
from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.chain import Chain
from fed.headers import UpdateHeader
from fed.update import MAX_HEADER_BYTES, Expected, Update, decode, encode, max_bytes
from fed.wire import NO_CHECKSUM, Reason, Refused, pack
from fed.words import Job, Trained

SPEC = Spec.lora({"q": LayerSize(60, 50), "v": LayerSize(60, 20)}, rank=4, alpha=8, base="smollm2@1")
JOB = Job(id=7, client="phone-3", model="all", version=2, seed=11, steps=20)
CHAINS: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "int8": [{"kind": "int8"}],
    "int8 per tensor": [{"kind": "int8", "block": None}],
    "top_k": [{"kind": "top_k", "fraction": 0.01}],
    "top_k by bitmap": [{"kind": "top_k", "fraction": 0.5}],
    "everything": [
        {"kind": "clip", "norm": 1.0},
        {"kind": "weight"},
        {"kind": "noise", "multiplier": 0.1},
        {"kind": "top_k", "fraction": 0.2},
        {"kind": "int8", "block": 32},
    ],
}


def made(chain: str = "dense", spec: Spec = SPEC, **changes: Any) -> Update:
    rng = np.random.default_rng(1)
    start = Adapter(spec, rng.standard_normal(spec.size, np.float32))
    trained = Trained(
        delta=rng.standard_normal(spec.size, np.float32), examples=40, steps=20, metrics={"loss": 0.5, "grad_norm": 1.0}
    )
    update, _ = Update.of(JOB, trained, start, federation="run-1", chain=Chain.from_config(CHAINS[chain]))
    return replace(update, **changes)


EXPECTED = Expected.of(JOB, SPEC, federation="run-1")


@dataclass
class Raw:
    """Stands for a header that no honest client would write."""

    text: str

    def model_dump_json(self) -> str:
        return self.text


def forged(
    data: bytes,
    header: Callable[[dict[str, Any]], Any] = lambda _: None,
    parts: Callable[[dict[str, NDArray[Any]]], Any] = lambda _: None,
) -> bytes:
    """The message with something changed and the checksum right again: what a liar can send."""
    size = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["agora"]) | {"sha256": NO_CHECKSUM}
    tensors = load(data)
    header(meta)
    parts(tensors)
    return pack(tensors, Raw(json.dumps(meta, separators=(",", ":"))))  # type: ignore[arg-type]


def reason(data: bytes, expected: Expected = EXPECTED) -> Reason:
    with pytest.raises(Refused) as caught:
        decode(data, expected=expected)
    assert caught.value.code == caught.value.reason.value
    return caught.value.reason


@pytest.mark.parametrize("chain", CHAINS)
def test_what_is_read_is_what_was_sent(chain: str) -> None:
    update = made(chain)
    data = encode(update)
    read = decode(data, expected=EXPECTED)
    assert read == update
    np.testing.assert_array_equal(read.sent.delta, update.sent.delta)
    np.testing.assert_array_equal(read.delta, update.delta)
    assert read.sent.chain == Chain.from_config(CHAINS[chain])
    assert read.encoded_bytes == len(data) <= max_bytes(SPEC)
    assert encode(read) == data


@pytest.mark.parametrize(
    "method", [Method.PREFIX, Method.P_TUNING, Method.PROMPT, Method.DENSE], ids=lambda method: str(method)
)
def test_methods_other_than_lora(method: Method) -> None:
    spec = Spec(method=method, base="b", shapes={"x": (3, 5), "y": (7,)}, rank=3)
    read = decode(encode(made(spec=spec)), expected=replace(EXPECTED, spec=spec))
    assert read.spec == spec and read.delta.shape == (22,)


@pytest.mark.parametrize("chain", CHAINS)
def test_same_update_same_bytes(chain: str) -> None:
    update = made(chain)
    turned = replace(update, metrics=dict(reversed(list(update.metrics.items()))))
    # Hash maps inside safetensors have another order every time.
    assert {encode(update) for _ in range(30)} == {encode(made(chain))} == {encode(turned)}
    assert encode(update) != encode(replace(update, examples=41))


def test_nothing_but_declared_fields_and_the_numbers_is_in_the_bytes() -> None:
    """Read without agora: every byte belongs to a length, a declared field, a tensor or eight-byte padding."""
    for chain in CHAINS:
        update = made(chain)
        data = encode(update)
        size = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + size].decode()
        header = json.loads(text)
        meta = header.pop("__metadata__")
        assert set(meta) == {"agora"}
        assert set(json.loads(meta["agora"])) == set(UpdateHeader.model_fields)
        assert set(header) == set(update.sent.parts)
        spans = sorted(tensor["data_offsets"] for tensor in header.values())
        assert [s[0] for s in spans] == [0, *(s[1] for s in spans[:-1])]
        assert 8 + size + spans[-1][1] == len(data)
        assert len(text) - len(text.rstrip(" ")) < 8
    assert "phone-3" not in repr(update.sent.parts)


def test_bytes_of_a_real_adapter() -> None:
    """r=8 on q and v of SmolLM2-135M, 460,800 numbers: int8 takes a quarter, top-1 % less than a fiftieth."""
    layers = {f"l{i}.{p}": LayerSize(576, n) for i in range(30) for p, n in (("q", 576), ("v", 192))}
    spec = Spec.lora(layers, rank=8, alpha=16)
    dense, int8, top, both = (len(encode(made(chain, spec))) for chain in ("dense", "int8", "top_k", "everything"))
    assert 4 * spec.size < dense < 4 * spec.size * 1.001
    assert dense / 4.01 < int8 < dense / 3.9
    assert top < dense / 50
    assert both < dense / 10
    for chain in CHAINS:
        update = made(chain, spec)
        payload = sum(part.nbytes for part in update.sent.parts.values())
        assert payload <= update.sent.chain.payload_bytes(spec)
        assert len(encode(update)) - payload < 1500


def test_the_servers_event_tells_what_the_update_tells() -> None:
    update = decode(encode(made("everything")), expected=EXPECTED)
    event = update.arrived(3.5)
    assert (event.at, event.job, event.client, event.examples, event.steps, event.loss) == (
        3.5,
        7,
        "phone-3",
        40,
        20,
        0.5,
    )
    assert event.norm == pytest.approx(float(np.linalg.norm(update.delta)), rel=1e-5)
    assert replace(update, metrics={}).arrived(0.0).loss is None


def test_a_weight_given_by_the_client_is_told_and_taken_out_again() -> None:
    sent = Chain.from_config([{"kind": "weight"}])
    rng = np.random.default_rng(2)
    start, delta = Adapter.zeros(SPEC), rng.standard_normal(SPEC.size, np.float32)
    update, _ = Update.of(JOB, Trained(delta=delta, examples=40, steps=1), start, federation="run-1", chain=sent)
    read = decode(encode(update), expected=EXPECTED)
    assert read.sent.weight == 40.0
    np.testing.assert_allclose(read.sent.delta, 40 * delta, rtol=1e-6)
    np.testing.assert_allclose(read.delta, delta, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"federation": "run-2"}, Reason.FEDERATION),
        ({"job": 8}, Reason.JOB),
        ({"client": "phone-4"}, Reason.CLIENT),
        ({"model": "cluster-1"}, Reason.MODEL),
        ({"version": 3}, Reason.VERSION),
        ({"examples": 0}, Reason.ABSURD),
        ({"examples": -5}, Reason.ABSURD),
        ({"examples": 10**12}, Reason.ABSURD),
        ({"steps": 0}, Reason.ABSURD),
        ({"steps": 21}, Reason.ABSURD),
    ],
    ids=str,
)
def test_an_update_that_says_something_else_than_its_job_is_refused(change: dict[str, Any], why: Reason) -> None:
    assert reason(encode(made(**change))) is why


def test_more_rows_than_the_client_said_when_it_joined_are_refused() -> None:
    assert decode(encode(made()), expected=replace(EXPECTED, examples=40)).examples == 40
    assert reason(encode(made()), replace(EXPECTED, examples=39)) is Reason.ABSURD


def test_a_job_without_steps_leaves_them_to_the_client_within_reason() -> None:
    free = replace(EXPECTED, steps=None)
    assert decode(encode(made(steps=5000)), expected=free).steps == 5000
    assert reason(encode(made(steps=10**8)), free) is Reason.ABSURD


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (replace(SPEC, base="smollm2@2"), Reason.BASE),
        (SPEC.at_rank(8), Reason.SHAPE),
        (Spec.lora(SPEC.layers, rank=4, alpha=16, base=SPEC.base), Reason.SHAPE),
        (Spec.lora(SPEC.layers, rank=4, alpha=8, rslora=True, base=SPEC.base), Reason.SHAPE),
        (Spec.lora(dict(reversed(list(SPEC.layers.items()))), rank=4, alpha=8, base=SPEC.base), Reason.SHAPE),
    ],
    ids=["base", "rank", "alpha", "rslora", "order of layers"],
)
def test_an_update_of_another_adapter_is_refused(spec: Spec, why: Reason) -> None:
    """Also where the number of numbers is the same."""
    assert reason(encode(made(spec=spec))) is why


def test_an_update_through_another_chain_is_refused_if_one_is_asked_for() -> None:
    asked = replace(EXPECTED, chain=Chain.from_config(CHAINS["int8"]))
    assert decode(encode(made("int8")), expected=asked) == made("int8")
    assert reason(encode(made("dense")), asked) is Reason.CHAIN


def test_a_norm_above_the_limit_is_refused() -> None:
    """A client that says it clips, and does not, is found out."""
    data = encode(made("everything"))
    norm = decode(data, expected=EXPECTED).norm
    assert decode(data, expected=replace(EXPECTED, norm=norm * 1.01)).norm == norm
    assert reason(data, replace(EXPECTED, norm=norm * 0.99)) is Reason.ABSURD


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: h.update(format=2), Reason.FORMAT),
        (lambda h: h.update(format="1"), Reason.FORMAT),
        (lambda h: h.update(kind="version"), Reason.FORMAT),
        (lambda h: h.pop("client"), Reason.HEADER),
        (lambda h: h.update(row="the patient said"), Reason.HEADER),
        (lambda h: h.update(job="7"), Reason.HEADER),
        (lambda h: h.update(job=True), Reason.HEADER),
        (lambda h: h.update(job=10**30), Reason.HEADER),
        (lambda h: h.update(version=-1), Reason.HEADER),
        (lambda h: h.update(examples=1.5), Reason.HEADER),
        (lambda h: h.update(examples=10**400), Reason.HEADER),
        (lambda h: h.update(client="a\nb"), Reason.HEADER),
        (lambda h: h.update(client="x" * 200), Reason.HEADER),
        (lambda h: h.update(metrics={"loss": float("nan")}), Reason.HEADER),
        (lambda h: h.update(metrics={"loss": float("inf")}), Reason.HEADER),
        (lambda h: h.update(metrics={"loss": "low"}), Reason.HEADER),
        (lambda h: h.update(metrics={"The patient": 1.0}), Reason.HEADER),
        (lambda h: h.update(metrics={f"m{i}": 0.0 for i in range(33)}), Reason.HEADER),
        (lambda h: h.update(weight=0.0), Reason.HEADER),
        (lambda h: h.update(weight=2.0), Reason.ABSURD),
        (lambda h: h.update(rank=8), Reason.SHAPE),
        (lambda h: h.update(scaling=1e9), Reason.SHAPE),
        (lambda h: h.update(chain=[{"kind": "zip"}]), Reason.CHAIN),
        (lambda h: h.update(chain=[{"kind": "clip", "norm": "big"}]), Reason.CHAIN),
        (lambda h: h.update(chain=[{"kind": "clip", "norm": 1.0}] * 9), Reason.HEADER),
        (lambda h: h.update(chain=[{"kind": "top_k", "fraction": 1e-9}]), Reason.SHAPE),
        (lambda h: h.update(chain=[{"kind": "top_k", "fraction": 1.0}]), Reason.TENSORS),
        (lambda h: h.update(chain=[{"kind": "int8"}]), Reason.SHAPE),
    ],
)
def test_a_header_that_lies_is_refused(change: Callable[[dict[str, Any]], Any], why: Reason) -> None:
    assert reason(forged(encode(made()), header=change)) is why


@pytest.mark.parametrize("name", ["job", "examples", "rank", "alpha", "weight", "metrics", "chain", "format", "what"])
def test_numbers_of_thousands_of_digits_are_refused(name: str) -> None:
    """Python refuses to write such numbers in decimals, error texts included."""
    data = encode(made())
    size = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["agora"]) | {"sha256": NO_CHECKSUM, name: "HERE"}
    for digits in (1, 30, 400, 6000):
        for form in (
            "9" * digits,
            f"1e{'9' * digits}",
            f'{{"a":{"9" * digits}}}',
            f'[{{"kind":"int8","block":{"9" * digits}}}]',
        ):
            text = json.dumps(meta, separators=(",", ":")).replace('"HERE"', form)
            try:
                decode(pack(load(data), Raw(text)), expected=EXPECTED)  # type: ignore[arg-type]
            except Refused:
                continue
            assert (name, digits) in {("metrics", 1), ("metrics", 30), ("metrics", 400), ("examples", 1), ("format", 1)}


def test_forging_nothing_gives_the_same_message() -> None:
    """Else the refusals above might have another cause."""
    assert decode(forged(encode(made())), expected=EXPECTED) == made()


def put(name: str, value: NDArray[Any]) -> Callable[[dict[str, NDArray[Any]]], Any]:
    return lambda parts: parts.update({name: value})


def damage(chain: str, name: str, change: Callable[[NDArray[Any]], Any]) -> bytes:
    def edit(parts: dict[str, NDArray[Any]]) -> None:
        parts[name] = parts[name].copy()
        change(parts[name])

    return forged(encode(made(chain)), parts=edit)


N = SPEC.size
K = 8
"""⌈1 % of N⌉ numbers travel by "top_k"."""


@pytest.mark.parametrize(
    ("chain", "change", "why"),
    [
        ("dense", put("values", np.zeros(N - 1, np.float32)), Reason.SHAPE),
        ("dense", put("values", np.zeros(N + 1, np.float32)), Reason.SHAPE),
        ("dense", put("values", np.zeros((N, 1), np.float32)), Reason.TENSORS),
        ("dense", put("values", np.zeros(N, np.float64)), Reason.TENSORS),
        ("dense", put("values", np.zeros(N, np.uint32)), Reason.SHAPE),
        ("dense", put("rows", np.zeros(3, np.float32)), Reason.TENSORS),
        ("dense", put("values", np.full(N, np.nan, np.float32)), Reason.NOT_FINITE),
        ("int8", put("scales", np.full(3, np.nan, np.float32)), Reason.NOT_FINITE),
        ("int8", put("scales", np.full(3, -1.0, np.float32)), Reason.ABSURD),
        ("int8", put("scales", np.full(3, 3e38, np.float32)), Reason.NOT_FINITE),
        ("int8", put("scales", np.ones(4, np.float32)), Reason.TENSORS),
        ("int8", lambda parts: parts.pop("scales"), Reason.TENSORS),
        ("int8", lambda parts: parts.pop("values"), Reason.TENSORS),
        ("int8", put("values", np.zeros(N, np.uint8)), Reason.SHAPE),
        ("top_k", put("gaps", np.full(K, 2**32 - 1, np.uint32)), Reason.INDEXES),
        ("top_k", put("gaps", np.full(K, 255, np.uint8)), Reason.INDEXES),
        ("top_k", put("gaps", np.zeros(K + 1, np.uint8)), Reason.INDEXES),
        ("top_k", put("gaps", np.zeros(K, np.int8)), Reason.INDEXES),
        ("top_k", put("gaps", np.zeros(K, np.float32)), Reason.INDEXES),
        ("top_k", put("bitmap", np.zeros(N // 8, np.uint8)), Reason.TENSORS),
        ("top_k", put("values", np.zeros(K, np.int8)), Reason.SHAPE),
        ("top_k", lambda parts: parts.pop("gaps"), Reason.TENSORS),
        ("top_k by bitmap", put("bitmap", np.zeros(N // 8, np.uint8)), Reason.INDEXES),
        ("top_k by bitmap", put("bitmap", np.full(N // 8, 255, np.uint8)), Reason.INDEXES),
        ("top_k by bitmap", put("bitmap", np.zeros(2, np.uint8)), Reason.INDEXES),
    ],
)
def test_tensors_that_lie_are_refused(
    chain: str, change: Callable[[dict[str, NDArray[Any]]], Any], why: Reason
) -> None:
    assert len(made("top_k").sent.parts["values"]) == K
    assert reason(forged(encode(made(chain)), parts=change)) is why


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough(value: float) -> None:
    assert reason(damage("dense", "values", lambda x: x.__setitem__(N // 2, value))) is Reason.NOT_FINITE
    assert reason(damage("top_k", "values", lambda x: x.__setitem__(3, value))) is Reason.NOT_FINITE


def test_oversized_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(data: bytes) -> Mapping[str, Any]:
        raise AssertionError("read")

    monkeypatch.setattr("fed.wire.load", never)
    data = encode(made())
    assert reason(data + bytes(max_bytes(SPEC))) is Reason.OVERSIZED
    announced = (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + data[8:]
    assert reason(announced) is Reason.OVERSIZED
    assert reason((2**63).to_bytes(8, "little") + data[8:]) is Reason.OVERSIZED


def test_cut_short_or_too_long_is_told_so() -> None:
    data = encode(made())
    for end in (0, 7, 60, 300, len(data) - 1):
        assert reason(data[:end]) is Reason.TRUNCATED
    assert reason(data + b"\0") is Reason.DAMAGED


def test_a_flipped_bit_is_found_by_the_checksum() -> None:
    data = bytearray(encode(made()))
    data[-5] ^= 1
    assert reason(bytes(data)) is Reason.CHECKSUM


def test_a_refusal_is_an_adapter_error_with_a_stable_code() -> None:
    with pytest.raises(AdapterError, match="phone-4") as caught:
        decode(encode(made(client="phone-4")), expected=EXPECTED)
    assert caught.value.code == "wrong_client"


def test_the_client_is_told_if_its_update_cannot_be_sent() -> None:
    with pytest.raises(InvalidRequest, match=r"metrics\.loss"):
        encode(made(metrics={"loss": float("nan")}))
    with pytest.raises(InvalidRequest, match="client"):
        encode(made(client='a"b'))


def test_diverged_or_empty_training_makes_no_update() -> None:
    start = Adapter.zeros(SPEC)
    good = Trained(delta=np.zeros(N, np.float32), examples=1, steps=1)
    with pytest.raises(Refused, match="3 of 760"):
        bad = good.delta.copy()
        bad[:3] = np.nan
        Update.of(JOB, replace(good, delta=bad), start, federation="f")
    with pytest.raises(Refused, match="expected 760"):
        Update.of(JOB, replace(good, delta=good.delta[1:]), start, federation="f")
    for nothing in (replace(good, examples=0), replace(good, steps=0)):
        with pytest.raises(InvalidRequest, match="none is too few"):
            Update.of(JOB, nothing, start, federation="f")


def test_a_secret_changes_the_noise() -> None:
    chain = Chain.from_config([{"kind": "clip", "norm": 1.0}, {"kind": "noise", "multiplier": 1.0}])
    trained = Trained(delta=np.zeros(N, np.float32), examples=1, steps=1)

    def noise(secret: int) -> NDArray[np.float32]:
        return Update.of(JOB, trained, Adapter.zeros(SPEC), federation="f", chain=chain, secret=secret)[0].delta

    np.testing.assert_array_equal(noise(5), noise(5))
    assert abs(np.corrcoef(noise(5), noise(0))[0, 1]) < 0.2
