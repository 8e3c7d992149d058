"""L-BFGS with a line search, which asks for the loss several times in a step: a small network fits a curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss

from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

POINTS, ITERATIONS = 100, 4


@dataclass
class Fit:
    network: nn.Module
    lbfgs: torch.optim.LBFGS


class LBFGS(Phase[Fit]):
    name, steps = "lbfgs", 60
    counts = {"iterations": ITERATIONS}

    def setup(self, earlier: Mapping[str, Networks]) -> Fit:
        network = make_network()
        return Fit(network, make_lbfgs(network))

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, Networks]) -> None:
        self.x = torch.linspace(-1, 1, POINTS, dtype=torch.float64).unsqueeze(1)
        self.y = (8 * self.x).sin() * self.x

    def minibatch(self, step: int, draw: Draw) -> Batch:
        return {"x": self.x, "y": self.y}

    def train_step(self, state: Fit, batch: Batch, update: Update) -> None:
        def closure() -> None:
            for part in update.parts(batch):
                update.backward(mse_loss(state.network(part["x"]), part["y"]))

        update.log("loss", update.step(state.lbfgs, closure=closure))

    def networks(self, state: Fit) -> Mapping[str, nn.Module]:
        return {"network": state.network}


def make_network() -> nn.Module:
    """In float64: a line search compares losses that differ little."""
    return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()


def make_lbfgs(network: nn.Module) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(network.parameters(), max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")


def make_phase() -> LBFGS:
    return LBFGS()
