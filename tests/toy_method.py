"""A method of two phases for the kit's tests: fit a line by a pool of noisy points, then a constant without one."""

from pathlib import Path

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from repro.config import RunConfig, Section
from repro.method import Evaluation, Method
from repro.phases import SingleLossPhase
from repro.randomness import generator


class Training(Section):
    iterations: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat


class Phases(Section):
    line: Training
    constant: Training


class Config(RunConfig):
    pool_size: PositiveInt
    phases: Phases


class Line(SingleLossPhase):
    def __init__(self, config: Config):
        self.name, self.iterations, self.config = "line", config.phases.line.iterations, config
        self.pool = None

    def make_model(self):
        return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def make_optimiser(self, model):
        return torch.optim.Adam(model.parameters(), lr=self.config.phases.line.learning_rate)

    def prepare(self, seed: int, scratch: Path, earlier):
        self.pool = torch.randn(self.config.pool_size, 1, generator=generator(seed, "pool"))

    def minibatch(self, step, generator):
        rows = torch.randint(len(self.pool), (self.config.phases.line.batch_size,), generator=generator)
        return {"x": self.pool[rows], "y": 2 * self.pool[rows] + 1}

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def release(self):
        self.pool = None


class Constant(SingleLossPhase):
    def __init__(self, config: Config):
        self.name, self.iterations, self.config = "constant", config.phases.constant.iterations, config

    def make_model(self):
        return nn.Linear(1, 1)

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.config.phases.constant.learning_rate, momentum=0.9)

    def minibatch(self, step, generator):
        return {"x": torch.randn(self.config.phases.constant.batch_size, 1, generator=generator)}

    def loss(self, model, batch):
        return (model(batch["x"]) - 3).square().mean()


def evaluate(config, models, seed, runtime):
    assert not any(model.training for model in models.values())
    x = torch.linspace(-1, 1, 11)[:, None]
    error = (models["line"](x) - (2 * x + 1)).square().mean()
    return Evaluation({"line.error": float(error), "constant.value": float(models["constant"](x).mean())}, {"x": x})


METHOD = Method("toy", Config, lambda config, runtime: [Line(config), Constant(config)], evaluate, lambda *_: "")
