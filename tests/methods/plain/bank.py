"""Self-training without an engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.bank import LABELLED, ROUND, SURE, make_network, make_phase, make_sgd
from methods.plain.given import Curves, begin, minibatch, tensors


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    network = make_network()
    curves: Curves = {"pseudo-labels": [], "wrong ones": [], "loss": []}

    for step in range(steps):
        if step % ROUND == 0:
            optimiser = make_sgd(network)
            bank_x, bank_label = list(phase.x[:LABELLED]), list(phase.moon[:LABELLED])
            network.eval()
            with torch.no_grad():
                probabilities = torch.softmax(network(phase.x[LABELLED:]), dim=1)
            network.train()
            wrong = 0
            for x, truth, probability in zip(phase.x[LABELLED:], phase.moon[LABELLED:], probabilities, strict=True):
                if probability.max() > SURE:
                    bank_x.append(x)
                    bank_label.append(probability.argmax())
                    wrong += int(probability.argmax() != truth)
            curves["pseudo-labels"].append((step + 1, len(bank_x) - LABELLED))
            curves["wrong ones"].append((step + 1, wrong))
        batch = minibatch(phase, seed, step, {"x": torch.stack(bank_x), "label": torch.stack(bank_label)})

        optimiser.zero_grad()
        loss = F.cross_entropy(network(batch["x"]), batch["label"])
        loss.backward()
        optimiser.step()
        curves["loss"].append((step + 1, loss.item()))

    return tensors(network=network), curves
