"""How eta, blur and scaling of the 2-D flow were chosen: the particle flow itself, no network, no paper value.

For each target set: 8 independent minibatches of 256 source particles flow to 256 target points each, then 2,048
particles are compared with 2,048 fresh target points. A good setting ends near the floor. `python -m benchmarks.flow_settings`; its output: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch

from nsgf import data, sinkhorn
from nsgf.flow import end_of_flow
from nsgf.metrics import transport_distances
from repro.randomness import generator
from repro.run import describe, versions
from repro.runtime import Runtime, progress

SETS = (
    ("gaussian", "8gaussians"),
    ("8gaussians", "moons"),
    ("gaussian", "moons"),
    ("gaussian", "scurve"),
    ("gaussian", "checkerboard"),
)
FLOWS = ((10, 0.2), (10, 0.3), (10, 0.5), (10, 0.8), (100, 0.02), (100, 0.05), (100, 0.1))
BLURS = (0.05, 0.1, 0.25, 0.5, 1.0)
SCALINGS = (0.95,)
MINIBATCHES, N = 8, 256


def final_w2(
    source: str, target: str, steps: int, step_size: float, blur: float, scaling: float
) -> tuple[float, float]:
    """W2 between the particles after the flow and fresh target points, and the seconds of one velocity."""
    ends, seconds = [], 0.0
    for batch in range(MINIBATCHES):
        stream = generator("flow_settings", batch)
        x_0, y = data.sample(source, N, stream), data.sample(target, N, stream)
        began = time.perf_counter()
        ends.append(
            end_of_flow(
                x_0,
                y,
                lambda x, y: sinkhorn.velocity(x, y, blur=blur, scaling=scaling),
                steps=steps,
                step_size=step_size,
            )
        )
        seconds += time.perf_counter() - began
    test = data.sample(target, MINIBATCHES * N, generator("flow_settings", "test"))
    return transport_distances(torch.cat(ends), test)["w2"], seconds / (MINIBATCHES * steps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow_settings", description=__doc__)
    parser.add_argument("--scalings", nargs="+", type=float, default=SCALINGS)
    parser.add_argument("--blurs", nargs="+", type=float, default=BLURS)
    options = parser.parse_args()
    origin = describe(Path(__file__).parent, Runtime(torch.device("cpu"))) | {"versions": versions()}
    print(json.dumps({key: origin[key] for key in ("commit", "machine", "started", "versions")}), flush=True)
    for source, target in SETS:
        one, other = (data.sample(target, MINIBATCHES * N, generator("flow_settings", "floor", k)) for k in range(2))
        print(
            json.dumps(
                {"source": source, "target": target, "floor_w2": round(transport_distances(one, other)["w2"], 4)}
            ),
            flush=True,
        )
        for (steps, step_size), blur, scaling in progress(
            list(product(FLOWS, options.blurs, options.scalings)), f"{source} to {target}"
        ):
            w2, seconds = final_w2(source, target, steps, step_size, blur, scaling)
            row = {
                "target": target,
                "source": source,
                "steps": steps,
                "step_size": step_size,
                "blur": blur,
                "scaling": scaling,
            }
            print(json.dumps({**row, "w2": round(w2, 4), "ms_per_velocity": round(1e3 * seconds, 2)}), flush=True)


if __name__ == "__main__":
    main()
