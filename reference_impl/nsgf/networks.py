"""The networks of the 2-D experiments: three hidden layers of 256 units (appendix E.1, page 13)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS = {"selu": nn.SELU, "silu": nn.SiLU, "relu": nn.ReLU}


class TimeMLP(nn.Module):
    """A velocity field: points x (n, d) and times t (n,) to velocities (n, d). Time is one more input."""

    def __init__(self, dimension: int, width: int, hidden_layers: int, activation: str):
        super().__init__()
        self.dimension = dimension
        self.layers = mlp(dimension + 1, dimension, width, hidden_layers, activation)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.dimension or t.shape != x.shape[:1]:
            raise ValueError(
                f"velocity field: found x {tuple(x.shape)} and t {tuple(t.shape)}, expected (n, {self.dimension}) and (n,)"
            )
        return self.layers(torch.cat([x, t[:, None]], dim=1))


class TimePredictorMLP(nn.Module):
    """t_phi of Algorithm 3 for points: x (n, d) to a time in [0, 1], (n,)."""

    def __init__(self, dimension: int, width: int, hidden_layers: int, activation: str):
        super().__init__()
        self.layers = mlp(dimension, 1, width, hidden_layers, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(1).sigmoid()


def mlp(inputs: int, outputs: int, width: int, hidden_layers: int, activation: str) -> nn.Sequential:
    """`hidden_layers` layers of `width` units, each with its activation, and a linear output."""
    layers: list[nn.Module] = []
    for index in range(hidden_layers):
        layers += [nn.Linear(inputs if index == 0 else width, width), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
