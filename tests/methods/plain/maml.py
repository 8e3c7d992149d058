"""MAML without an engine: the network is written out, so that it can be called with any weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.maml import INNER_RATE, INNER_STEPS, TASKS, make_adam, make_network, make_phase
from methods.plain.given import Curves, begin, minibatch, tensors


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    network = make_network()
    optimiser = make_adam(network)
    curves: Curves = {"loss": []}

    for step in range(steps):
        batch = minibatch(phase, seed, step)
        task_losses = []
        for task in range(TASKS):
            fast: list[Tensor] = list(network.parameters())
            for _ in range(INNER_STEPS):
                inner_loss = F.mse_loss(call(fast, batch["x"][task]), batch["y"][task])
                gradients = torch.autograd.grad(inner_loss, fast, create_graph=True)
                fast = [w - INNER_RATE * g for w, g in zip(fast, gradients, strict=True)]
            task_losses.append(F.mse_loss(call(fast, batch["new_x"][task]), batch["new_y"][task]))
        loss = torch.stack(task_losses).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curves["loss"].append((step + 1, loss.item()))

    return tensors(network=network), curves


def call(weights: list[Tensor], x: Tensor) -> Tensor:
    w1, b1, w2, b2, w3, b3 = weights
    h = F.relu(F.linear(x, w1, b1))
    h = F.relu(F.linear(h, w2, b2))
    return F.linear(h, w3, b3)
