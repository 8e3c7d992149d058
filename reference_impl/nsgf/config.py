"""The typed configuration of an NSGF / NSGF++ experiment. The values stand in configs/*.yaml, the reasons in spec.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from nsgf.data import LAWS
from repro.config import RunConfig, Section

Law = Literal[LAWS]


class Data(Section):
    """mu_0 and mu*: the laws that source and target points are drawn from."""

    source: Law
    target: Law


class Sinkhorn(Section):
    """How the velocity of the Sinkhorn gradient flow is computed: eps = blur**2, annealed by scaling."""

    implementation: Literal["closed_form", "geomloss_tensorized", "geomloss_online"]
    blur: PositiveFloat
    scaling: float = Field(gt=0, lt=1)


class Network(Section):
    """A multilayer perceptron."""

    width: PositiveInt
    hidden_layers: PositiveInt
    activation: Literal["selu", "silu", "relu"]


class Training(Section):
    """What every phase has."""

    iterations: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    network: Network


class Flow(Section):
    """The Euler scheme of the particles: T steps of size eta."""

    steps: PositiveInt
    step_size: PositiveFloat


class PoolSize(Section):
    """The trajectory pool: independent minibatches of n source and n target points, each followed for T steps."""

    batches: PositiveInt
    batch_size: PositiveInt


class VelocityFieldPhase(Training):
    """Algorithm 1."""

    flow: Flow
    pool: PoolSize


class StraightFlowPhase(Training):
    """Algorithm 3, third loop; with the optimal-transport coupling it is OT-CFM."""

    coupling: Literal["independent", "optimal_transport"]


class TimePredictorPhase(Training):
    """Algorithm 3, second loop."""


class Phases(Section):
    """Phases 1 to 3 are NSGF++; the last two serve Table 1 and may be null."""

    velocity_field: VelocityFieldPhase
    straight_flow: StraightFlowPhase
    time_predictor: TimePredictorPhase
    velocity_field_100: VelocityFieldPhase | None
    ot_cfm: StraightFlowPhase | None


class PlusPlus(Section):
    """Algorithm 4: Sinkhorn-flow steps before the hand-over, and omega, the step size of the straight flow after it."""

    sinkhorn_steps: PositiveInt
    straight_flow_step: float = Field(gt=0, le=1)


class EvaluationProtocol(Section):
    """How samples are judged. `euler_steps` are the numbers of steps at which the baselines are sampled."""

    test_points: PositiveInt
    euler_steps: list[PositiveInt]
    floor_draws: PositiveInt
    sinkhorn_blur: PositiveFloat
    sinkhorn_scaling: float = Field(gt=0, lt=1)
    path_points: NonNegativeInt


class Config(RunConfig):
    data: Data
    sinkhorn: Sinkhorn
    phases: Phases
    nsgf_plus_plus: PlusPlus
    evaluation: EvaluationProtocol
