"""The small networks: multilayer perceptrons for points (appendix E.1, page 13), convolutions for images (E.2, page 14)."""

from __future__ import annotations

from collections.abc import Sequence

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


class TimePredictorCNN(nn.Module):
    """t_phi for images (appendix E.2, page 14): x (n, c, s, s) to a time in [0, 1], (n,).

    Convolutions 3x3, each followed by ReLU and 2x2 average pooling, then one linear layer and a sigmoid. With 32, 64, 128 and
    256 channels: 388,097 parameters at 1x28x28 and 389,441 at 3x32x32. Raises ValueError when the image is too small for its layers.
    """

    def __init__(self, *, image_size: int, image_channels: int, channels: Sequence[int]):
        super().__init__()
        self.convolutions = convolutions(image_size, image_channels, channels)
        side = image_size // 2 ** len(channels)
        self.time = nn.Linear(channels[-1] * side * side, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.time(self.convolutions(x).flatten(1)).squeeze(1).sigmoid()


class ImageClassifier(nn.Module):
    """Class scores of images: x (n, c, s, s) to (n, classes). Not of the paper.

    The same convolutions as the time predictor, then the mean over the pixels: those `features` are what samples are compared in.
    """

    def __init__(self, *, image_size: int, image_channels: int, channels: Sequence[int], classes: int):
        super().__init__()
        self.convolutions = convolutions(image_size, image_channels, channels)
        self.scores = nn.Linear(channels[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """(n, channels of the last convolution)."""
        return self.convolutions(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.features(x))


def convolutions(image_size: int, image_channels: int, channels: Sequence[int]) -> nn.Sequential:
    """Convolution 3x3, ReLU and 2x2 average pooling, once per entry of `channels`. ValueError when no pixel would be left."""
    if not channels or image_size >> len(channels) < 1:
        raise ValueError(
            f"CNN: found {len(channels)} poolings of images of size {image_size}, expected 1 to {image_size.bit_length() - 1}"
        )
    layers: list[nn.Module] = []
    for inputs, outputs in zip([image_channels, *channels], channels, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers)
