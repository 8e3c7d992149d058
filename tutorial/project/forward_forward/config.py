"""The typed configuration of every experiment. The values stand in configs/*.yaml, where they come from in spec.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from repro.config import RunConfig, Section
from repro.phases import StepOptions


class Data(Section):
    """The image set, and how many of its training images are kept back for validation."""

    set: Literal["digits", "mnist"]
    validation_images: PositiveInt


class Network(Section):
    """Goodness and softmax leave the first layer out, so there are two or more."""

    layers: int = Field(ge=2)
    width: PositiveInt


class Training(StepOptions):
    """What every phase has, beside precision, warm-up, clipping and average of the weights."""

    iterations: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat


class Local(Training):
    """SGD whose gradient is smoothed: of each step's one it takes 1 - `momentum`, of what it had before `momentum`."""

    momentum: float = Field(ge=0, lt=1)


class Layers(Local):
    """Phase 1. The threshold of goodness is in units of the width: 1 is the goodness of a layer whose mean square activity is 1.

    `softmax_learning_rate` and `softmax_weight_decay` are those of the softmax that learns beside the layers and guesses the wrong labels.
    """

    threshold: PositiveFloat
    negatives: Literal["hard", "uniform"]
    softmax_learning_rate: PositiveFloat
    softmax_weight_decay: NonNegativeFloat


class Phases(Section):
    layers: Layers
    softmax: Local
    backprop: Training


class Evaluation(Section):
    """`split` is validation for choosing a setting, test for the result."""

    split: Literal["validation", "test"]
    batch_size: PositiveInt
    hardest: PositiveInt


class Config(RunConfig):
    data: Data
    network: Network
    phases: Phases
    evaluation: Evaluation
