"""The library calls of an experiment, each with its shapes and an answer that was constructed (`repro probe`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from repro.method import Probe
from repro.runtime import Runtime

from . import data
from .config import Config
from .data import CLASSES, one_hot


def probes(config: Config, runtime: Runtime) -> Iterator[Probe]:
    """Every library call of an experiment."""
    n, momentum, width = config.phases.layers.batch_size, config.phases.layers.momentum, config.network.width
    yield Probe("softplus", "torch", f"({n},), beyond {width}", partial(check_softplus, n, width))
    yield Probe("searchsorted", "torch", f"({n}, {CLASSES}) and ({n}, 1)", partial(check_searchsorted, n))
    yield Probe("SGD, momentum and dampening", "torch", f"({width}, {width})", partial(check_sgd, width, momentum))
    size = config.phases.softmax.batch_size
    yield Probe("cross_entropy", "torch", f"({size}, {CLASSES}), labels ({size},)", partial(check_cross_entropy, size))
    if config.data.set == "digits":
        yield Probe("reader of digits", "scikit-learn", "1,797 images of 8 x 8", check_digits)


def check_softplus(n: int, width: int) -> None:
    """ln(1 + e^x), without overflow where x is a goodness: ln 2 at 0, x itself far above, 0 far below."""
    for x, expected in ((0.0, math.log(2)), (10.0 * width, 10.0 * width), (-10.0 * width, 0.0)):
        found = nn.functional.softplus(torch.full((n,), x))
        assert torch.allclose(found, torch.full((n,), expected)), f"found softplus({x}) {found[0]}, expected {expected}"


def check_searchsorted(n: int) -> None:
    """With right=True a number on an edge belongs to the interval above it, so an interval of length 0 is never found."""
    edges = torch.arange(1, CLASSES + 1) / CLASSES
    edges[1] = edges[0]
    found = torch.searchsorted(edges.expand(n, -1).contiguous(), edges[0].expand(n, 1).contiguous(), right=True)
    assert found.shape == (n, 1) and bool((found == 2).all()), f"found interval {found[0]}, expected 2"


def check_sgd(width: int, momentum: float) -> None:
    """PyTorch's first step is not dampened: it goes the whole gradient, the second the mixture."""
    weight = nn.Parameter(torch.zeros(width, width))
    optimiser = torch.optim.SGD([weight], lr=1.0, momentum=momentum, dampening=momentum)
    for gradient, expected in ((1.0, -1.0), (0.0, -1.0 - momentum)):
        weight.grad = torch.full_like(weight, gradient)
        optimiser.step()
        assert torch.allclose(weight, torch.full_like(weight, expected)), f"found {weight[0, 0]}, expected {expected}"


def check_cross_entropy(n: int) -> None:
    """It takes logits: a lead of ln 9 over the nine others gives the true label one half."""
    labels = torch.arange(n) % CLASSES
    found = nn.functional.cross_entropy(math.log(CLASSES - 1) * one_hot(labels), labels)
    assert torch.allclose(found, torch.tensor(math.log(2))), f"found {found}, expected ln 2"


def check_digits() -> None:
    """Image 0 is a zero: in the fourth row of its border dark in the middle and bright beside it. Pixels reach 16, labels begin 0, 1, 2."""
    train, test = (data.load("digits", split, 1, None) for split in ("train", "test"))
    image = test.pixels[0].view(10, 10)
    assert (len(train) + 1, len(test)) == (1497, 300), f"found {len(train) + 1} and {len(test)}, expected 1497 and 300"
    assert int(test.labels[0]) == 0 and train.labels[:2].tolist() == [1, 2]
    assert int(image[4, 3]) > 0 == int(image[4, 5]) and int(train.pixels.max()) == 16
