"""The network: layers of ReLUs that each learn by themselves, and the softmax that guesses the label from what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .data import CLASSES, with_label

SMALLEST_LENGTH = 1e-8
"""Keeps a layer that is silent for an image from a division by zero."""


def normalise(activity: Tensor) -> Tensor:
    """Activities (n, d) scaled to a mean square of 1: what is left for the next layer is their direction, not the goodness."""
    return activity / (activity.square().mean(1, keepdim=True).sqrt() + SMALLEST_LENGTH)


def goodness(activity: Tensor) -> Tensor:
    """The sum of the squared activities (n, d) of a layer, (n,)."""
    return activity.square().sum(1)


def layer_loss(positive: Tensor, negative: Tensor, threshold: float) -> Tensor:
    """Minus the log-probability that a layer takes positive data for positive and negative data for negative, (n,).

    The probability of "positive" is the logistic function of goodness minus threshold; both are the goodnesses (n,) of one layer.
    """
    return softplus(threshold - positive) + softplus(negative - threshold)


def features(activities: Sequence[Tensor]) -> Tensor:
    """What a softmax sees: the normalised activities of all layers but the first, side by side, (n, width * (layers - 1))."""
    return torch.cat([normalise(activity) for activity in activities[1:]], dim=1)


def make_softmax(inputs: int) -> nn.Linear:
    """From (n, inputs) to logits (n, 10). It starts at zero: all labels are equally likely."""
    softmax = nn.Linear(inputs, CLASSES)
    nn.init.zeros_(softmax.weight)
    nn.init.zeros_(softmax.bias)
    return softmax


def make_perceptron(pixels: int, width: int, layers: int) -> nn.Sequential:
    """`layers` layers of `width` ReLUs and a softmax on the last one, from images (n, pixels) to logits (n, 10)."""
    sizes = [pixels, *[width] * layers]
    hidden = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, make_softmax(width))


class ForwardForward(nn.Module):
    """`layers` layers of `width` ReLUs on inputs (n, pixels), with a softmax that learns beside them.

    No gradient leaves a layer: its input is detached, and so is that of the softmax.
    """

    def __init__(self, pixels: int, width: int, layers: int):
        super().__init__()
        sizes = [pixels, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
        self.softmax = make_softmax(width * (layers - 1))

    def activities(self, inputs: Tensor) -> list[Tensor]:
        """The activities of each layer before they are normalised, (n, width) each."""
        found = []
        for layer in self.layers:
            inputs = torch.relu(layer(normalise(inputs).detach()))
            found.append(inputs)
        return found

    def forward(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """The activities of each layer, and the logits (n, 10) of the softmax."""
        found = self.activities(inputs)
        return found, self.softmax(features(found).detach())

    def goodness_of_labels(self, images: Tensor) -> Tensor:
        """The goodness of each layer for images (n, pixels) with each label in turn, (n, 10, layers)."""
        found = []
        for label in torch.eye(CLASSES, device=images.device):
            activities = self.activities(with_label(images, label))
            found.append(torch.stack([goodness(activity) for activity in activities], dim=1))
        return torch.stack(found, dim=1)
