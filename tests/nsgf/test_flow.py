import math

import torch

from nsgf import sinkhorn
from nsgf.flow import end_of_flow, euler_flow


def toward(x, y):
    return y - x


def test_a_state_is_the_one_before_the_step_with_the_velocity_there():
    """dx/dt = y - x by hand: x_k = y + (x_0 - y) (1 - eta)^k."""
    x_0, y = torch.tensor([[8.0]]), torch.tensor([[0.0]])
    states = list(euler_flow(x_0, y, toward, steps=3, step_size=0.5))
    assert [float(state.x_t) for state in states] == [8.0, 4.0, 2.0]
    assert [float(state.v_t) for state in states] == [-8.0, -4.0, -2.0]
    assert [state.t for state in states] == [0.0, 1 / 3, 2 / 3]
    assert float(end_of_flow(x_0, y, toward, steps=3, step_size=0.5)) == 1.0


def test_the_particles_move_along_plus_v():
    x_0, y = torch.zeros(1, 2), torch.ones(1, 2)
    assert end_of_flow(x_0, y, toward, steps=1, step_size=0.1).mean() > 0


def test_the_source_points_are_not_written_to():
    x_0 = torch.zeros(2, 2)
    list(euler_flow(x_0, torch.ones(2, 2), toward, steps=3, step_size=0.5))
    assert torch.equal(x_0, torch.zeros(2, 2))


def test_euler_converges_with_order_one():
    """Halving the step halves the error against exp(-1); in the measured range the order is within 0.1 of one."""
    errors = []
    for steps in (20, 40, 80):
        end = end_of_flow(
            torch.ones(1, 1, dtype=torch.float64),
            torch.zeros(1, 1, dtype=torch.float64),
            toward,
            steps=steps,
            step_size=1 / steps,
        )
        errors.append(abs(float(end) - math.exp(-1)))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 1) < 0.1 for order in orders)


def test_the_sinkhorn_flow_brings_particles_to_the_targets():
    """After 10 steps of 0.5 a thousandth of the way is left; the targets are 10 apart, blur is far below that."""
    generator = torch.Generator().manual_seed(0)
    y = 10 * torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    x_0 = torch.randn(16, 2, generator=generator)
    end = end_of_flow(x_0, y, lambda x, y: sinkhorn.velocity(x, y, blur=0.25, scaling=0.95), steps=20, step_size=0.5)
    assert torch.cdist(end, y).amin(1).max() < 0.1 and torch.cdist(y, end).amin(1).max() < 0.1
