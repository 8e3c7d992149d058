import math

import pytest
import torch
from torch import nn

from nsgf import sample


class Field(nn.Module):
    """A velocity field given as a function, which remembers the times and sizes of its calls."""

    def __init__(self, function):
        super().__init__()
        self.function, self.times, self.sizes = function, [], []

    def forward(self, x, t):
        assert t.shape == x.shape[:1]
        self.times.append(t.clone())
        self.sizes.append(len(x))
        return self.function(x, t)


def test_algorithm_2_visits_the_times_of_the_pool():
    field = Field(lambda x, t: torch.zeros_like(x))
    path = sample.sinkhorn_flow(field, torch.zeros(3, 2), steps=4, horizon=2.0)
    assert path.shape == (5, 3, 2)
    assert [times.unique().tolist() for times in field.times] == [[0.0], [0.25], [0.5], [0.75]]


def test_algorithm_2_steps_by_the_horizon_over_the_steps():
    path = sample.sinkhorn_flow(Field(lambda x, t: torch.ones_like(x)), torch.zeros(1, 1), steps=4, horizon=2.0)
    assert path.flatten().tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_the_straight_flow_reaches_time_one():
    path = sample.straight_flow(Field(lambda x, t: torch.full_like(x, 3.0)), torch.zeros(1, 1), steps=7)
    assert float(path[-1]) == pytest.approx(3.0, rel=1e-6)


def test_sampling_converges_with_order_one():
    """dx/dt = x t from 1 ends at exp(1/2); the measured order is within 0.1 of one."""
    field = Field(lambda x, t: x * t[:, None])
    errors = [
        abs(float(sample.straight_flow(field, torch.ones(1, 1, dtype=torch.float64), steps=n)[-1]) - math.exp(0.5))
        for n in (40, 80, 160)
    ]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 1) < 0.1 for order in orders)


@pytest.mark.parametrize("shape", [(1,), (1, 8, 8), (3, 4, 4)])
def test_every_sample_goes_on_from_its_own_time_to_one(shape):
    """Under velocity 1 a sample moves by exactly the time that is left to it, in every pixel."""
    t = torch.tensor([0.0, 0.35, 0.999, 1.0])
    x, steps = sample.refine(Field(lambda x, t: torch.ones_like(x)), torch.zeros(4, *shape), t, step_size=0.25)
    assert x.shape == (4, *shape)
    assert torch.allclose(x.flatten(1), (1 - t)[:, None], atol=1e-6)
    assert steps.tolist() == [4, 3, 1, 0]


def test_a_step_is_as_long_as_its_velocity():
    x, _ = sample.refine(
        Field(lambda x, t: torch.full_like(x, 3.0)), torch.zeros(1, 1), torch.tensor([0.5]), step_size=0.25
    )
    assert x.item() == pytest.approx(1.5)


def test_the_network_sees_only_samples_that_still_move():
    field = Field(lambda x, t: torch.ones_like(x))
    sample.refine(field, torch.zeros(4, 1), torch.tensor([0.0, 0.35, 0.999, 1.0]), step_size=0.25)
    assert field.sizes == [3, 2, 2, 1]


def test_times_after_the_hand_over_start_at_the_predicted_one():
    field = Field(lambda x, t: torch.ones_like(x))
    sample.refine(field, torch.zeros(1, 1), torch.tensor([0.4]), step_size=0.2)
    assert torch.cat(field.times).tolist() == pytest.approx([0.4, 0.6, 0.8], abs=1e-6)


def test_refine_leaves_its_input_alone():
    x = torch.zeros(2, 1)
    sample.refine(Field(lambda x, t: torch.ones_like(x)), x, torch.zeros(2), step_size=0.5)
    assert torch.equal(x, torch.zeros(2, 1))


def test_algorithm_4_runs_its_three_networks_in_turn_and_counts_their_calls():
    velocity_field = Field(lambda x, t: torch.full_like(x, 2.0))
    straight = Field(lambda x, t: torch.ones_like(x))
    predictor_inputs = []

    def time_predictor(x):
        predictor_inputs.append(x.clone())
        return torch.tensor([0.5, 0.8])

    result = sample.nsgf_plus_plus(
        velocity_field,
        straight,
        time_predictor,
        torch.zeros(2, 1),
        flow_steps=10,
        sinkhorn_steps=3,
        step_size=0.5,
        straight_flow_step=0.1,
    )
    assert [float(times[0]) for times in velocity_field.times] == pytest.approx([0.0, 0.1, 0.2])
    assert predictor_inputs[0].tolist() == [[3.0], [3.0]] and torch.equal(result.x_handover, predictor_inputs[0])
    assert result.x[:, 0].tolist() == pytest.approx([3.5, 3.2])
    assert result.t_handover.tolist() == pytest.approx([0.5, 0.8])
    # One predictor call. How many straight-flow steps there are is counted: (1 - 0.8) / 0.1 in float32 may round up.
    steps = [sum(size >= 2 - sample_ for size in straight.sizes) for sample_ in (1, 0)]
    assert result.nfe.tolist() == [len(velocity_field.times) + 1 + taken for taken in steps]


def test_the_end_of_the_straight_flow_is_the_last_point_of_its_path():
    x_0 = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    model = lambda x, t: x * t[:, None, None, None] + 1  # noqa: E731
    path = sample.straight_flow(model, x_0, steps=5)
    assert path.shape == (6, 4, 1, 3, 3) and torch.equal(path[0], x_0)
    assert torch.equal(sample.end_of_straight_flow(model, x_0, steps=5), path[-1])
