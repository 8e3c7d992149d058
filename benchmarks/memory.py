"""The memory estimate of `repro memory` against real steps, and the memory of GeomLoss, as tables of refs/memory.md.

    python -m benchmarks.memory                   on the CPU: ten minutes on an idle core, up to 12 GiB of memory
    python -m benchmarks.memory --experiments digits    these anew, the others as committed
    python -m benchmarks.memory --device cuda     on a GPU: a minute; the table of the page that is empty until then
    python -m benchmarks.memory --page            writes the tables anew from the committed results, without measuring

Three numbers for every phase at the batch size of its configuration, after two steps:

estimate   on fake tensors, by the tracker of `repro_tools.memory.storages`
tracked    the same step on real tensors, by the same tracker
allocated  the same real step by the records of PyTorch's own allocator, which see what an operation takes within itself

The real steps of the Sinkhorn flow take the formula without branches on values, as a GPU does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from geomloss import SamplesLoss
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.plain_models import PLAIN
from benchmarks.sinkhorn import IMAGES, POINTS, clouds, machine, quiet_stderr
from nsgf import geomloss_velocity, sinkhorn
from repro.config import load
from repro.method import Project, find_project
from repro.runtime import Runtime
from repro_tools.memory.fake import CPU, Rehearsal, networks, recurrent_layers_apart
from repro_tools.memory.footprint import STEPS, Footprint, allowances, needed, of_evaluation, of_phase, of_step
from repro_tools.memory.storages import LiveStorages

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "refs" / "memory.md", Path(__file__).parent / "results"
EXPERIMENTS = ("2d-moons", "digits", "mnist", "cifar10")
TOO_LONG = ("cifar10",)
"""Whose evaluation at 500 images at a time takes many minutes on a CPU, and is left out."""
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--page", action="store_true", help="only write the tables into the page")
    options = parser.parse_args(arguments)
    if not options.page:
        project = find_project(ROOT)
        measure = on_cuda if options.device == "cuda" else on_cpu
        path = RESULTS / f"memory-{options.device}.json"
        before = json.loads(path.read_text())["phases"] if path.exists() else []
        found = {"where": where(options.device), **measure(project, options.experiments)}
        kept = [one for one in before if one["experiment"] not in options.experiments]
        found["phases"] = sorted(kept + found["phases"], key=lambda one: EXPERIMENTS.index(one["experiment"]))
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(path)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


def on_cpu(project: Project, experiments: Sequence[str]) -> dict:
    """The results of the CPU: phases, plain models, Sinkhorn."""
    return {
        "sinkhorn": [one for shape in SHAPES for one in sinkhorn_peaks(*shape)],
        "plain": [plain(name) for name in PLAIN],
        "phases": [one for name in experiments for one in phases_on_cpu(project, name)],
    }


def phases_on_cpu(project: Project, experiment: str) -> list[dict]:
    rows = []
    for index, name in enumerate(phase.name for phase in fresh(project, experiment)):

        def footprint(**options) -> Footprint:
            return of_phase(fresh(project, experiment)[index], fresh(project, experiment)[:index], **options)

        estimate, seconds = timed(lambda: footprint(steps=2))
        allocated, real = allocator_peak(lambda: footprint(steps=2, fake=False, work=False))
        rows.append(row(experiment, name, estimate, 0, real.parts[0].peak.total, allocated, seconds))
        show(rows[-1])
        if len(estimate.parts) > 1:
            real = _as_on_a_gpu(lambda: footprint(steps=1, fake=False))
            for number in range(1, len(estimate.parts)):
                rows.append(
                    row(experiment, name, footprint(steps=1), number, real.parts[number].peak.total, None, None)
                )
                show(rows[-1])
    if experiment in TOO_LONG:
        return rows
    phases = fresh(project, experiment)
    config = load_config(project, experiment)
    estimate, seconds = timed(lambda: of_evaluation(project.method, config, phases, Runtime(CPU)))
    real = _as_on_a_gpu(lambda: of_evaluation(project.method, config, phases, Runtime(CPU), fake=False))
    for number, part in enumerate(real.parts):
        rows.append(
            row(experiment, "evaluation", estimate, number, part.peak.total, None, seconds if number == 0 else None)
        )
        show(rows[-1])
    return rows


def row(
    experiment: str,
    phase: str,
    estimate: Footprint,
    number: int,
    tracked: int,
    allocated: int | None,
    seconds: float | None,
) -> dict:
    part = estimate.parts[number]
    return {
        "experiment": experiment,
        "phase": phase,
        "part": part.name,
        "rows": estimate.rows,
        "estimate": part.peak.total,
        "tracked": tracked,
        "allocated": allocated,
        "needed": needed(estimate, part),
        "seconds": None if seconds is None else round(seconds, 2),
    }


def plain(name: str) -> dict:
    build, step = PLAIN[name]
    with recurrent_layers_apart() if "LSTM" in name else nullcontext():
        estimate = of_step(build, step, on_a_gpu=False).peak.total
        allocated, real = allocator_peak(lambda: of_step(build, step, fake=False, on_a_gpu=False))
    return {"model": name, "estimate": estimate, "tracked": real.peak.total, "allocated": allocated}


SHAPES = ((256, 2, POINTS), (256, 784, IMAGES), (128, 3072, IMAGES))


def sinkhorn_peaks(n: int, d: int, setting: dict[str, float]) -> list[dict]:
    """Peaks above the points, by the allocator's records, of the calls whose figures were mixed up; the largest single tensor."""
    x, y = clouds(n, d)
    loss = SamplesLoss("sinkhorn", p=2, **setting, debias=False, potentials=True, backend="tensorized")
    debiased = SamplesLoss("sinkhorn", p=2, **setting, backend="tensorized")
    calls: dict[str, Callable[[], object]] = {
        "one call, potentials only": lambda: loss(x, y),
        "one call and its gradient": lambda: geomloss_velocity._gradient(loss, x.detach().requires_grad_(), y),
        "velocity: two calls, both gradients": lambda: geomloss_velocity.velocity(
            x, y, **setting, backend="tensorized"
        ),
        "debiased divergence and its gradient": lambda: gradient(debiased, x, y),
        "two debiased divergences, backward into x and y, points counted": lambda: backward_twice(debiased, x, y),
        "closed form, velocity": lambda: sinkhorn.velocity(x, y, **setting),
    }
    rows = []
    for name, call in calls.items():
        call()
        peak, _ = allocator_peak(call)
        with LiveStorages() as live:
            call()
        rows.append(
            {"n": n, "d": d, "call": name, "peak": peak, "largest_tensor": live.largest, "points": x.nbytes + y.nbytes}
        )
        show(rows[-1])
    return rows


