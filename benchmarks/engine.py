"""What the engine costs beside a plain script, in processor time. `python -m benchmarks.engine`; a minute on quiet cores.

First step: from the start of the process until the first optimiser step is done, of `python -m repro run` and of a script with the
same network, minibatch and optimiser, turn about. Each step: a network of three hidden layers of 256 at a minibatch of 256, in a
`Loop` and in a plain loop, in adjacent blocks on one thread.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from repro.loop import Loop
from repro.phases import SingleLossPhase
from repro.runtime import Runtime

ENGINE = Path(__file__).parents[1] / "templates/reproduction"
TIMES, BLOCKS, STEPS, BATCH = 5, 20, 200, 256

FILES = {
    "pyproject.toml": '[tool.repro]\nmethod = "line:METHOD"\n',
    "configs/line.yaml": "experiment: line\npace: {log_every: 1, checkpoint_every: 1}\n",
    "network.py": """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

def optimiser(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)

def minibatch(generator):
    x = torch.randn(64, 1, generator=generator)
    return {"x": x, "y": 2 * x + 1}

def loss(model, batch):
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])
""",
    "line.py": """
import os
import network
from repro.config import RunConfig
from repro.method import Evaluation, Method
from repro.phases import SingleLossPhase

class Line(SingleLossPhase):
    name, iterations = "line", 10
    def make_model(self):
        return network.model()
    def make_optimiser(self, model):
        return network.optimiser(model)
    def minibatch(self, step, draw):
        if step == 1:
            os._exit(0)
        return network.minibatch(draw)
    def loss(self, model, batch):
        return network.loss(model, batch)

METHOD = Method("line", RunConfig, lambda config, runtime: [Line()], lambda *_: Evaluation({}), lambda *_: "")
""",
    "plain.py": """
import os
import torch
import network

torch.manual_seed(0)
model = network.model()
optimiser = network.optimiser(model)
loss = network.loss(model, network.minibatch(torch.Generator().manual_seed(0)))
loss.backward()
optimiser.step()
print(float(loss))
os._exit(0)
""",
}


def seconds_of(arguments: list[str], folder: Path) -> float:
    """Processor time of `python ARGUMENTS`, that of its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": f"{ENGINE}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step(folder: Path) -> tuple[float, float]:
    """Medians of the engine and of the plain script."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found: dict[str, list[float]] = {"engine": [], "plain": []}
    for number in range(TIMES + 1):
        engine = seconds_of(["-m", "repro", "run", "line", "--runs", f"runs-{number}"], folder)
        plain = seconds_of(["plain.py"], folder)
        if number:  # the first of each compiles modules
            found["engine"].append(engine)
            found["plain"].append(plain)
    return median(found["engine"]), median(found["plain"])


class Regression(SingleLossPhase):
    name, iterations = "regression", 10**9

    def make_model(self) -> nn.Module:
        return mlp()

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def minibatch(self, step: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
        return points(draw)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(2, 256), nn.SELU()]
    for _ in range(2):
        layers += [nn.Linear(256, 256), nn.SELU()]
    return nn.Sequential(*layers, nn.Linear(256, 2))


def points(generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(BATCH, 2, generator=generator)
    return {"x": x, "y": x.flip(1)}


def block(step: Callable[[], None]) -> float:
    """Processor time of a step, in microseconds."""
    began = time.process_time()
    for _ in range(STEPS):
        step()
    return 1e6 * (time.process_time() - began) / STEPS


def each_step() -> tuple[float, float, float]:
    """Medians of the engine and of the plain loop, and of their ratio over adjacent blocks."""
    loop = Loop(Regression(), seed=0, runtime=Runtime(torch.device("cpu")), earlier={})
    model, generator = mlp(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def plain() -> None:
        batch = points(generator)
        loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    def engine() -> None:
        loop.collect_if_due()
        loop.one_step(loop.next_batch())

    for warm in (engine, plain):
        block(warm)
    pairs = [(block(engine), block(plain)) for _ in range(BLOCKS)]
    return median(e for e, _ in pairs), median(p for _, p in pairs), median(e / p for e, p in pairs)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine, plain = first_step(Path(folder))
    print(f"first step: engine {engine:.2f} s, plain script {plain:.2f} s, ratio {engine / plain:.2f}")
    engine, plain, ratio = each_step()
    print(f"each step: engine {engine:.0f} µs, plain loop {plain:.0f} µs, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
