"""Times Flower's FedAvg on the same factors. Runs in Flower's own environment, so it imports nothing of agora.

    python flower.py '{"shapes": [[8, 576], …], "clients": 16, "seconds": 2.0, "seed": 0}'

Prints JSON: `version`, and seconds of one aggregation by way: `aggregate_train` is what its strategy does with the
messages of a round, `aggregate_fit` what it did in its older interface (both read arrays out of the bytes that
arrived), and `arrays` the older one's arithmetic alone, on numpy arrays.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Clients = list[list[Any]]

Way = tuple[Callable[[], Any], Callable[[Any], Sequence[Any]]]
"""What is timed, and how its result is read as arrays."""


def aggregate_train(clients: Clients, weights: list[int]) -> Way:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.common import Message
    from flwr.serverapp.strategy import FedAvg

    # What Flower's runtime does before it starts a server: messages bear this identity.
    with contextlib.suppress(ImportError):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    strategy = FedAvg()
    replies = []
    for arrays, weight in zip(clients, weights, strict=True):
        record = ArrayRecord({f"t{n}": Array(a) for n, a in enumerate(arrays)})
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": weight})})
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    return (
        lambda: strategy.aggregate_train(1, replies)[0],
        lambda record: [array.numpy() for array in record.values()],
    )


def aggregate_fit(clients: Clients, weights: list[int]) -> Way:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server.strategy import FedAvg

    strategy = FedAvg()
    results = [
        (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), weight, {}))
        for arrays, weight in zip(clients, weights, strict=True)
    ]
    return lambda: strategy.aggregate_fit(2, results, [])[0], parameters_to_ndarrays


def arrays(clients: Clients, weights: list[int]) -> Way:
    from flwr.server.strategy.aggregate import aggregate

    results = list(zip(clients, weights, strict=True))
    return lambda: aggregate(results), lambda found: found


def best(run: Callable[[], Any], seconds: float) -> float:
    """The shortest time of a run: of three at least, and of as many as fit."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < until and len(found) < 200):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    wanted = json.loads(sys.argv[1])
    rng = np.random.default_rng(wanted["seed"])
    clients = [
        [rng.standard_normal(shape, dtype=np.float32) for shape in wanted["shapes"]] for _ in range(wanted["clients"])
    ]
    weights = [n + 1 for n in range(len(clients))]
    timed: dict[str, float] = {}
    for way in (aggregate_train, aggregate_fit, arrays):
        run, read = way(clients, weights)
        # A line a round on stderr is for people; here it would be timed.
        logging.getLogger("flwr").setLevel(logging.ERROR)
        for n, found in enumerate(read(run())):
            right = sum(w * c[n] for w, c in zip(weights, clients, strict=True)) / sum(weights)
            np.testing.assert_allclose(found, right, atol=1e-4)
        timed[way.__name__] = best(run, wanted["seconds"])
    print(json.dumps({"version": importlib.metadata.version("flwr"), "seconds": timed}))


if __name__ == "__main__":
    main()
