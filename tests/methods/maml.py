"""MAML (Finn et al., 2017, Algorithm 2): weights from which two steps of gradient descent learn a sinusoid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

TASKS, SHOTS, INNER_STEPS, INNER_RATE = 8, 10, 2, 0.01


@dataclass
class Learner:
    network: nn.Module
    adam: torch.optim.Adam


class MAML(Phase[Learner]):
    name, steps = "maml", 1500
    counts = {"meta-iterations": 1}

    def setup(self, earlier: Mapping[str, Networks]) -> Learner:
        network = make_network()
        return Learner(network, make_adam(network))

    def minibatch(self, step: int, draw: Draw) -> Batch:
        """A task to a row: SHOTS points of a sinusoid to learn from, as many others to judge by."""
        amplitude = 0.1 + 4.9 * torch.rand(TASKS, 1, 1, generator=draw)
        phase = math.pi * torch.rand(TASKS, 1, 1, generator=draw)
        x = 10 * torch.rand(TASKS, 2 * SHOTS, 1, generator=draw) - 5
        y = amplitude * (x + phase).sin()
        return {"x": x[:, :SHOTS], "y": y[:, :SHOTS], "new_x": x[:, SHOTS:], "new_y": y[:, SHOTS:]}

    def train_step(self, state: Learner, batch: Batch, update: Update) -> None:
        for part in update.parts(batch):
            losses = []
            for x, y, new_x, new_y in zip(part["x"], part["y"], part["new_x"], part["new_y"], strict=True):
                weights = adapted(state.network, x, y)
                losses.append(mse_loss(functional_call(state.network, weights, (new_x,)), new_y))
            update.backward(torch.stack(losses).mean())
        update.log("loss", update.step(state.adam))

    def networks(self, state: Learner) -> Mapping[str, nn.Module]:
        return {"network": state.network}


def adapted(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The weights after INNER_STEPS of gradient descent on one task, as a function of those before."""
    weights: dict[str, Tensor] = dict(network.named_parameters())
    for _ in range(INNER_STEPS):
        loss = mse_loss(functional_call(network, weights, (x,)), y)
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        steps = zip(weights.items(), slopes, strict=True)
        weights = {name: weight - INNER_RATE * slope for (name, weight), slope in steps}
    return weights


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def make_adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=1e-3)


def make_phase() -> MAML:
    return MAML()
