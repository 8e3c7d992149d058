"""PPO without an engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.cart_poles import CartPoles
from methods.plain.given import Curves, begin, chance, minibatch, tensors
from methods.ppo import (
    CARTS,
    CLIP,
    DISCOUNT,
    ENTROPY,
    HORIZON,
    LAMBDA,
    NORM,
    VALUE,
    make_adam,
    make_network,
    make_phase,
)


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    actor = make_network(2)
    critic = make_network(1)
    environment = CartPoles(CARTS)
    optimiser = make_adam(actor, critic)
    curves: Curves = {"steps for each fall": [], "loss": []}
    rollout: dict[str, Tensor] = {}

    for step in range(steps):
        if step % phase.collect_every == 0:
            rollout, falls = roll_out(actor, critic, environment, chance(phase, seed, step, "rollout"))
            curves["steps for each fall"].append((step + 1, CARTS * HORIZON / max(falls, 1)))
        batch = minibatch(phase, seed, step, rollout)

        log_policy = torch.log_softmax(actor(batch["seen"]), dim=1)
        new = log_policy[torch.arange(len(log_policy)), batch["action"][:, 0]].unsqueeze(1)
        entropy = -(log_policy.exp() * log_policy).sum(dim=1).mean()
        ratio = torch.exp(new - batch["log_probability"])
        unclipped = ratio * batch["advantage"]
        clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP) * batch["advantage"]
        policy_loss = -torch.min(unclipped, clipped).mean()
        value_loss = ((critic(batch["seen"]) - batch["return"]) ** 2).mean()
        loss = policy_loss + VALUE * value_loss - ENTROPY * entropy

        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], NORM)
        optimiser.step()
        curves["loss"].append((step + 1, loss.item()))

    return tensors(actor=actor, critic=critic) | {
        f"environment.{k}": v for k, v in environment.state_dict().items()
    }, curves


@torch.no_grad()
def roll_out(
    actor: nn.Module, critic: nn.Module, environment: CartPoles, generator: torch.Generator
) -> tuple[dict[str, Tensor], int]:
    """The rows of one rollout, and how many poles fell in it."""
    seen: list[Tensor] = []
    action: list[Tensor] = []
    log_probability: list[Tensor] = []
    after: list[Tensor] = []
    reward: list[Tensor] = []
    fell: list[Tensor] = []
    ended: list[Tensor] = []
    for _ in range(HORIZON):
        observation = environment.observation
        log_policy = torch.log_softmax(actor(observation), dim=1)
        chosen = torch.multinomial(log_policy.exp(), 1, generator=generator)
        seen.append(observation)
        action.append(chosen)
        log_probability.append(log_policy[torch.arange(CARTS), chosen[:, 0]].unsqueeze(1))
        for results, result in zip((after, reward, fell, ended), environment.step(chosen, generator), strict=True):
            results.append(result)

    values = critic(torch.stack(seen))
    next_values = critic(torch.stack(after))
    advantage = [torch.zeros(CARTS, 1)] * HORIZON
    running = torch.zeros(CARTS, 1)
    for t in range(HORIZON - 1, -1, -1):
        delta = reward[t] + DISCOUNT * next_values[t] * (1 - fell[t].float()) - values[t]
        running = delta + DISCOUNT * LAMBDA * running * (1 - ended[t].float())
        advantage[t] = running
    rows = {
        "seen": torch.cat(seen),
        "action": torch.cat(action),
        "log_probability": torch.cat(log_probability),
        "advantage": torch.cat(advantage),
        "return": torch.cat(advantage) + values.flatten(0, 1),
    }
    return rows, int(torch.stack(fell).sum())
