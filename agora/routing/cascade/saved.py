"""Fitted policies in a folder: JSON and safetensors, with checksums, written so that no reader sees a half of it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from agora.errors import ModelError
from agora.routing.cascade.beliefs import Belief, subsets
from agora.routing.cascade.fitted import Fitted, Mind, Vertex
from agora.routing.cascade.priors import PRIORS
from agora.routing.cascade.reading import Reader
from agora.routing.cascade.rules import rule_from

FILE: Final = "policy.json"
"""What tells everything else; replaced at once when a policy is saved."""

FORMAT: Final = "agora.cascade"
"""Marks the file as one of these."""

VERSION: Final = 3
"""Of the format. Raised when what older readers would make of it is wrong."""

MAX_JSON: Final = 4 * 2**20
"""Most bytes of `FILE`; one of eight models has some 20 kB."""

MAX_TENSORS: Final = 2**30
"""Most bytes of the arrays; eight models have some 200 MB."""

_AGAIN: Final = "fit it again: agora calibrate --data FILE"


def save(fitted: Fitted, folder: str | os.PathLike[str]) -> Path:
    """Writes a policy, in the place of one that is there.

    Args:
        fitted: The policy.
        folder: Made if it is not there.

    Returns:
        The folder.

    Raises:
        ModelError: If it cannot be written.
    """
    where = Path(folder)
    data = save_tensors(_arrays(fitted.mind))
    digest = hashlib.sha256(data).hexdigest()
    # The arrays go under a name of their own, so that until the JSON is replaced the old policy is whole.
    tensors = f"policy-{digest[:16]}.safetensors"
    body = {
        "models": list(fitted.models),
        "signals": list(fitted.mind.signals),
        "priors": list(fitted.mind.priors),
        "deadline": fitted.mind.deadline,
        "trade_off": fitted.trade_off,
        "vertices": [_vertex(v) for v in fitted.vertices],
        "top": _vertex(fitted.top),
        "report": dict(fitted.report),
        "tensors": {"file": tensors, "bytes": len(data), "sha256": digest},
    }
    told = {"format": FORMAT, "version": VERSION, "sha256": _digest(body), "body": body}
    try:
        where.mkdir(parents=True, exist_ok=True)
        _write(where / tensors, data)
        _write(where / FILE, json.dumps(told, indent=1, allow_nan=False).encode())
        for old in where.glob("policy-*.safetensors"):
            if old.name != tensors:
                old.unlink(missing_ok=True)
    except OSError as e:
        raise ModelError(f"the policy cannot be written to {str(where)!r}: {e}") from None
    return where


def load(folder: str | os.PathLike[str]) -> Fitted:
    """Reads a policy; it decides as it did when it was saved.

    Raises:
        ModelError: If there is none, or it is damaged, of another format, or too large.
    """
    where = Path(folder)
    body = _body(where / FILE)
    try:
        named, size, digest = (body["tensors"][key] for key in ("file", "bytes", "sha256"))
        if Path(named).name != named:
            raise ValueError(f"it names arrays outside the folder: {named!r}")
        data = _read(where / named, MAX_TENSORS)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise ModelError(f"{named} in {str(where)!r} is damaged: its checksum is another", hint=_AGAIN)
        return _fitted(body, load_tensors(data))
    except (KeyError, TypeError, ValueError, SafetensorError) as e:
        raise ModelError(f"the policy in {str(where)!r} is damaged: {e!r}", hint=_AGAIN) from None


def _arrays(mind: Mind) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"mean_cost": mind.mean_cost, "worths": mind.worths}
    for kind, prior in mind.priors.items():
        arrays |= {f"prior.{kind}.{name}": np.asarray(array) for name, array in prior.arrays().items()}
    arrays |= {f"reader.{name}": array for name, array in mind.reader.arrays().items()}
    for subset, belief in mind.beliefs.items():
        arrays |= {f"belief.{subset}.{name}": array for name, array in belief.arrays().items()}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _fitted(body: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Fitted:
    models = tuple(str(name) for name in body["models"])
    mind = Mind(
        models=models,
        signals=tuple(body["signals"]),
        priors={kind: PRIORS[kind].from_arrays(_under(arrays, f"prior.{kind}.")) for kind in body["priors"]},
        reader=Reader.from_arrays(_under(arrays, "reader.")),
        beliefs={s: Belief.from_arrays(s, _under(arrays, f"belief.{s}.")) for s in subsets(len(models))},
        mean_cost=arrays["mean_cost"],
        worths=arrays["worths"],
        deadline=body["deadline"],
    )
    return Fitted(
        mind=mind,
        vertices=tuple(_vertex_from(v) for v in body["vertices"]),
        top=_vertex_from(body["top"]),
        trade_off=body["trade_off"],
        report=body["report"],
    )


def _under(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _vertex(vertex: Vertex) -> dict[str, Any]:
    return {
        "kind": vertex.rule.kind,
        "rule": asdict(vertex.rule),  # type: ignore[call-overload]
        "cost": vertex.cost,
        "quality": vertex.quality,
        "p95_seconds": vertex.p95_seconds,
    }


def _vertex_from(told: Mapping[str, Any]) -> Vertex:
    return Vertex(
        rule=rule_from(told["kind"], told["rule"]),
        cost=told["cost"],
        quality=told["quality"],
        p95_seconds=told["p95_seconds"],
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _body(path: Path) -> dict[str, Any]:
    raw = _read(path, MAX_JSON)
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"{str(path)!r} is no JSON; a saved policy is", hint=_AGAIN) from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ModelError(f"{str(path)!r} is not a saved policy: its format is not {FORMAT!r}", hint=_AGAIN)
    if told.get("version") != VERSION:
        raise ModelError(
            f"{str(path)!r} has version {told.get('version')!r} of the format; this agora reads {VERSION}", hint=_AGAIN
        )
    body = told.get("body")
    try:
        if not isinstance(body, dict) or _digest(body) != told.get("sha256"):
            raise ModelError(f"{str(path)!r} is damaged: its checksum is another", hint=_AGAIN)
    except ValueError:
        raise ModelError(f"{str(path)!r} is damaged: it holds a number that is none", hint=_AGAIN) from None
    return body


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except FileNotFoundError:
        raise ModelError(f"there is no saved policy in {str(path.parent)!r}: no {path.name}", hint=_AGAIN) from None
    except OSError as e:
        raise ModelError(f"{str(path)!r} cannot be read: {e}") from None
    if len(raw) > most:
        raise ModelError(f"{str(path)!r} has more than {most} bytes, the most that a saved policy may have")
    return raw


def _write(path: Path, data: bytes) -> None:
    """Writes a file under another name and puts it in its place when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