def gradient(loss: SamplesLoss, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x, y), x)[0]


def backward_twice(loss: SamplesLoss, x: Tensor, y: Tensor) -> Tensor:
    """As a dossier of this project measured it."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss(x, y).backward()
    loss(x, x.detach().clone()).backward()
    return x.grad


def on_cuda(project: Project, experiments: Sequence[str]) -> dict:
    """The results of a GPU: what PyTorch's allocator counted, beside the estimate."""
    device, rows = torch.device("cuda"), []
    for experiment in experiments:
        for index, phase in enumerate(fresh(project, experiment)):
            before = fresh(project, experiment)[:index]
            estimate = of_phase(fresh(project, experiment)[index], before, work=False)
            allocated, reserved = cuda_peak(phase, before, device)
            part = estimate.parts[0]
            rows.append(
                {
                    "experiment": experiment,
                    "phase": phase.name,
                    "rows": estimate.rows,
                    "estimate": part.peak.in_blocks,
                    "allocated": allocated,
                    "reserved": reserved,
                    "needed": needed(estimate, part),
                    "context": next(one.size for one in allowances(estimate, part) if one.name == "CUDA context"),
                }
            )
            show(rows[-1])
    return {"phases": rows}


def cuda_peak(phase, before: Sequence, device: torch.device) -> tuple[int, int]:
    """max_memory_allocated and max_memory_reserved of real steps of `phase`."""
    from repro.runtime import arithmetic

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    earlier = {name: network.to(device) for name, network in networks(before).items()}
    with arithmetic(phase.precision):
        rehearsal = Rehearsal(phase, earlier, device=device)
        rehearsal.draw()
        for number in range(STEPS):
            rehearsal(number)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def allocator_peak(call: Callable[[], object]) -> tuple[int, object]:
    """The largest sum of what PyTorch's CPU allocator had handed out since `call` began, and the result."""
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


def _as_on_a_gpu(call: Callable[[], Footprint]) -> Footprint:
    with patch.object(sinkhorn, "_is_eager_cpu", lambda x: False):
        return call()


def load_config(project: Project, experiment: str):
    return load(project.config_class(experiment), project.experiments()[experiment])[0]


