"""Times agora's merging of one model's adapters, in a process of its own, so that its memory can be told.

python -m benchmarks.aggregate_parts.speed '{"model": "llama7b", "blocks": 32, "seconds": 2.0, "seed": 0, "runs": 2}'
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import psutil

from benchmarks.aggregate_parts.models import MODELS, contributions, start
from fed.aggregate.flat import RunningSum
from fed.aggregate.lowrank import fresh
from fed.aggregate.rules import make


def main() -> None:
    wanted = json.loads(sys.argv[1])
    spec = replace(MODELS[wanted["model"]], blocks=wanted["blocks"]).spec()
    _warm(wanted["seed"])
    before = psutil.Process().memory_info().rss
    adapter = start(spec, wanted["seed"])
    timed: dict[str, Any] = {"numbers": spec.size, "seconds": []}
    for _ in range(wanted["runs"]):
        rule = make("delta", adapter)
        spent = 0.0
        for c in contributions(adapter, wanted["seed"]):
            began = time.perf_counter()
            rule.absorb(c)
            spent += time.perf_counter() - began
        began = time.perf_counter()
        rule.publish()
        timed["seconds"].append(spent + time.perf_counter() - began)
        del rule, c
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    timed["peak_mb"] = (peak - before) / 1e6
    timed["mean_seconds"] = _mean(
        spec.size, [c.delta for c in contributions(adapter, wanted["seed"])], wanted["seconds"]
    )
    print(json.dumps(timed))


def _warm(seed: int) -> None:
    """Loads and starts all that is used, before memory is looked at."""
    tiny = fresh(replace(MODELS["smollm2"], blocks=1).spec(), seed)
    rule = make("delta", tiny)
    for c in contributions(tiny, seed, 2):
        rule.absorb(c)
    rule.publish()


def _mean(size: int, deltas: list[Any], seconds: float) -> float:
    """Plain weighted averaging, by the sum that the rules `factor_mean` and `mean` keep; the shortest of several."""
    weights = np.arange(1.0, len(deltas) + 1) / sum(range(len(deltas) + 1))
    found: list[float] = []
    until = time.perf_counter() + seconds
    running, total = RunningSum(size), None
    while len(found) < 3 or (time.perf_counter() < until and len(found) < 200):
        began = time.perf_counter()
        for weight, delta in zip(weights, deltas, strict=True):
            running.add(float(weight), delta)
        total = running.take()
        found.append(time.perf_counter() - began)
    assert total is not None
    part = slice(0, 100_000)
    np.testing.assert_allclose(total[part], sum(w * d[part] for w, d in zip(weights, deltas, strict=True)), atol=1e-5)
    return min(found)


if __name__ == "__main__":
    main()
