"""The training phases of NSGF++ (Algorithm 3, page 13), each with its own network, optimiser and data.

Phases 2 and 3 train on independent source and target points, never on the outputs of phase 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nsgf import data, geomloss_velocity, sinkhorn
from nsgf.config import (
    Config,
    Data,
    Network,
    Sinkhorn,
    StraightFlowPhase,
    TimePredictorPhase,
    Training,
    VelocityFieldPhase,
)
from nsgf.flow import Velocity, euler_flow
from nsgf.networks import TimeMLP, TimePredictorMLP
from repro.phases import Phase
from repro.pool import Pool
from repro.progress import progress
from repro.randomness import generator

DIMENSION = 2


def make_phases(config: Config, device: torch.device) -> list[Phase]:
    """The phases of an experiment in the order in which they run."""
    phases: list[Phase] = [
        VelocityField("velocity_field", config.phases.velocity_field, config.data, config.sinkhorn, device),
        StraightFlow("straight_flow", config.phases.straight_flow, config.data, device),
        TimePredictor("time_predictor", config.phases.time_predictor, config.data, device),
    ]
    if config.phases.velocity_field_100 is not None:
        phases.append(
            VelocityField("velocity_field_100", config.phases.velocity_field_100, config.data, config.sinkhorn, device)
        )
    if config.phases.ot_cfm is not None:
        phases.append(StraightFlow("ot_cfm", config.phases.ot_cfm, config.data, device))
    return phases


def make_velocity(config: Sinkhorn) -> Velocity:
    """The velocity of the Sinkhorn gradient flow (eq. 13, page 4) in the implementation that `config` names."""
    settings = {"blur": config.blur, "scaling": config.scaling}
    if config.implementation == "closed_form":
        return partial(sinkhorn.velocity, **settings)
    backend = config.implementation.removeprefix("geomloss_")
    return partial(geomloss_velocity.velocity, backend=backend, **settings)


class NSGFPhase(Phase):
    """What the phases share: Adam without weight decay (appendix E.2, page 14), data, device."""

    def __init__(self, name: str, config: Training, laws: Data, device: torch.device):
        self.name = name
        self.iterations = config.iterations
        self.config = config
        self.laws = laws
        self.device = device

    def make_model(self) -> nn.Module:
        return make_network(TimeMLP, self.config.network)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n independent source and n independent target points, both (n, d)."""
        x_0 = data.sample(self.laws.source, n, generator)
        y = data.sample(self.laws.target, n, generator)
        return x_0.to(self.device), y.to(self.device)


class VelocityField(NSGFPhase):
    """Phase 1: regression of v_theta on the velocities of a pool of minibatch Sinkhorn flows (Algorithm 1, page 5)."""

    def __init__(
        self, name: str, config: VelocityFieldPhase, laws: Data, sinkhorn_config: Sinkhorn, device: torch.device
    ):
        super().__init__(name, config, laws, device)
        self.velocity = make_velocity(sinkhorn_config)
        self.pool: Pool | None = None

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, nn.Module]) -> None:
        path = scratch / "pool.safetensors"
        try:
            self.pool = Pool.load(path)
        except ValueError:  # none yet, or a damaged one: the same seed builds the same pool
            self.pool = self.build_pool(seed)
            self.pool.save(path)

    def build_pool(self, seed: int) -> Pool:
        """The pairs (x_t, v_t) and times of every state of every minibatch, on the CPU."""
        size, flow = self.config.pool, self.config.flow
        capacity = size.batches * size.batch_size * flow.steps
        pool = Pool(capacity, {"x_t": (DIMENSION,), "v_t": (DIMENSION,), "t": ()})
        for batch in progress(range(size.batches), f"{self.name} pool"):
            x_0, y = self.draw(size.batch_size, generator(seed, self.name, "pool", batch))
            for state in euler_flow(x_0, y, self.velocity, steps=flow.steps, step_size=flow.step_size):
                pool.add(x_t=state.x_t, v_t=state.v_t, t=torch.full((size.batch_size,), state.t))
        return pool

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        batch = {
            name: column.to(self.device) for name, column in self.pool.sample(self.config.batch_size, generator).items()
        }
        return nn.functional.mse_loss(model(batch["x_t"], batch["t"]), batch["v_t"])

    def release(self) -> None:
        self.pool = None


class StraightFlow(NSGFPhase):
    """Phase 2: u_delta on straight lines between independent pairs, which is flow matching (FM) with sigma = 0.

    With `coupling: optimal_transport` the pairs of a minibatch are matched first: OT-CFM.
    """

    config: StraightFlowPhase

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        x_0, y = self.draw(self.config.batch_size, generator)
        if self.config.coupling == "optimal_transport":
            y = y[optimal_assignment(x_0, y)]
        t = draw_times(len(x_0), generator).to(self.device)
        x_t = interpolate(x_0, y, t)
        return nn.functional.mse_loss(model(x_t, t), y - x_0)


class TimePredictor(NSGFPhase):
    """Phase 3: t_phi regresses the time of a point between independent source and target points."""

    config: TimePredictorPhase

    def make_model(self) -> nn.Module:
        return make_network(TimePredictorMLP, self.config.network)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        x_0, y = self.draw(self.config.batch_size, generator)
        t = draw_times(len(x_0), generator).to(self.device)
        return nn.functional.mse_loss(model(interpolate(x_0, y, t)), t)


def make_network(kind: type[nn.Module], config: Network) -> nn.Module:
    return kind(DIMENSION, config.width, config.hidden_layers, config.activation)


def draw_times(n: int, generator: torch.Generator) -> Tensor:
    """n times, uniform on [0, 1)."""
    return torch.rand(n, generator=generator)


def interpolate(x_0: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """X_t = t Y + (1 - t) X_0 (Algorithm 3): x_0, y (n, d), t (n,)."""
    weight = t[:, None]
    return weight * y + (1 - weight) * x_0


def optimal_assignment(x_0: Tensor, y: Tensor) -> Tensor:
    """The permutation of y, (n,), that minimises the sum of squared distances to x_0: exact OT of equal uniform weights."""
    cost = torch.cdist(x_0, y).square()
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=y.device)
