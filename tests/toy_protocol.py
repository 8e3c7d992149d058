"""The toy method with an evaluation protocol of its own, `evaluation.points`, and draws that it leaves to the global generator."""

import torch
import toy_method
from pydantic import PositiveInt

from repro.config import Section
from repro.method import Evaluation, Method


class Protocol(Section):
    points: PositiveInt


class Config(toy_method.Config):
    evaluation: Protocol


def evaluate(config, models, seed, runtime):
    x = torch.randn(config.evaluation.points, 1)
    error = (models["line"](x) - (2 * x + 1)).square().mean()
    return Evaluation({"line.error": float(error), "constant.value": float(models["constant"](x).mean())}, {"x": x})


METHOD = Method(
    "toy",
    Config,
    lambda config, runtime: [toy_method.Line(config), toy_method.Constant(config)],
    lambda *given: evaluate(*given),
    lambda *_: "",
)
