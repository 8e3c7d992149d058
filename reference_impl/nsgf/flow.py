"""The Sinkhorn gradient flow of a minibatch of particles, by explicit Euler steps (Algorithm 1, page 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(particles x (n, d), targets y (m, d)) -> velocity of each particle (n, d)."""


@dataclass(frozen=True)
class FlowState:
    """The particles before step k, their velocity *there*, and the step's time k / T."""

    x_t: Tensor
    v_t: Tensor
    t: float


def euler_flow(x_0: Tensor, y: Tensor, velocity: Velocity, *, steps: int, step_size: float) -> Iterator[FlowState]:
    """The states k = 0 .. steps - 1 of x <- x + step_size * velocity(x, y), with y fixed for the whole trajectory.

    x_0 (n, d) and y (m, d) on one device. Algorithm 1 writes "t = 0, 1, ... T", which would be T + 1 updates;
    inference with T steps visits the T states yielded here.
    """
    x_t = x_0
    for k in range(steps):
        v_t = velocity(x_t, y)
        yield FlowState(x_t, v_t, k / steps)
        x_t = x_t + step_size * v_t


def end_of_flow(x_0: Tensor, y: Tensor, velocity: Velocity, *, steps: int, step_size: float) -> Tensor:
    """Where the particles are after the last step, (n, d)."""
    last = x_0
    for state in euler_flow(x_0, y, velocity, steps=steps, step_size=step_size):
        last = state.x_t + step_size * state.v_t
    return last
