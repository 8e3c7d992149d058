"""Self-training (Lee, 2013): each round the network makes pseudo-labels anew; it begins with twenty labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

POINTS, LABELLED, BATCH, ROUND, SURE = 400, 20, 32, 8, 0.98


@dataclass
class Student:
    network: nn.Module
    optimiser: torch.optim.SGD


class SelfTraining(Phase[Student]):
    name, steps = "self_training", 240
    collect_every = ROUND

    def setup(self, earlier: Mapping[str, Networks]) -> Student:
        network = make_network()
        return Student(network, make_sgd(network))

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, Networks]) -> None:
        self.x, self.moon = two_moons(POINTS, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def collect(self, state: Student, update: Update) -> Batch:
        """The labelled points, and those whose class the network is SURE of. The optimiser begins anew."""
        state.optimiser = make_sgd(state.network)
        device = next(state.network.parameters()).device
        state.network.eval()
        probability, label = state.network(self.x[LABELLED:].to(device)).softmax(1).cpu().max(1)
        state.network.train()
        sure = probability > SURE
        update.log("pseudo-labels", sure.sum())
        update.log("wrong ones", (label != self.moon[LABELLED:])[sure].sum())
        return {
            "x": torch.cat([self.x[:LABELLED], self.x[LABELLED:][sure]]),
            "label": torch.cat([self.moon[:LABELLED], label[sure]]),
        }

    def minibatch(self, step: int, draw: Draw) -> Batch:
        rows = torch.randint(len(draw.collected["x"]), (BATCH,), generator=draw)
        return {name: column[rows] for name, column in draw.collected.items()}

    def train_step(self, state: Student, batch: Batch, update: Update) -> None:
        for part in update.parts(batch):
            update.backward(cross_entropy(state.network(part["x"]), part["label"]))
        update.log("loss", update.step(state.optimiser))

    def networks(self, state: Student) -> Mapping[str, nn.Module]:
        return {"network": state.network}


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2)
    )


def make_sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def two_moons(n: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (n, 2) on two half circles that reach into each other, and the half circle of each (n,)."""
    moon, angle = torch.arange(n) % 2, math.pi * torch.rand(n, generator=chance)
    x = torch.stack([angle.cos() + moon - 0.5, angle.sin() * (1 - 2 * moon) + 0.5 * moon - 0.25], dim=1)
    return x + 0.1 * torch.randn(n, 2, generator=chance), moon


def make_phase() -> SelfTraining:
    return SelfTraining()
