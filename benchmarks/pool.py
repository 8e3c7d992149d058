"""The cost of one minibatch from a small and from a large round on the disk. `python -m benchmarks.pool`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from repro import rounds
from repro.rounds import Rows

SIZES = (5_000, 500_000)
MINIBATCH, DIMENSION = 256, 2
TURNS, DRAWS = 21, 200


def round_of(entries: int, folder: Path) -> Rows:
    """The columns of NSGF's pool, mapped."""
    x_t, v_t = torch.randn(2, entries, DIMENSION)
    return rounds.read(folder / rounds.write(folder, {"x_t": x_t, "v_t": v_t, "t": torch.rand(entries)}))


def microseconds_per_minibatch(pools: Mapping[int, Rows]) -> dict[int, float]:
    """The median over turns that the pools take, so that a busy moment hits both."""
    generator = torch.Generator().manual_seed(0)
    times: dict[int, list[float]] = {entries: [] for entries in pools}
    for _ in range(TURNS):
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
    with TemporaryDirectory() as folder:
        times = microseconds_per_minibatch({entries: round_of(entries, Path(folder)) for entries in SIZES})
    ratio = times[SIZES[1]] / times[SIZES[0]]
    if options.json:
        print(json.dumps({"microseconds": times, "ratio": ratio}))
        return
    for entries, value in times.items():
        print(f"minibatch of {MINIBATCH} from {entries:>7,} entries: {value:6.1f} µs")
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
