"""What is measured of a finished run: three ways to classify the images of a split. Claims of spec.yaml name these metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from repro.method import Evaluation
from repro.runtime import Runtime

from . import data
from .config import Config
from .data import CLASSES, NEUTRAL, with_label
from .layers import ForwardForward, features


def evaluate(config: Config, models: Mapping[str, nn.Module], seed: int, runtime: Runtime) -> Evaluation:
    """Errors in percent: `goodness.error`, `goodness.layer_<k>.error` for each layer alone, `softmax.error`, `backprop.error`.

    Every image of the split counts once; nothing is drawn.
    """
    chosen, protocol = config.data, config.evaluation
    judged = data.load(
        chosen.set, protocol.split, chosen.validation_images, runtime.data_root, stand_in=runtime.stand_in_data
    )

    def on_all(function: Callable[[Tensor], Tensor]) -> Tensor:
        parts = judged.images().split(protocol.batch_size)
        return torch.cat([function(part.to(runtime.device)).cpu() for part in parts])

    layers: ForwardForward = models["layers"]
    by_layer = on_all(layers.goodness_of_labels)
    total = accumulated(by_layer)
    logits = {
        "softmax": on_all(lambda images: models["softmax"](features(layers.activities(with_label(images, NEUTRAL))))),
        "backprop": on_all(models["backprop"]),
    }
    metrics = {"goodness.error": error(total, judged.labels)}
    metrics |= {
        f"goodness.layer_{k + 1}.error": error(by_layer[:, :, k], judged.labels) for k in range(by_layer.shape[2])
    }
    metrics |= {f"{name}.error": error(scores, judged.labels) for name, scores in logits.items()}

    lead = true_and_best_wrong(total, judged.labels)
    hardest = (lead[:, 0] - lead[:, 1]).argsort()[: protocol.hardest]
    per_unit = true_and_best_wrong(by_layer, judged.labels) / config.network.width
    tensors = {
        "confusion": confusion(total.argmax(1), judged.labels),
        "hardest.images": judged.pixels[hardest],
        "hardest.labels": judged.labels[hardest],
        "hardest.guesses": total[hardest].argmax(1),
        "goodness": per_unit,
        "receptive_fields": layers.layers[0].weight.detach().cpu()[:64],
    }
    return Evaluation(metrics, tensors)


def accumulated(by_layer: Tensor) -> Tensor:
    """Goodnesses (n, 10, layers) added up over all layers but the first, (n, 10)."""
    return by_layer[:, :, 1:].sum(2)


def error(scores: Tensor, labels: Tensor) -> float:
    """Percent of the labels (n,) that are not the one with the greatest of scores (n, 10)."""
    return 100 * float((scores.argmax(1) != labels).double().mean())


def true_and_best_wrong(scores: Tensor, labels: Tensor) -> Tensor:
    """The score of the true label and the greatest of the others, of scores (n, 10, ...): (n, 2, ...)."""
    is_true = data.one_hot(labels).bool().view(len(labels), CLASSES, *[1] * (scores.dim() - 2)).expand_as(scores)
    lowest = float("-inf")
    return torch.stack([scores.masked_fill(~is_true, lowest).amax(1), scores.masked_fill(is_true, lowest).amax(1)], 1)


def confusion(guesses: Tensor, labels: Tensor) -> Tensor:
    """(10, 10) counts: the true label by row, the guessed one by column."""
    return torch.bincount(CLASSES * labels + guesses, minlength=CLASSES**2).view(CLASSES, CLASSES)
