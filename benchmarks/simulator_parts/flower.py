"""Flower's simulation engine with a client that does nothing: run by the interpreter of the peers' environment.

    .venv-flower/bin/python benchmarks/simulator_parts/flower.py --clients 16 --rounds 20

The server sends ten numbers to every client, waits for all answers, and takes their mean, with Flower's message API and
no strategy on top, which would cost more. It prints one JSON object. It imports nothing of agora.
"""

# Flower is not in agora's own environment.
# mypy: disable-error-code="import-not-found, untyped-decorator"

import argparse
import json
import time

import flwr
import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

SIZE = 10
PATIENCE_S = 120.0
"""Seconds that a round may take."""

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """A trainer that costs next to nothing."""
    (start,) = message.content["arrays"].to_numpy_ndarrays()
    content = RecordDict(
        {
            "arrays": ArrayRecord([np.float32(-0.1) * start]),
            "metrics": MetricRecord({"num-examples": 3, "loss": 1.0}),
        }
    )
    return Message(content=content, reply_to=message)


def rounds(grid: Grid, clients: int, number: int) -> list[float]:
    """Seconds of each round; the first one, which starts the workers, included."""
    while len(nodes := sorted(grid.get_node_ids())) < clients:
        time.sleep(0.01)
    adapter, seconds = np.ones(SIZE, np.float32), []
    for n in range(number):
        began = time.perf_counter()
        messages = [
            Message(content=RecordDict({"arrays": ArrayRecord([adapter])}), message_type="train", dst_node_id=node)
            for node in nodes
        ]
        replies = [r for r in grid.send_and_receive(messages, timeout=PATIENCE_S) if not r.has_error()]
        if len(replies) != clients:
            raise SystemExit(f"round {n}: {len(replies)} of {clients} clients answered")
        weights = [r.content["metrics"]["num-examples"] for r in replies]
        deltas = [r.content["arrays"].to_numpy_ndarrays()[0] for r in replies]
        adapter = adapter + np.average(deltas, axis=0, weights=weights).astype(np.float32)
        seconds.append(time.perf_counter() - began)
    if not np.allclose(adapter, 0.9**number):
        raise SystemExit(f"after {number} rounds the numbers are {adapter}; expected {0.9**number}")
    return seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--rounds", type=int, default=20)
    args = options.parse_args()
    server, found = ServerApp(), []

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        found.extend(rounds(grid, args.clients, args.rounds))

    began = time.perf_counter()
    run_simulation(server_app=server, client_app=client, num_supernodes=args.clients)
    whole = time.perf_counter() - began
    print(json.dumps({"version": flwr.__version__, "clients": args.clients, "seconds": found, "whole_s": whole}))


if __name__ == "__main__":
    main()
