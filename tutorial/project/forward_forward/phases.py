"""The phases in their order: the layers by Forward-Forward, the softmax on the frozen layers, the same network by back-propagation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repro.phases import Phase, SingleLossPhase
from repro.runtime import Runtime

from . import data
from .config import Config, Training
from .data import CLASSES, NEUTRAL, one_hot, with_label
from .layers import ForwardForward, features, goodness, layer_loss, make_perceptron, make_softmax


def make_phases(config: Config, runtime: Runtime) -> list[Phase]:
    return [Layers(config, runtime), Softmax(config, runtime), Backprop(config, runtime)]


def choose(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The class that each of `uniforms` (n,) in [0, 1) falls on when the unit interval is cut by probabilities (n, k), (n,)."""
    edges = probabilities.cumsum(1)
    # Over the last edge, for it is 1 only up to rounding: no number may fall behind the last class that has a probability.
    return torch.searchsorted(edges, uniforms[:, None] * edges[:, -1:], right=True)[:, 0]


def wrong_labels(logits: Tensor, labels: Tensor, uniforms: Tensor) -> Tensor:
    """Labels (n,) drawn by the softmax of logits (n, 10) without the true one. `uniforms` (n,) in [0, 1) decide."""
    others = logits.masked_fill(one_hot(labels).bool(), -math.inf)
    return choose(others.softmax(1), uniforms)


class OnImages(SingleLossPhase):
    """What the phases share: minibatches of the training images, drawn with replacement."""

    def __init__(self, config: Config, runtime: Runtime, own: Training):
        self.config, self.runtime, self.own = config, runtime, own
        self.iterations, self.options = own.iterations, own
        self.train: data.ImageSet | None = None

    def check(self, folder: Path) -> list[str]:
        if not self.runtime.stand_in_data:
            data.require(self.config.data.set, self.runtime.data_root)
        return []

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, nn.Module]) -> None:
        chosen, runtime = self.config.data, self.runtime
        self.train = data.load(
            chosen.set, "train", chosen.validation_images, runtime.data_root, stand_in=runtime.stand_in_data
        )

    def release(self) -> None:
        self.train = None

    def minibatch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = self.train[torch.randint(len(self.train), (self.own.batch_size,), generator=generator)]
        return {"images": drawn.images(), "labels": drawn.labels}

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        n = self.own.batch_size
        return {
            "images": torch.zeros(n, data.pixels_of(self.config.data.set)),
            "labels": torch.zeros(n, dtype=torch.int64),
        }


class Layers(OnImages):
    """Phase 1: every layer learns to tell images with their label from images with a wrong one, all layers at the same time."""

    name = "layers"

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__(config, runtime, config.phases.layers)
        self.threshold = self.own.threshold * config.network.width

    def make_model(self) -> nn.Module:
        sizes = self.config.network
        return ForwardForward(data.pixels_of(self.config.data.set), sizes.width, sizes.layers)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        own = self.own
        layers = {"params": model.layers.parameters(), "lr": own.learning_rate, "weight_decay": own.weight_decay}
        softmax = {
            "params": model.softmax.parameters(),
            "lr": own.softmax_learning_rate,
            "weight_decay": own.softmax_weight_decay,
        }
        return torch.optim.SGD([layers, softmax], momentum=own.momentum, dampening=own.momentum)

    def minibatch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Which label a number picks depends on the network; the number itself must not, or a resumed run would draw another.
        return super().minibatch(step, generator) | {"uniforms": torch.rand(self.own.batch_size, generator=generator)}

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return super().rehearse(earlier) | {"uniforms": torch.zeros(self.own.batch_size)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        images, labels = batch["images"], batch["labels"]
        _, logits = model(with_label(images, NEUTRAL))
        guesses = logits.detach() if self.own.negatives == "hard" else torch.zeros_like(logits)
        wrong = wrong_labels(guesses, labels, batch["uniforms"])

        pairs = torch.cat([with_label(images, one_hot(labels)), with_label(images, one_hot(wrong))])
        activities, _ = model(pairs)
        losses = [layer_loss(*goodness(activity).chunk(2), self.threshold).mean() for activity in activities]
        return sum(losses) + cross_entropy(logits, labels)

    def expected_initial_loss(self) -> float:
        """Half of the squares of normal numbers are zeroed, so a goodness is near width / 2, and the softmax starts at zero."""
        start = torch.tensor(self.config.network.width / 2)
        of_layer = float(layer_loss(start, start, self.threshold))
        return self.config.network.layers * of_layer + math.log(CLASSES)


class Softmax(OnImages):
    """Phase 2: a softmax on the normalised activities of the frozen layers, for images with a neutral label."""

    name = "softmax"

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__(config, runtime, config.phases.softmax)
        self.layers: ForwardForward | None = None

    def make_model(self) -> nn.Module:
        sizes = self.config.network
        return make_softmax(sizes.width * (sizes.layers - 1))

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        own = self.own
        return torch.optim.SGD(
            model.parameters(), own.learning_rate, own.momentum, dampening=own.momentum, weight_decay=own.weight_decay
        )

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, nn.Module]) -> None:
        super().prepare(seed, scratch, earlier)
        self.layers = earlier["layers"]

    def release(self) -> None:
        super().release()
        self.layers = None

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        self.layers = earlier["layers"]
        return super().rehearse(earlier)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        seen = features(self.layers.activities(with_label(batch["images"], NEUTRAL)))
        return cross_entropy(model(seen), batch["labels"])

    def expected_initial_loss(self) -> float:
        """That of equally likely labels."""
        return math.log(CLASSES)


class Backprop(OnImages):
    """Phase 3, the baseline: ReLUs of the same sizes on plain images, trained as a whole by back-propagation of the cross-entropy."""

    name = "backprop"

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__(config, runtime, config.phases.backprop)

    def make_model(self) -> nn.Module:
        sizes = self.config.network
        return make_perceptron(data.pixels_of(self.config.data.set), sizes.width, sizes.layers)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.own.learning_rate, weight_decay=self.own.weight_decay)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(model(batch["images"]), batch["labels"])

    def expected_initial_loss(self) -> float:
        """That of equally likely labels: the softmax starts at zero."""
        return math.log(CLASSES)
