"""The cost of one minibatch from a small and from a large pool. `python -m benchmarks.pool`."""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch

from repro.pool import Pool

SIZES = (5_000, 500_000)
MINIBATCH, DIMENSION = 256, 2
ROUNDS, DRAWS = 21, 200


def full_pool(entries: int) -> Pool:
    pool = Pool(entries, {"x_t": (DIMENSION,), "v_t": (DIMENSION,), "t": ()})
    pool.add(x_t=torch.randn(entries, DIMENSION), v_t=torch.randn(entries, DIMENSION), t=torch.rand(entries))
    return pool


def microseconds_per_minibatch(pools: dict[int, Pool]) -> dict[int, float]:
    """The median over rounds that take turns between the pools, so that a busy moment hits both."""
    generator = torch.Generator().manual_seed(0)
    times: dict[int, list[float]] = {entries: [] for entries in pools}
    for _ in range(ROUNDS):
        for entries, pool in pools.items():
            began = time.perf_counter()
            for _ in range(DRAWS):
                pool.sample(MINIBATCH, generator)
            times[entries].append((time.perf_counter() - began) / DRAWS * 1e6)
    return {entries: median(values) for entries, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    times = microseconds_per_minibatch({entries: full_pool(entries) for entries in SIZES})
    ratio = times[SIZES[1]] / times[SIZES[0]]
    if options.json:
        print(json.dumps({"microseconds": times, "ratio": ratio}))
        return
    for entries, value in times.items():
        print(f"minibatch of {MINIBATCH} from {entries:>7,} entries: {value:6.1f} µs")
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
