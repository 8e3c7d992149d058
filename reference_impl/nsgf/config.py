"""The typed configurations of NSGF / NSGF++ experiments: `PointConfig` in two dimensions, `ImageConfig` for images.

The values stand in configs/*.yaml, the reasons in spec.yaml.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nsgf.data import LAWS
from nsgf.images import SETS
from repro.config import RunConfig, Section
from repro.phases import StepOptions

INCEPTION_SPLITS = 10
"""Of the Inception score, Salimans et al. 2016."""


class Sinkhorn(Section):
    """How the velocity of the Sinkhorn gradient flow is computed: eps = blur**2, annealed by scaling."""

    implementation: Literal["closed_form", "geomloss_tensorized", "geomloss_online"]
    blur: PositiveFloat
    scaling: float = Field(gt=0, lt=1)


class Training(Section):
    """What every phase has."""

    iterations: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat


class Flow(Section):
    """The Euler scheme of the particles: T steps of size eta."""

    steps: PositiveInt
    step_size: PositiveFloat


class PoolSize(Section):
    """The trajectory pool: independent minibatches of n source and n target points, each followed for T steps."""

    batches: PositiveInt
    batch_size: PositiveInt


class PlusPlus(Section):
    """Algorithm 4: Sinkhorn-flow steps before the hand-over, and omega, the step size of the straight flow after it."""

    sinkhorn_steps: PositiveInt
    straight_flow_step: float = Field(gt=0, le=1)


class MLP(Section):
    """A multilayer perceptron."""

    width: PositiveInt
    hidden_layers: PositiveInt
    activation: Literal["selu", "silu", "relu"]


class PointData(Section):
    """mu_0 and mu*: the laws that source and target points are drawn from."""

    source: Literal[LAWS]
    target: Literal[LAWS]


class PointTraining(Training):
    network: MLP


class PointVelocityField(PointTraining):
    """Algorithm 1."""

    flow: Flow
    pool: PoolSize


class PointStraightFlow(PointTraining):
    """Algorithm 3, third loop; with the optimal-transport coupling it is OT-CFM."""

    coupling: Literal["independent", "optimal_transport"]


class PointTimePredictor(PointTraining):
    """Algorithm 3, second loop."""


class PointPhases(Section):
    """Phases 1 to 3 are NSGF++; the last two serve Table 1 and may be null."""

    velocity_field: PointVelocityField
    straight_flow: PointStraightFlow
    time_predictor: PointTimePredictor
    velocity_field_100: PointVelocityField | None
    ot_cfm: PointStraightFlow | None


class PointEvaluation(Section):
    """How samples are judged. `euler_steps` are the numbers of steps at which the baselines are sampled."""

    test_points: PositiveInt
    euler_steps: list[PositiveInt]
    floor_draws: PositiveInt
    sinkhorn_blur: PositiveFloat
    sinkhorn_scaling: float = Field(gt=0, lt=1)
    path_points: NonNegativeInt


class PointConfig(RunConfig):
    data: PointData
    sinkhorn: Sinkhorn
    phases: PointPhases
    nsgf_plus_plus: PlusPlus
    evaluation: PointEvaluation


class UNet(Section):
    """Sizes of `nsgf.unet.UNet`; those of the image come from the data."""

    channels: PositiveInt
    blocks: PositiveInt
    multipliers: list[PositiveInt]
    heads: PositiveInt
    head_channels: PositiveInt | None
    attention_resolutions: list[PositiveInt]
    dropout: float = Field(ge=0, lt=1)
    groups: PositiveInt


class CNN(Section):
    """Channels of each convolution."""

    channels: list[PositiveInt]


class ImageData(Section):
    """The target set, and whether its images are mirrored at random. The source is standard normal noise."""

    set: Literal[SETS]
    flip: bool


class ImagePool(PoolSize):
    """`precision` is that of the stored numbers. `resident_batches` is how many minibatches are held at a time, null for
    all: the pool then comes in parts of so many, one after the other, each for as many steps."""

    precision: Literal["float32", "float16"]
    resident_batches: PositiveInt | None

    @model_validator(mode="after")
    def _no_more_than_there_are(self):
        if self.resident_batches is not None and self.resident_batches > self.batches:
            raise ValueError(f"at most {self.batches} resident batches, as many as the pool has")
        return self


class ImageTraining(Training, StepOptions):
    """Options of a step beside what every phase has."""


class ImageVelocityField(ImageTraining):
    """Algorithm 1."""

    network: UNet
    flow: Flow
    pool: ImagePool


class ImageStraightFlow(ImageTraining):
    """Algorithm 3, third loop."""

    network: UNet
    coupling: Literal["independent", "optimal_transport"]


class ImageTimePredictor(ImageTraining):
    """Algorithm 3, second loop."""

    network: CNN


class FeatureClassifier(ImageTraining):
    """Not of the paper: the small classifier in whose features samples are compared when Inception is not to be had."""

    network: CNN


class ImagePhases(Section):
    velocity_field: ImageVelocityField
    straight_flow: ImageStraightFlow
    time_predictor: ImageTimePredictor
    feature_classifier: FeatureClassifier


class ImageEvaluation(Section):
    """How samples are judged: how many, how many at a time, against which split, the steps of the straight flow alone,
    hand-over times to try beside the predicted ones, how many samples are held against every training image, how many are
    kept for figures, and whether FID and IS are tried."""

    samples: PositiveInt
    batch_size: PositiveInt
    reference: Literal["train", "test"]
    euler_steps: list[PositiveInt] = Field(min_length=1)
    handover_times: list[Annotated[float, Field(ge=0, lt=1)]]
    nearest: PositiveInt
    pictures: PositiveInt
    inception: bool

    @model_validator(mode="after")
    def _can_be_told_apart(self):
        percents = [round(100 * time) for time in self.handover_times]
        if len(set(percents)) < len(percents):
            raise ValueError("hand-over times that differ by a percent or more: they are named by it")
        if self.inception and self.samples < INCEPTION_SPLITS:
            raise ValueError(f"at least {INCEPTION_SPLITS} samples for the splits of the Inception score")
        return self


class ImageConfig(RunConfig):
    data: ImageData
    sinkhorn: Sinkhorn
    phases: ImagePhases
    nsgf_plus_plus: PlusPlus
    evaluation: ImageEvaluation
