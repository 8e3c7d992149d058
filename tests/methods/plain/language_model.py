"""The language model without an engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from methods.language_model import NORM, PADDING, RATE, TOKENS, Transformer, make_phase
from methods.plain.given import Curves, begin, minibatch, tensors


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    network = Transformer()
    optimiser = torch.optim.Adam(network.parameters(), lr=RATE)
    scheduler = OneCycleLR(optimiser, max_lr=RATE, total_steps=phase.steps)
    curves: Curves = {"loss": []}

    for step in range(steps):
        tokens = minibatch(phase, seed, step)["tokens"]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = network(inputs).reshape(-1, TOKENS)
        total = F.cross_entropy(logits, targets.reshape(-1), ignore_index=PADDING, reduction="sum")
        loss = total / (targets != PADDING).sum()

        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), NORM)
        optimiser.step()
        scheduler.step()
        curves["loss"].append((step + 1, loss.item()))

    return tensors(network=network), curves
