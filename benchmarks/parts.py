"""What workers bring and what adding up gradients costs, in wall time. `python -m benchmarks.parts`; two minutes on two quiet cores.

Workers: a minibatch that waits as long as a step computes, and one that computes as long, with --workers 2 and 0, turn about. One thread.
Processes: ResNet-18 on minibatches of 32 images of 32 x 32, two gloo processes: the engine's step and that of
DistributedDataParallel, in adjacent blocks.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from repro.loop import Loop
from repro.phases import SingleLossPhase
from repro.runtime import Runtime, world_of_this_process

STEPS, TURNS = 60, 3
IMAGES, IMAGE_STEPS, IMAGE_BLOCKS = 32, 4, 5


def product(x: torch.Tensor) -> torch.Tensor:
    """Some hundredths of a second of work."""
    for _ in range(12):
        x = torch.tanh(x @ x.T / len(x)) + x
    return x


class Working(SingleLossPhase):
    """A step that computes; a minibatch that `prepares`."""

    name, iterations = "working", 10**9

    def __init__(self, prepares: Callable[[], object]):
        self._prepares = prepares

    def make_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def minibatch(self, step: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
        self._prepares()
        return {"x": torch.randn(600, 600, generator=draw)}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(product(batch["x"]).mean().reshape(1, 1)).square().mean()


def steps_a_second(prepares: Callable[[], object], workers: int) -> float:
    loop = Loop(Working(prepares), seed=0, runtime=Runtime(torch.device("cpu"), workers=workers), earlier={})
    for _ in range(4):
        loop.one_step(loop.next_batch())
    began = time.perf_counter()
    for _ in range(STEPS):
        loop.one_step(loop.next_batch())
    seconds = time.perf_counter() - began
    loop.close()
    return STEPS / seconds


def workers() -> None:
    torch.set_num_threads(1)
    x = torch.randn(600, 600)
    alone = 1 / max(steps_a_second(lambda: None, 0) for _ in range(TURNS))
    for name, prepares in (("waits", lambda: time.sleep(alone)), ("computes", lambda: product(x))):
        pairs = [(steps_a_second(prepares, 2), steps_a_second(prepares, 0)) for _ in range(TURNS)]
        ratio = median(two / none for two, none in pairs)
        print(f"minibatch that {name} for {1000 * alone:.0f} ms: with 2 workers {ratio:.2f} times the steps a second")


class Block(nn.Module):
    """Two convolutions with a way past them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        first, second = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.inside = nn.Sequential(first, nn.GroupNorm(8, outputs), nn.ReLU(), second, nn.GroupNorm(8, outputs))
        self.past = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inside(x) + self.past(x))


def resnet18() -> nn.Module:
    """11.2 million weights, with group norms: statistics of a part are not what one process does."""
    widths, layers = (64, 64, 128, 256, 512), [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [Block(inputs, outputs, 2 if number else 1), Block(outputs, outputs, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Images(SingleLossPhase):
    name, iterations = "images", 10**9

    def make_model(self) -> nn.Module:
        return resnet18()

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def minibatch(self, step: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
        label = torch.randint(10, (IMAGES,), generator=draw)
        return {"x": torch.randn(IMAGES, 3, 32, 32, generator=draw), "label": label}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["label"])


def beside_ddp(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with world_of_this_process() as world:
        phase = Images()
        loop = Loop(phase, seed=0, runtime=Runtime(torch.device("cpu"), world=world), earlier={})
        model = DistributedDataParallel(phase.make_model())
        optimiser = phase.make_optimiser(model)

        def engine() -> None:
            loop.one_step(loop.next_batch())

        def ddp() -> None:
            batch = {name: column[rank::2] for name, column in loop.next_batch().items()}
            optimiser.zero_grad(set_to_none=True)
            phase.loss(model, batch).backward()
            optimiser.step()

        def block(step: Callable[[], None]) -> float:
            world.barrier()
            began = time.perf_counter()
            for _ in range(IMAGE_STEPS):
                step()
            return (time.perf_counter() - began) / IMAGE_STEPS

        for warm in (engine, ddp):
            block(warm)
        pairs = [(block(engine), block(ddp)) for _ in range(IMAGE_BLOCKS)]
        if world.first:
            ours, theirs = median(one for one, _ in pairs), median(other for _, other in pairs)
            ratio = median(one / other for one, other in pairs)
            print(f"ResNet-18, 2 processes: engine {ours:.3f} s a step, DDP {theirs:.3f} s, ratio {ratio:.2f}")


def main() -> None:
    workers()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=beside_ddp, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
