"""Sharpness-aware minimisation (Foret et al., 2021, Algorithm 1) around SGD with momentum, on three spirals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

POINTS, ARMS, BATCH, RADIUS = 384, 3, 64, 0.05


@dataclass
class Classifier:
    network: nn.Module
    sgd: torch.optim.SGD


class SAM(Phase[Classifier]):
    name, steps = "sam", 1200
    counts = {"epochs": Fraction(BATCH, POINTS)}

    def setup(self, earlier: Mapping[str, Networks]) -> Classifier:
        network = make_network()
        return Classifier(network, make_sgd(network))

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, Networks]) -> None:
        self.x, self.arm = spirals(POINTS, torch.Generator().manual_seed(0))

    def minibatch(self, step: int, draw: Draw) -> Batch:
        rows = draw.epoch_rows(POINTS, BATCH, last="drop")
        return {"x": self.x[rows], "arm": self.arm[rows]}

    def train_step(self, state: Classifier, batch: Batch, update: Update) -> None:
        for part in update.parts(batch):
            update.backward(cross_entropy(state.network(part["x"]), part["arm"]))
        with uphill(state.network, update.gradient(state.network)):
            for part in update.parts(batch):
                update.backward(cross_entropy(state.network(part["x"]), part["arm"]))
        update.log("loss uphill", update.step(state.sgd))

    def networks(self, state: Classifier) -> Mapping[str, nn.Module]:
        return {"network": state.network}


@contextmanager
def uphill(network: nn.Module, slope: Sequence[Tensor | None]) -> Iterator[None]:
    """Within this block the weights lie RADIUS further along the slope, and after it where they were, to the bit."""
    along = [(weight, part) for weight, part in zip(network.parameters(), slope, strict=True) if part is not None]
    before = [weight.detach().clone() for weight, _ in along]
    scale = RADIUS / torch.stack([part.norm() for _, part in along]).norm()
    with torch.no_grad():
        for weight, part in along:
            weight.add_(scale * part)
    yield
    with torch.no_grad():
        for (weight, _), old in zip(along, before, strict=True):
            weight.copy_(old)


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, ARMS))


def make_sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def spirals(n: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (n, 2) on ARMS arms of a spiral, and the arm of each (n,)."""
    arm, radius = torch.arange(n) % ARMS, torch.rand(n, generator=chance)
    angle = 4 * radius + arm * (math.tau / ARMS) + 0.1 * torch.randn(n, generator=chance)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm


def make_phase() -> SAM:
    return SAM()
