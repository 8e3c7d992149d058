"""EM for a mixture of Gaussians (Dempster et al., 1977): training without gradients, networks or optimisers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

POINTS, COMPONENTS, LEAST_VARIANCE = 600, 3, 1e-6


@dataclass
class Mixture:
    share: Tensor  # (COMPONENTS,), sums to 1
    mean: Tensor  # (COMPONENTS, 2)
    covariance: Tensor  # (COMPONENTS, 2, 2)


class EM(Phase[Mixture]):
    name, steps = "em", 100
    counts = {"iterations": 1}

    def setup(self, earlier: Mapping[str, Networks]) -> Mixture:
        return first_guess()

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, Networks]) -> None:
        self.x = three_gaussians(POINTS, torch.Generator().manual_seed(0))

    def minibatch(self, step: int, draw: Draw) -> Batch:
        return {"x": self.x}

    def train_step(self, state: Mixture, batch: Batch, update: Update) -> None:
        x = batch["x"]  # whole and on the CPU: without gradients there is nothing to share out
        joint = log_joint(state, x)
        belongs = joint.softmax(1)
        count = belongs.sum(0)
        state.share = count / len(x)
        state.mean = belongs.T @ x / count[:, None]
        off = x[:, None] - state.mean
        state.covariance = torch.einsum("nk,nki,nkj->kij", belongs, off, off) / count[:, None, None]
        state.covariance += LEAST_VARIANCE * torch.eye(2)
        update.log("log-likelihood", joint.logsumexp(1).mean())

    def networks(self, state: Mixture) -> Mapping[str, nn.Module]:
        return {"density": Density(state)}


def log_joint(mixture: Mixture, x: Tensor) -> Tensor:
    """(n, COMPONENTS): the log of the density of each point together with each component."""
    normal = torch.distributions.MultivariateNormal(mixture.mean, mixture.covariance)
    log_density: Tensor = normal.log_prob(x[:, None])
    return mixture.share.log() + log_density


class Density(nn.Module):
    """What comes out: the log density of points (n, 2)."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        for name, value in vars(mixture).items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return log_joint(Mixture(**dict(self.named_buffers())), x).logsumexp(1)


def first_guess() -> Mixture:
    means = torch.randn(COMPONENTS, 2, dtype=torch.float64)
    return Mixture(
        torch.full((COMPONENTS,), 1 / COMPONENTS).double(), means, torch.eye(2).double().repeat(COMPONENTS, 1, 1)
    )


def three_gaussians(n: int, chance: torch.Generator) -> Tensor:
    """(n, 2), in float64."""
    angle = torch.randint(3, (n,), generator=chance) * (math.tau / 3)
    return 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.6 * torch.randn(n, 2, generator=chance).double()


def make_phase() -> EM:
    return EM()
