from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from agora.errors import InvalidRequest
from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.download import Version, decode_version, encode_version
from fed.update import encode as encode_update
from fed.wire import NO_CHECKSUM, Reason, Refused, pack

SPEC = Spec.lora({"q": LayerSize(6, 5), "v": LayerSize(6, 2)}, rank=2, alpha=8, rslora=True, base="smollm2@1")


def made(spec: Spec = SPEC) -> Version:
    flat = np.random.default_rng(0).standard_normal(spec.size, np.float32)
    return Version(federation="run-1", model="cluster-2", number=4, adapter=Adapter(spec, flat))


@dataclass
class Raw:
    text: str

    def model_dump_json(self) -> str:
        return self.text


def forged(
    header: Callable[[dict[str, Any]], Any] = lambda _: None,
    parts: Callable[[dict[str, NDArray[Any]]], Any] = lambda _: None,
) -> bytes:
    data = encode_version(made())
    size = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["agora"]) | {"sha256": NO_CHECKSUM}
    tensors = load(data)
    header(meta)
    parts(tensors)
    return pack(tensors, Raw(json.dumps(meta, separators=(",", ":"))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [SPEC, Spec(method=Method.PREFIX, shapes={"past": (4, 6)}, rank=4), Spec(method=Method.DENSE, shapes={"w": (1,)})],
    ids=["lora", "prefix", "one number"],
)
def test_what_is_received_is_what_was_sent(spec: Spec) -> None:
    """A client needs to know nothing of the adapter beforehand."""
    data = encode_version(made(spec))
    version = decode_version(data, federation="run-1", base=spec.base)
    assert version.adapter.spec == spec
    assert list(version.adapter.spec.shapes) == list(spec.shapes)
    np.testing.assert_array_equal(version.adapter.flat, made(spec).adapter.flat)
    assert (version.federation, version.model, version.number) == ("run-1", "cluster-2", 4)
    assert version.encoded_bytes == len(data)
    assert encode_version(version) == data == encode_version(made(spec))


def test_bytes_are_four_a_number_and_the_names() -> None:
    layers = {f"l{i}.{p}": LayerSize(576, n) for i in range(30) for p, n in (("q", 576), ("v", 192))}
    spec = Spec.lora(layers, rank=8, alpha=16)
    assert 4 * spec.size < len(encode_version(made(spec))) < 4.03 * spec.size


def reason(data: bytes, **known: Any) -> Reason:
    with pytest.raises(Refused) as caught:
        decode_version(data, **known)
    return caught.value.reason


def test_every_truncation_and_flipped_bit_is_refused() -> None:
    data = encode_version(made())
    for end in range(len(data)):
        reason(data[:end])
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        reason(bytes(changed))


def test_of_another_federation_or_base_model_or_too_large() -> None:
    data = encode_version(made())
    assert reason(data, federation="run-2") is Reason.FEDERATION
    assert reason(data, base="smollm2@2") is Reason.BASE
    assert reason(data, max_numbers=SPEC.size - 1) is Reason.OVERSIZED
    assert decode_version(data, max_numbers=SPEC.size).adapter.spec == SPEC


def spec_of(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["spec"].update(changes)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (spec_of(rank=3), Reason.SHAPE),
        (spec_of(rank=0), Reason.SHAPE),
        (spec_of(alpha=-1.0), Reason.SHAPE),
        (spec_of(layers=[["q", 6, 5]]), Reason.SHAPE),
        (spec_of(layers=[]), Reason.SHAPE),
        (spec_of(shapes=[]), Reason.SHAPE),
        (spec_of(shapes=[["q.lora_A", [0, 6]]]), Reason.HEADER),
        (spec_of(shapes=[["q.lora_A", [2.5, 6]]]), Reason.HEADER),
        (spec_of(shapes={"q.lora_A": [2, 6]}), Reason.HEADER),
        (spec_of(method="magic"), Reason.HEADER),
        (spec_of(method="dense", shapes=[["w", [2, 2**39]]]), Reason.OVERSIZED),
        (spec_of(method="dense", shapes=[["w", [19]], ["w", [19]]]), Reason.SHAPE),
        (spec_of(method="dense", shapes=[["w", [1]]]), Reason.TENSORS),
        (lambda h: h.update(kind="update"), Reason.FORMAT),
        (lambda h: h.update(format=2), Reason.FORMAT),
        (lambda h: h.pop("spec"), Reason.HEADER),
    ],
)
def test_a_header_that_lies_is_refused(header: Callable[[dict[str, Any]], Any], why: Reason) -> None:
    assert reason(forged(header)) is why


def test_tensors_that_lie_are_refused() -> None:
    size = SPEC.size
    assert decode_version(forged()).adapter.spec == SPEC
    assert reason(forged(parts=lambda p: p.update(x=np.zeros(1, np.float32)))) is Reason.TENSORS
    assert reason(forged(parts=lambda p: p.update(values=np.zeros(size, np.uint32)))) is Reason.TENSORS
    assert reason(forged(parts=lambda p: p.update(values=np.full(size, np.inf, np.float32)))) is Reason.NOT_FINITE


def test_an_update_is_no_version() -> None:
    from fed.update import Update
    from fed.words import Job, Trained

    job = Job(id=1, client="c", model="all", version=0, seed=0)
    trained = Trained(delta=np.zeros(SPEC.size, np.float32), examples=1, steps=1)
    update, _ = Update.of(job, trained, made().adapter, federation="run-1")
    assert reason(encode_update(update)) is Reason.FORMAT


def test_the_server_is_told_if_its_version_cannot_be_sent() -> None:
    with pytest.raises(InvalidRequest, match="model"):
        encode_version(replace(made(), model=""))
    bad = made().adapter.flat.copy()
    bad[0] = np.nan
    with pytest.raises(Refused, match="NaN"):
        encode_version(replace(made(), adapter=Adapter(SPEC, bad)))
