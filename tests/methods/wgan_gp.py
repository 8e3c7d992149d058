"""WGAN-GP (Gulrajani et al., 2017, Algorithm 1): two players with an Adam each, on eight Gaussians in the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

POINTS, BATCH, NOISE, N_CRITIC, PENALTY, EMA_DECAY = 2048, 64, 4, 5, 0.1, 0.99


@dataclass
class Players:
    generator: nn.Module
    critic: nn.Module
    generator_adam: torch.optim.Adam
    critic_adam: torch.optim.Adam
    average: AveragedModel


class WGAN(Phase[Players]):
    name, steps = "wgan", 2000
    counts = {"generator iterations": 1, "epochs": Fraction(N_CRITIC * BATCH, POINTS)}

    def setup(self, earlier: Mapping[str, Networks]) -> Players:
        generator, critic = make_network(NOISE, 2), make_network(2, 1)
        return Players(generator, critic, make_adam(generator), make_adam(critic), make_average(generator))

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, Networks]) -> None:
        self.points = eight_gaussians(POINTS, torch.Generator().manual_seed(0))

    def minibatch(self, step: int, draw: Draw) -> Batch:
        """Other points and noise for each update of the critic; the last noise is for the generator's."""
        rows = draw.epoch_rows(POINTS, BATCH * N_CRITIC, last="drop")
        return {
            "real": self.points[rows].reshape(BATCH, N_CRITIC, 2),
            "noise": torch.randn(BATCH, N_CRITIC + 1, NOISE, generator=draw),
            "mix": torch.rand(BATCH, N_CRITIC, 1, generator=draw),
        }

    def train_step(self, state: Players, batch: Batch, update: Update) -> None:
        for t in range(N_CRITIC):
            for part in update.parts(batch):
                fake = state.generator(part["noise"][:, t]).detach()
                update.backward(critic_loss(state.critic, part["real"][:, t], fake, part["mix"][:, t]))
            critic_mean = update.step(state.critic_adam)
        for part in update.parts(batch):
            fake = state.generator(part["noise"][:, -1])
            update.backward(-state.critic(fake).mean(), inputs=state.generator)
        update.log("generator", update.step(state.generator_adam))
        update.log("critic", critic_mean)
        state.average.update_parameters(state.generator)

    def networks(self, state: Players) -> Mapping[str, nn.Module]:
        return {"generator": state.average.module}


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Equation 3: the distance that the critic sees, negated, and the penalty on slopes other than 1 on the way."""
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    loss: Tensor = critic(fake).mean() - critic(real).mean() + PENALTY * penalty
    return loss


def make_network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def make_adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9))


def make_average(network: nn.Module) -> AveragedModel:
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))


def eight_gaussians(n: int, chance: torch.Generator) -> Tensor:
    """(n, 2), around the corners of an octagon of radius 1."""
    angle = torch.randint(8, (n,), generator=chance) * (math.tau / 8)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(n, 2, generator=chance)


def make_phase() -> WGAN:
    return WGAN()
