"""Whatever comes in, either it is the update that was sent or it is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from fed.adapter import Adapter, LayerSize, Spec
from fed.chain import Chain
from fed.update import Expected, Update, decode, encode
from fed.wire import CHECKSUM_AT, NO_CHECKSUM, Refused, pack
from fed.words import Job, Trained

SPEC = Spec.lora({"q": LayerSize(6, 5)}, rank=2, alpha=8, base="b")
JOB = Job(id=7, client="c", model="all", version=2, seed=11, steps=20)
EXPECTED = Expected.of(JOB, SPEC, federation="f")
CHAINS: list[list[dict[str, Any]]] = [
    [],
    [{"kind": "int8", "block": 4}],
    [{"kind": "top_k", "fraction": 0.1}],
    [{"kind": "weight", "by": 2.5}, {"kind": "top_k", "fraction": 0.4}, {"kind": "int8", "block": 4}],
]


def message(chain: list[dict[str, Any]]) -> bytes:
    delta = np.random.default_rng(3).standard_normal(SPEC.size, np.float32)
    trained = Trained(delta=delta, examples=5, steps=20, metrics={"loss": 1.0})
    update, _ = Update.of(JOB, trained, Adapter.zeros(SPEC), federation="f", chain=Chain.from_config(chain))
    return encode(update)


MESSAGES = [message(chain) for chain in CHAINS]


@pytest.mark.parametrize("data", MESSAGES, ids=range(len(MESSAGES)))
def test_every_truncation_is_refused(data: bytes) -> None:
    for end in range(len(data)):
        with pytest.raises(Refused):
            decode(data[:end], expected=EXPECTED)


@pytest.mark.parametrize("data", MESSAGES, ids=range(len(MESSAGES)))
def test_every_single_flipped_bit_is_refused(data: bytes) -> None:
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with pytest.raises(Refused):
                decode(bytes(changed), expected=EXPECTED)


@given(
    st.sampled_from(MESSAGES), st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=6)), min_size=1, max_size=5)
)
def test_overwritten_bytes_are_refused(data: bytes, edits: list[tuple[int, bytes]]) -> None:
    changed = bytearray(data)
    for place, new in edits:
        place %= len(data)
        changed[place : place + len(new)] = new
    if bytes(changed) == data:
        return
    with pytest.raises(Refused):
        decode(bytes(changed), expected=EXPECTED)


@given(st.binary(max_size=400), st.booleans())
def test_noise_is_refused(noise: bytes, after_the_opening: bool) -> None:
    if after_the_opening:
        opening = MESSAGES[0][8 : CHECKSUM_AT + 64]
        noise = (len(opening) + len(noise)).to_bytes(8, "little") + opening + noise
    with pytest.raises(Refused):
        decode(noise, expected=EXPECTED)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@dataclass
class Raw:
    text: str

    def model_dump_json(self) -> str:
        return self.text


FIELDS = sorted(json.loads(json.loads(MESSAGES[0][8 : -4 * SPEC.size])["__metadata__"]["agora"]))


@given(st.sampled_from(MESSAGES), st.sampled_from(FIELDS), JSON)
def test_any_value_of_any_field_is_taken_or_refused_and_never_trips(data: bytes, name: str, value: Any) -> None:
    """With the checksum made right again, so that the value is what is judged."""
    size = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["agora"]) | {"sha256": NO_CHECKSUM}
    if name == "sha256":
        return
    changed = pack(load(data), Raw(json.dumps(meta | {name: value}, separators=(",", ":"))))  # type: ignore[arg-type]
    try:
        update = decode(changed, expected=EXPECTED)
    except Refused:
        return
    assert np.isfinite(update.delta).all() and update.examples >= 1 and 1 <= update.steps <= 20
    assert (update.client, update.job, update.version) == ("c", 7, 2)


def sealed(data: bytes) -> bytes:
    """With the right checksum: sha256 of the message with zeros in the checksum's place."""
    zeroed = data[:CHECKSUM_AT] + b"0" * 64 + data[CHECKSUM_AT + 64 :]
    return zeroed[:CHECKSUM_AT] + hashlib.sha256(zeroed).hexdigest().encode() + zeroed[CHECKSUM_AT + 64 :]


@pytest.mark.parametrize("data", MESSAGES, ids=range(len(MESSAGES)))
def test_the_checksum_is_of_the_whole_message(data: bytes) -> None:
    assert sealed(data) == data


DESCRIPTION = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "I8", "U8", "U16", "U32", "F64", "BOOL", "?"]) | JSON,
        "shape": st.lists(st.integers(-(2**65), 2**65), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-5, 2**65), max_size=3) | JSON,
    },
)


@given(st.dictionaries(st.sampled_from(["values", "gaps", "scales", "bitmap", "x"]), DESCRIPTION | JSON, max_size=4))
def test_any_description_of_tensors_is_refused_and_never_trips(described: dict[str, Any]) -> None:
    data = MESSAGES[0]
    size = int.from_bytes(data[:8], "little")
    meta = json.loads(data[8 : 8 + size])["__metadata__"]
    header = json.dumps({"__metadata__": meta} | described, separators=(",", ":")).encode()
    for payload in (b"", data[8 + size :]):
        changed = sealed(len(header).to_bytes(8, "little") + header + payload)
        with pytest.raises(Refused):
            decode(changed, expected=EXPECTED)


@given(
    st.integers(1, 300),
    st.integers(1, 10**6),
    st.dictionaries(
        st.from_regex(r"\A[a-z][a-z0-9_./]{0,20}\Z"), st.floats(allow_nan=False, allow_infinity=False), max_size=5
    ),
    st.integers(0, 2**31),
    st.sampled_from(CHAINS),
    st.floats(1e-30, 1e30),
)
def test_round_trip(
    size: int, examples: int, metrics: dict[str, float], seed: int, chain: list[dict[str, Any]], scale: float
) -> None:
    spec = Spec.lora({"q": LayerSize(size, 3)}, rank=1, alpha=1)
    delta = np.random.default_rng(seed).standard_normal(spec.size, np.float32) * np.float32(scale)
    job = replace(JOB, seed=seed, steps=None)
    update, _ = Update.of(
        job,
        Trained(delta=delta, examples=examples, steps=3, metrics=metrics),
        Adapter.zeros(spec),
        federation="f",
        chain=Chain.from_config(chain),
    )
    read = decode(encode(update), expected=Expected.of(job, spec, federation="f"))
    assert read == update
    np.testing.assert_array_equal(read.delta, update.delta)
    if not chain:
        np.testing.assert_array_equal(read.delta, delta)
