"""PPO (Schulman et al., 2017, Algorithm 1) on carts with poles: a round is a rollout and a few epochs over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from methods.cart_poles import CartPoles
from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

CARTS, HORIZON, EPOCHS, BATCH = 16, 32, 3, 128
DISCOUNT, LAMBDA, CLIP, VALUE, ENTROPY, NORM = 0.99, 0.95, 0.2, 0.5, 0.01, 0.5


@dataclass
class Agent:
    actor: nn.Module
    critic: nn.Module
    adam: torch.optim.Adam
    environment: CartPoles


class PPO(Phase[Agent]):
    name, steps = "ppo", 600
    collect_every = EPOCHS * CARTS * HORIZON // BATCH
    counts = {"environment steps": Fraction(BATCH, EPOCHS)}

    def setup(self, earlier: Mapping[str, Networks]) -> Agent:
        actor, critic, environment = make_network(2), make_network(1), CartPoles(CARTS)
        return Agent(actor, critic, make_adam(actor, critic), environment)

    @torch.no_grad()
    def collect(self, state: Agent, update: Update) -> Batch:
        """HORIZON steps in each environment, which go on where the last round left them."""
        device, chance, rollout = next(state.actor.parameters()).device, update.generator("rollout"), []
        for _ in range(HORIZON):
            seen = state.environment.observation
            log_policy = state.actor(seen.to(device)).log_softmax(1).cpu()
            action = update.broadcast(torch.multinomial(log_policy.exp(), 1, generator=chance))  # decided once
            after, reward, fell, ended = state.environment.step(action, chance)
            rollout.append((seen, action, log_policy.gather(1, action), after, reward, fell, ended))
        seen, action, log_probability, after, reward, fell, ended = map(torch.stack, zip(*rollout, strict=True))
        value, value_after = (state.critic(x.to(device)).cpu() for x in (seen, after))
        advantage = advantages(reward + DISCOUNT * value_after * ~fell - value, ended)
        update.log("steps for each fall", fell.numel() / max(int(fell.sum()), 1))
        columns = {"seen": seen, "action": action, "log_probability": log_probability}
        columns |= {"advantage": advantage, "return": advantage + value}
        return {name: column.flatten(0, 1) for name, column in columns.items()}

    def minibatch(self, step: int, draw: Draw) -> Batch:
        rows = draw.round_rows(BATCH, last="drop")
        batch = {name: column[rows] for name, column in draw.collected.items()}
        advantage = batch["advantage"]
        return batch | {"advantage": (advantage - advantage.mean()) / (advantage.std() + 1e-8)}

    def train_step(self, state: Agent, batch: Batch, update: Update) -> None:
        for part in update.parts(batch):
            log_policy, advantage = state.actor(part["seen"]).log_softmax(1), part["advantage"]
            ratio = (log_policy.gather(1, part["action"]) - part["log_probability"]).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
            error = (state.critic(part["seen"]) - part["return"]).square().mean()
            entropy = -(log_policy.exp() * log_policy).sum(1).mean()
            update.backward(-gain + VALUE * error - ENTROPY * entropy)
        update.log("loss", update.step(state.adam, clip=NORM))

    def networks(self, state: Agent) -> Mapping[str, nn.Module]:
        return {"actor": state.actor}


def advantages(errors: Tensor, ended: Tensor) -> Tensor:
    """Generalised advantage estimates from the errors of the values, both (HORIZON, CARTS, 1), within each episode."""
    estimate, later = torch.empty_like(errors), torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        later = errors[t] + DISCOUNT * LAMBDA * later * ~ended[t]
        estimate[t] = later
    return estimate


def make_network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def make_adam(actor: nn.Module, critic: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)


def make_phase() -> PPO:
    return PPO()
