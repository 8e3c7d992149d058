"""What is measured of a finished run: of points, or of images."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nsgf import evaluate_images, evaluate_points
from nsgf.config import ImageConfig, PointConfig
from repro.method import Evaluation
from repro.runtime import Runtime


def evaluate(
    config: PointConfig | ImageConfig, models: Mapping[str, nn.Module], seed: int, runtime: Runtime
) -> Evaluation:
    kind = evaluate_points if isinstance(config, PointConfig) else evaluate_images
    return kind.evaluate(config, models, seed, runtime)
