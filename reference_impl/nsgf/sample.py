"""Inference: Algorithm 2 (page 5) and Algorithm 4 (page 14)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PlusPlusSamples:
    """NSGF++ samples x (n, ...), the points and predicted times at the hand-over, and each sample's network evaluations."""

    x: Tensor
    x_handover: Tensor
    t_handover: Tensor
    nfe: Tensor


def sinkhorn_flow(model: nn.Module, x_0: Tensor, *, steps: int, horizon: float) -> Tensor:
    """Algorithm 2 with v_theta: the path (steps + 1, n, ...) of `steps` Euler steps over the flow time `horizon` = T * eta.

    With as many steps as the pool had, the step size is the pool's eta.
    """
    return _euler(model, x_0, steps=steps, step_size=horizon / steps)


def straight_flow(model: nn.Module, x_0: Tensor, *, steps: int) -> Tensor:
    """u_delta from t = 0 to 1: the path (steps + 1, n, ...) of uniform Euler steps."""
    return _euler(model, x_0, steps=steps, step_size=1.0 / steps)


def end_of_straight_flow(model: nn.Module, x_0: Tensor, *, steps: int) -> Tensor:
    """The last point of that path, (n, ...), without holding the others: a hundred states of images fill a GPU."""
    last = x_0
    for state in _euler_states(model, x_0, steps=steps, step_size=1.0 / steps):
        last = state
    return last


def _euler(model: nn.Module, x_0: Tensor, *, steps: int, step_size: float) -> Tensor:
    return torch.stack([x_0, *_euler_states(model, x_0, steps=steps, step_size=step_size)])


def _euler_states(model: nn.Module, x_0: Tensor, *, steps: int, step_size: float) -> Iterator[Tensor]:
    x = x_0
    for k in range(steps):
        x = x + step_size * model(x, x_0.new_full((len(x_0),), k / steps))
        yield x


def refine(model: nn.Module, x: Tensor, t: Tensor, *, step_size: float) -> tuple[Tensor, Tensor]:
    """u_delta from each sample's own time t (n,) to 1: the samples (n, ...) and the steps each took (n,).

    Algorithm 4 takes (1 - t) / omega steps and does not say how to round: here the number is rounded up and the
    steps of a sample are equal, so each ends at time 1 exactly.
    """
    steps = torch.ceil((1 - t) / step_size).long()
    size = (1 - t) / steps.clamp(min=1)
    x = x.clone()
    for k in range(int(steps.max())):
        refine_step(model, x, t, size, k, moving=steps > k)
    return x, steps


def refine_step(model: nn.Module, x: Tensor, t: Tensor, size: Tensor, k: int, *, moving: Tensor) -> None:
    """Step k of `refine`, in place, of the samples that `moving` names, by a mask or by their numbers."""
    t_k = t[moving] + k * size[moving]
    weight = size[moving].view(-1, *[1] * (x.ndim - 1))
    x[moving] += weight * model(x[moving], t_k)


def nsgf_plus_plus(
    velocity_field: nn.Module,
    straight_flow: nn.Module,
    time_predictor: nn.Module,
    x_0: Tensor,
    *,
    flow_steps: int,
    sinkhorn_steps: int,
    step_size: float,
    straight_flow_step: float,
) -> PlusPlusSamples:
    """Algorithm 4: `sinkhorn_steps` <= `flow_steps` = T steps of v_theta, the predicted time, then u_delta to time 1.

    The network evaluations count the Sinkhorn-flow steps, the one predictor call and the straight-flow steps.
    """
    x = x_0
    for k in range(sinkhorn_steps):
        x = x + step_size * velocity_field(x, x.new_full((len(x),), k / flow_steps))
    t = time_predictor(x)
    refined, steps = refine(straight_flow, x, t, step_size=straight_flow_step)
    return PlusPlusSamples(refined, x, t, sinkhorn_steps + 1 + steps)
