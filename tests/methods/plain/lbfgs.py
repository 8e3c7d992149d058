"""L-BFGS without an engine."""

from __future__ import annotations

from torch import Tensor

from methods.lbfgs import make_lbfgs, make_network, make_phase
from methods.plain.given import Curves, begin, minibatch, tensors


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    network = make_network()
    optimiser = make_lbfgs(network)
    curves: Curves = {"loss": []}

    for step in range(steps):
        batch = minibatch(phase, seed, step)

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss: Tensor = ((network(batch["x"]) - batch["y"]) ** 2).mean()
            loss.backward()
            return loss

        loss = optimiser.step(closure)
        curves["loss"].append((step + 1, loss.item()))

    return tensors(network=network), curves
