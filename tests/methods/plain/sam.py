"""Sharpness-aware minimisation without an engine."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.plain.given import Curves, begin, minibatch, tensors
from methods.sam import RADIUS, make_network, make_phase, make_sgd


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    network = make_network()
    optimiser = make_sgd(network)
    curves: Curves = {"loss uphill": []}

    for step in range(steps):
        batch = minibatch(phase, seed, step)
        loss = F.cross_entropy(network(batch["x"]), batch["arm"])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        norm = torch.stack([g.norm(2) for g in gradients]).norm(2)
        original = copy.deepcopy(network.state_dict())
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients, strict=True):
                p.add_(RADIUS / norm * g)

        optimiser.zero_grad()
        loss = F.cross_entropy(network(batch["x"]), batch["arm"])
        loss.backward()
        network.load_state_dict(original)
        optimiser.step()
        curves["loss uphill"].append((step + 1, loss.item()))

    return tensors(network=network), curves
