"""What clients cost that wait for a job: memory and time, in a process of its own.

python -m benchmarks.simulator_parts.idle --clients 10000
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import tracemalloc

from benchmarks.simulator_parts.ours import timed
from fed.pace import Pace
from fed.server import begin, step
from fed.state import State
from fed.words import ClientInfo, Joined


def measure(clients: int, updates: int, seed: int) -> dict[str, float]:
    """Joins so many clients, and then simulates with them, and with as few as are busy.

    Returns:
        `join_s` and `memory_mb` of the server's state and their cards; `updates_per_s` with all, joining not counted,
        and `updates_per_s_few` without idle clients.
    """
    timed(updates=200, clients=16, wire=False, seed=seed)
    began = time.perf_counter()
    _joined(clients, seed)
    join_s = time.perf_counter() - began
    # In another pass, for it slows everything down. The resident set would not show memory that was free before.
    gc.collect()
    tracemalloc.start()
    state = _joined(clients, seed)
    gc.collect()
    memory_mb = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    assert state.present == clients
    del state
    few = timed(updates=updates, clients=16, wire=False, seed=seed)
    # The fleet is built and joined in both; their difference is what the updates themselves took.
    short = timed(updates=4, clients=clients, wire=False, seed=seed)
    many = timed(updates=updates, clients=clients, wire=False, seed=seed)
    per_s = (many.updates - short.updates) / (many.seconds - short.seconds)
    return {"join_s": join_s, "memory_mb": memory_mb, "updates_per_s": per_s, "updates_per_s_few": few.per_s}


def _joined(clients: int, seed: int) -> State:
    state, _ = begin(Pace.fedbuff(16, 4), seed=seed)
    for i in range(clients):
        state, _ = step(state, Joined(at=0.0, client=ClientInfo(name=f"client-{i}")))
    return state


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, default=10_000)
    options.add_argument("--updates", type=int, default=4000)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    print(json.dumps(measure(args.clients, args.updates, args.seed)))
