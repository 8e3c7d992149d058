"""WGAN-GP without an engine."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.plain.given import Curves, begin, minibatch, tensors
from methods.wgan_gp import N_CRITIC, NOISE, PENALTY, make_adam, make_average, make_network, make_phase


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    generator = make_network(NOISE, 2)
    critic = make_network(2, 1)
    generator_optimiser = make_adam(generator)
    critic_optimiser = make_adam(critic)
    ema = make_average(generator)
    curves: Curves = {"generator": [], "critic": []}

    for step in range(steps):
        batch = minibatch(phase, seed, step)

        for t in range(N_CRITIC):
            x = batch["real"][:, t]
            epsilon = batch["mix"][:, t]
            with torch.no_grad():
                x_fake = generator(batch["noise"][:, t])
            x_hat = epsilon * x + (1 - epsilon) * x_fake
            x_hat.requires_grad_(True)
            gradient = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)[0]
            penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
            critic_loss = critic(x_fake).mean() - critic(x).mean() + PENALTY * penalty
            critic_optimiser.zero_grad()
            critic_loss.backward()
            critic_optimiser.step()

        # The critic's gradients that this makes are cleared before its next step.
        generator_loss = -critic(generator(batch["noise"][:, N_CRITIC])).mean()
        generator_optimiser.zero_grad()
        generator_loss.backward()
        generator_optimiser.step()
        ema.update_parameters(generator)

        curves["generator"].append((step + 1, generator_loss.item()))
        curves["critic"].append((step + 1, critic_loss.item()))

    return tensors(generator=generator, critic=critic, average=ema), curves