def fresh(project: Project, experiment: str) -> list:
    return list(project.method.phases(load_config(project, experiment), Runtime(CPU)))


def timed(call: Callable[[], Footprint]) -> tuple[Footprint, float]:
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def where(device: str) -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    named = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {**machine(), **named, "commit": commit.stdout.strip(), "date": str(datetime.date.today())}


def show(entry: dict) -> None:
    print(json.dumps(entry), file=sys.stderr, flush=True)


def with_tables(page: str) -> str:
    """The page with its generated tables as the committed results have them."""
    found = json.loads((RESULTS / "memory-cpu.json").read_text())
    gpu = RESULTS / "memory-cuda.json"
    tables = {
        "memory-phases": phase_table(found),
        "memory-plain": plain_table(found),
        "memory-sinkhorn": sinkhorn_table(found),
        "memory-gpu": gpu_table(json.loads(gpu.read_text())) if gpu.exists() else NO_GPU,
    }
    for name, table in tables.items():
        if f"<!-- measured:{name} -->" not in page:
            raise SystemExit(f"{PAGE}: found no place for the table {name}")
        start, end = f"<!-- measured:{name} -->\n", f"<!-- /measured:{name} -->\n"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = before + start + table + end + after
    return page


NO_GPU = "No GPU has been at hand yet, so this table is empty. `python -m benchmarks.memory --device cuda` fills it.\n"


def phase_table(found: dict) -> str:
    lines = [
        "| experiment | phase | rows | estimate | real step, tracked | real step, allocated | CPU time of the estimate |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["phases"]:
        if one["part"] != "step":
            continue
        seconds = f"{one['seconds']:.1f} s"
        lines.append(
            f"| {one['experiment']} | {one['phase']} | {one['rows']} | {mib(one['estimate'])} | {mib(one['tracked'])} | {mib(one['allocated'])} | {seconds} |"
        )
    return "\n".join([*lines, "", *source(found)]) + "\n"


def plain_table(found: dict) -> str:
    lines = ["| model | estimate | real step, tracked | real step, allocated |", "|---|---|---|---|"]
    lines += [
        f"| {one['model']} | {mib(one['estimate'])} | {mib(one['tracked'])} | {mib(one['allocated'])} |"
        for one in found["plain"]
    ]
    return "\n".join(lines) + "\n"


def sinkhorn_table(found: dict) -> str:
    shapes = sorted({(one["n"], one["d"]) for one in found["sinkhorn"]}, key=lambda shape: shape[1])
    calls = list(dict.fromkeys(one["call"] for one in found["sinkhorn"]))
    value = {(one["call"], one["n"], one["d"]): one for one in found["sinkhorn"]}
    lines = [
        "| MiB above the points | " + " | ".join(f"{n} x {d}" for n, d in shapes) + " |",
        "|---" * (1 + len(shapes)) + "|",
    ]
    for call in calls:
        lines.append(f"| {call} | " + " | ".join(f"{value[call, *shape]['peak'] / MIB:.2f}" for shape in shapes) + " |")
    velocity = "velocity: two calls, both gradients"
    for name, size in (
        ("the points x and y", lambda one: one["points"]),
        ("largest single tensor of the GeomLoss velocity", lambda one: one["largest_tensor"]),
        ("N x N x D, which is never made", lambda one: 4 * one["n"] ** 2 * one["d"]),
    ):
        lines.append(
            f"| {name} | " + " | ".join(f"{size(value[velocity, *shape]) / MIB:.2f}" for shape in shapes) + " |"
        )
    return "\n".join([*lines, "", *source(found)]) + "\n"


def gpu_table(found: dict) -> str:
    lines = [
        "| experiment | phase | rows | estimate | max_memory_allocated | max_memory_reserved | needed |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['experiment']} | {one['phase']} | {one['rows']} | "
        + " | ".join(mib(one[key]) for key in ("estimate", "allocated", "reserved", "needed"))
        + " |"
        for one in found["phases"]
    ]
    return "\n".join([*lines, "", *source(found)]) + "\n"


def source(found: dict) -> list[str]:
    at = found["where"]
    return [
        f"Measured on {at.get('gpu', at['cpu'])}, torch {at['torch']}, {at['date']}, by `python -m benchmarks.memory`."
    ]


def mib(size: int) -> str:
    return f"{size / MIB:,.2f} MiB"


if __name__ == "__main__":
    main()
