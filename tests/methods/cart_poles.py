"""The environment of PPO: poles that stand on carts, many at once (Barto, Sutton and Anderson, 1983)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LONGEST = 50
"""Steps after which an episode is cut off. The pole has not fallen then: what would have come still counts."""
GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
FARTHEST, STEEPEST = 2.4, 0.2095


class CartPoles:
    """`count` carts, on the CPU. `observation` (count, 4) is position, velocity, angle and its velocity."""

    def __init__(self, count: int):
        self.observation = torch.empty(count, 4).uniform_(-0.05, 0.05)
        self.age = torch.zeros(count, 1, dtype=torch.int64)

    def state_dict(self) -> dict[str, Tensor]:
        return {"observation": self.observation, "age": self.age}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        self.observation, self.age = saved["observation"], saved["age"]

    def step(self, push_right: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pushes each cart (count, 1) to the left (0) or right (1). An ended episode gives way to the next.

        Returns the observation after the push (count, 4), an ended episode's last one, and for each cart (count, 1) the
        reward, whether its pole fell, and whether its episode ended.
        """
        _, velocity, angle, spin = self.observation.split(1, dim=1)
        force = FORCE * (2 * push_right - 1)
        mass, sine, cosine = CART_MASS + POLE_MASS, angle.sin(), angle.cos()
        thrust = (force + POLE_MASS * HALF_LENGTH * spin.square() * sine) / mass
        turn = (GRAVITY * sine - cosine * thrust) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cosine.square() / mass))
        speed_up = thrust - POLE_MASS * HALF_LENGTH * turn * cosine / mass
        change = torch.cat([velocity, speed_up, spin, turn], dim=1)
        after, age = self.observation + SECONDS * change, self.age + 1

        fell = (after[:, 0:1].abs() > FARTHEST) | (after[:, 2:3].abs() > STEEPEST)
        ended = fell | (age >= LONGEST)
        begun = torch.rand(after.shape, generator=chance) * 0.1 - 0.05
        self.observation = torch.where(ended, begun, after)
        self.age = torch.where(ended, 0, age)
        return after, torch.ones_like(angle), fell, ended
