"""What a saved state costs: time to save and to load it, and the checksum's share. `python -m benchmarks.checkpoints`.

The state is that of CIFAR-10's velocity field between two steps: weights and both moments of Adam. Writes
benchmarks/results/checkpoints.json, with machine and commit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from repro import checkpoint
from repro.config import load
from repro.method import find_project
from repro.run import git_commit
from repro.runtime import Runtime, machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "checkpoints.json"
EXPERIMENT = "cifar10"
ROUNDS = 7


def state_of(experiment: str) -> dict:
    """The state of the first phase after a step, with random values."""
    project = find_project(ROOT)
    config, _ = load(project.config_class(experiment), project.experiments()[experiment])
    phase = project.method.phases(config, Runtime(torch.device("cpu")))[0]
    state = phase.setup({})
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimiser.step()
    return {"state": checkpoint.saved(state), "steps_done": 1}


def seconds(function) -> float:
    """The least of some rounds: what else the machine does only adds."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(state: dict, folder: Path) -> dict[str, float]:
    path = folder / "running.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(checkpoint._pack(state, "state", tensors))
    return {
        "gigabytes": sum(tensor.nbytes for tensor in tensors.values()) / 1e9,
        "checksum_s": seconds(lambda: checkpoint._checksum(tree, tensors)),
        "save_s": seconds(lambda: checkpoint.save(path, state)),
        "load_s": seconds(lambda: checkpoint.load(path)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(state_of(EXPERIMENT), Path(folder))
    found = {
        "experiment": EXPERIMENT,
        **{name: round(value, 3) for name, value in figures.items()},
        "machine": machine(torch.device("cpu")),
        "commit": git_commit(ROOT),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
