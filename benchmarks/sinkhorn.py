"""Time and memory of the Sinkhorn velocity in float32 on the CPU: closed form against GeomLoss with autograd.

    python -m benchmarks.sinkhorn [--json] [--threads N]

Times are of single calls, the two implementations in turn so that a busy machine slows both; the minimum is
nearest to the machine undisturbed. Threads that share a core with other programs wait for each other (seconds
instead of milliseconds were seen): on a busy machine use --threads 1. Each size stops repeating after its
share of time. Peak memory is the largest sum of live tensor storage above what existed before the call, from
the allocator's own records (torch.profiler with profile_memory): unlike a tracker of tensors in Python it
sees the temporaries inside an operator such as logsumexp, and unlike the resident-set size it sees single
megabytes. Inputs and memory of the matrix library are not in it. Differences are relative to the largest
velocity: float32 against GeomLoss in float32, the worst of the paper's settings, and each against GeomLoss in
float64 at the same points.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsgf import geomloss_velocity, sinkhorn

POINTS = {"blur": 0.25, "scaling": 0.95}  # of the 2-D configurations
IMAGES = {"blur": 1.0, "scaling": 0.85}  # of the paper's image settings, the middle ones
SHAPES = ((256, 2, POINTS), (256, 784, IMAGES), (128, 3072, IMAGES))
SIZES = (256, 512, 1024, 2048, 4096)
BLURS, SCALINGS = (0.05, 0.5, 1.0, 2.0), (0.5, 0.8, 0.85, 0.95)
COMPARED = [{"blur": blur, "scaling": scaling} for blur in BLURS for scaling in SCALINGS]
BUDGET, REPEATS = 6.0, 50  # seconds and calls per size: under two minutes in all
Velocity = Callable[..., Tensor]


def geomloss(x: Tensor, y: Tensor, *, blur: float, scaling: float) -> Tensor:
    return geomloss_velocity.velocity(x, y, blur=blur, scaling=scaling, backend="tensorized")


IMPLEMENTATIONS: dict[str, Velocity] = {"closed_form": sinkhorn.velocity, "geomloss": geomloss}


def clouds(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Noise (n, d) and targets (n, d): points on a circle for d = 2, smooth images in [-1, 1] otherwise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    if d == 2:
        angles = torch.randint(8, (n, 1), generator=generator) * torch.pi / 4
        centres = 5 * torch.cat([angles.cos(), angles.sin()], 1)
        return x, centres + 0.5 * torch.randn(n, 2, generator=generator)
    channels, side = (3, 32) if d == 3072 else (1, 28)
    coarse = torch.randn(n, channels, 7, 7, generator=generator)
    return x, torch.nn.functional.interpolate(coarse, side, mode="bilinear").clamp(-1, 1).flatten(1)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times(x: Tensor, y: Tensor, setting: dict[str, float]) -> dict[str, dict[str, float]]:
    """Median and minimum in seconds of both implementations, called in turn after one call to warm up."""
    taken = {name: [] for name in IMPLEMENTATIONS}
    for velocity in IMPLEMENTATIONS.values():
        velocity(x, y, **setting)
    end = time.perf_counter() + BUDGET
    while not taken["geomloss"] or (time.perf_counter() < end and len(taken["geomloss"]) < REPEATS):
        for name, velocity in IMPLEMENTATIONS.items():
            taken[name].append(seconds(lambda: velocity(x, y, **setting)))
    return {k: {"median": statistics.median(t), "min": min(t), "calls": len(t)} for k, t in taken.items()}


@contextmanager
def quiet_stderr():
    """The profiler's library announces its start and stop there, past Python."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_bytes(velocity: Velocity, x: Tensor, y: Tensor, setting: dict[str, float]) -> int:
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        velocity(x, y, **setting)
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def differences(x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """Worst relative differences over all values of scaling, at blur .05 and at the paper's image blurs."""
    worst = {"blur .05": {}, "blur .5 to 2": {}}
    for setting in COMPARED:
        found, library = sinkhorn.velocity(x, y, **setting), geomloss(x, y, **setting)
        exact = geomloss(x.double(), y.double(), **setting)
        found_64 = sinkhorn.velocity(x.double(), y.double(), **setting)
        measured = {
            "float64, closed form to GeomLoss": relative(found_64, exact),
            "float32, closed form to GeomLoss": relative(found, library),
            "closed form in float32 to float64": relative(found, exact),
            "GeomLoss in float32 to float64": relative(library, exact),
        }
        group = worst["blur .05" if setting["blur"] == 0.05 else "blur .5 to 2"]
        for name, value in measured.items():
            group[name] = max(group.get(name, 0.0), value)
    return worst


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "cpu": (models or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measure(n: int, d: int, setting: dict[str, float]) -> dict[str, object]:
    x, y = clouds(n, d)
    return {
        "n": n,
        "d": d,
        **setting,
        "seconds": times(x, y, setting),
        "peak_bytes": {name: peak_bytes(velocity, x, y, setting) for name, velocity in IMPLEMENTATIONS.items()},
    }


def row(entry: dict) -> str:
    ours, theirs = entry["seconds"]["closed_form"], entry["seconds"]["geomloss"]
    memory = entry["peak_bytes"]
    return (
        f"{entry['n']:>5} {entry['d']:>5}  {ours['median'] * 1e3:9.2f} {ours['min'] * 1e3:9.2f}"
        f"  {theirs['median'] * 1e3:9.2f} {theirs['min'] * 1e3:9.2f}"
        f"  {theirs['median'] / ours['median']:6.1f} {theirs['min'] / ours['min']:6.1f}"
        f"  {memory['closed_form'] / 2**20:8.2f} {memory['geomloss'] / 2**20:8.2f}"
        f"  {ours['min'] / entry['n'] ** 2 * 1e9:9.1f} {theirs['min'] / entry['n'] ** 2 * 1e9:9.1f}"
    )


HEADER = (
    "    N     d   closed form (ms)         GeomLoss (ms)          ratio        peak (MiB)"
    "        min ns / N^2\n"
    "                median       min     median       min  median    min     ours GeomLoss"
    "       ours  GeomLoss"
)


def main(arguments: list[str] | None = None) -> None:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sinkhorn", description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="threads of torch (%(default)s)")
    options = parser.parse_args(arguments)
    as_json = options.json
    torch.set_num_threads(options.threads)

    def show(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    report = {"machine": machine(), "shapes": [], "growth": []}
    show(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    show(f"float32; blur and scaling: {POINTS} for the first row, {IMAGES} for the others\n\n{HEADER}")
    for key, cases in (("shapes", SHAPES), ("growth", [(n, 2, IMAGES) for n in SIZES])):
        for case in cases:
            report[key].append(measure(*case))
            show(row(report[key][-1]))
        show("")
    torch.set_num_threads(1)  # the numbers are the same, and nothing waits
    for entry in report["shapes"]:
        entry["differences"] = differences(*clouds(entry["n"], entry["d"]))
        show(f"largest relative differences at N = {entry['n']}, d = {entry['d']}")
        for group, values in entry["differences"].items():
            show("\n".join(f"  {group:<13} {name:<34} {value:.1e}" for name, value in values.items()))
    if as_json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
