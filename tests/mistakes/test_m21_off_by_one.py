"""m21: loops over t = 0 .. T that are off by one.

T steps are T updates, T stored states and T evaluations of the network; they end at the right time, what is reported as the number of
evaluations is the number of calls, and a draw of T indices gives 0 .. T - 1.
"""

import random
from functools import partial

import pytest
import torch
from pools import pool_of
from proof import Proof
from torch import nn

from nsgf import phases, sample
from nsgf.flow import FlowState
from nsgf.images import ImageSet
from nsgf.laws import Laws
from repro.config import load
from repro.runtime import Runtime
from repro_tools.minibatch import draw

STEPS, STEP_SIZE = 3, 0.25


class FromZeroToOne(Laws):
    """With velocity 1 the place of a particle is the time that it has moved for."""

    shape = (2,)

    def draw(self, n, generator):
        return torch.zeros(n, 2), torch.ones(n, 2)


def check_pool(project):
    settings = [
        f"phases.*.flow={{steps: {STEPS}, step_size: {STEP_SIZE}}}",
        "phases.*.pool={batches: 2, batch_size: 4}",
    ]
    config, _ = load(project.config_class("2d-moons"), project.experiments()["2d-moons"], settings)
    phase = phases.make_phases(config, Runtime(torch.device("cpu")))[0]
    calls = []
    phase.laws, phase.velocity = FromZeroToOne(), lambda x, y: calls.append(x) or y
    states = list(phase.trajectory(0))
    assert len(calls) == len(states) == STEPS, f"{STEPS} steps are {len(calls)} updates and {len(states)} stored states"
    found = [[float(rows["x_t"][0, 0]), float(rows["t"][0])] for rows in states]
    expected = [[k * STEP_SIZE, k / STEPS] for k in range(STEPS)]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected)), (
        f"stored are (place, time) {[(round(x, 2), round(t, 2)) for x, t in found]}, expected {expected}"
    )
    assert len(pool_of(phase, 0)["t"]) == 2 * 4 * STEPS


class Field(nn.Module):
    """Velocity 1 at every place and time. Counts its calls, and the samples in them."""

    def __init__(self):
        super().__init__()
        self.calls = self.samples = 0

    def forward(self, x, t):
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        return torch.ones_like(x)


def check_sampling():
    x_0 = torch.zeros(1, 2)
    for name, sampler, end in (
        ("sinkhorn_flow", partial(sample.sinkhorn_flow, horizon=STEPS * STEP_SIZE), STEPS * STEP_SIZE),
        ("straight_flow", sample.straight_flow, 1.0),
        ("end_of_straight_flow", lambda *rest, **named: sample.end_of_straight_flow(*rest, **named)[None], 1.0),
    ):
        field = Field()
        x = sampler(field, x_0, steps=STEPS)[-1]
        assert field.calls == STEPS, f"{name}: the network is called {field.calls} times for {STEPS} steps"
        check_end(name, x, torch.tensor([end]))


def check_plus_plus():
    """Three steps of five, then as many of the straight flow as each sample needs."""
    field, straight = Field(), Field()
    t = torch.tensor([0.0, 0.35, 0.5, 0.999, 1.0])
    made = sample.nsgf_plus_plus(
        field, straight, lambda x: t, torch.zeros(5, 2),
        flow_steps=5, sinkhorn_steps=STEPS, step_size=STEP_SIZE, straight_flow_step=0.25,
    )  # fmt: skip
    assert field.calls == STEPS, f"Algorithm 4 calls the velocity field {field.calls} times for {STEPS} steps"
    counted, reported = field.samples + len(t) + straight.samples, int(made.nfe.sum())
    assert reported == counted, f"Algorithm 4 reports {reported} evaluations, counted are {counted}"
    check_end("Algorithm 4", made.x, STEPS * STEP_SIZE + 1 - t)


def check_end(name, x, expected):
    moved = x[:, 0]
    assert torch.allclose(moved, expected, atol=1e-6), (
        f"{name}: moved for {[round(float(time), 3) for time in moved]}, expected {[round(float(time), 3) for time in expected]}"
    )


def check_draws(project):
    """Of five stored rows each is drawn, and no sixth."""
    numbers, stream = torch.arange(5), torch.Generator().manual_seed(0)
    config, _ = load(project.config_class("2d-moons"), project.experiments()["2d-moons"], ["phases.*.batch_size=200"])
    phase = phases.make_phases(config, Runtime(torch.device("cpu")))[0]
    images = ImageSet(numbers.to(torch.uint8).view(5, 1, 1, 1), numbers, white=16)
    for name, drawn_by in (
        ("pool", lambda: draw(phase, 0, 0, {"t": numbers})["t"]),
        ("images", lambda: images.draw(200, stream, False)[1]),
    ):
        try:
            drawn = drawn_by()
        except IndexError as error:
            raise AssertionError(f"{name}: a row is drawn that is not there: {error}") from error
        missed = sorted(set(range(5)) - set(drawn.long().tolist()))
        assert not missed, f"{name}: row {missed} of 5 is never drawn"


def _flow(first_to_last, time=lambda k, steps: k / steps, after=False):
    """`euler_flow` with other numbers k, and with the state after the update in place of the one before it."""

    def euler_flow(x_0, y, velocity, *, steps, step_size):
        x_t = x_0
        for k in first_to_last(steps):
            v_t, before = velocity(x_t, y), x_t
            x_t = x_t + step_size * v_t
            yield FlowState(x_t if after else before, v_t, time(k, steps))

    return lambda monkeypatch: monkeypatch.setattr(phases, "euler_flow", euler_flow)


def zero_to_T(monkeypatch):
    """As Algorithm 1 is written."""
    _flow(lambda steps: range(steps + 1))(monkeypatch)


def one_to_T_minus_one(monkeypatch):
    _flow(lambda steps: range(1, steps))(monkeypatch)


def state_after_the_update(monkeypatch):
    """As in the authors' 2-D code: (X^{t+1}, v^t)."""
    _flow(range, after=True)(monkeypatch)


def one_to_T(monkeypatch):
    _flow(lambda steps: range(1, steps + 1), time=lambda k, steps: (k - 1) / steps)(monkeypatch)


def last_state_computed_and_dropped(monkeypatch):
    """T + 1 states, of which T have a velocity."""

    def euler_flow(x_0, y, velocity, *, steps, step_size):
        states, velocities = [x_0], []
        for _ in range(steps):
            velocities.append(velocity(states[-1], y))
            states.append(states[-1] + step_size * velocities[-1])
        return (FlowState(x, v, k / steps) for k, (x, v) in enumerate(zip(states, velocities, strict=False)))

    monkeypatch.setattr(phases, "euler_flow", euler_flow)


def _euler(times_of):
    """The sampler over a grid of times."""

    def states(model, x_0, *, steps, step_size):
        x, grid = x_0, times_of(steps)
        for now, then in zip(grid, grid[1:], strict=False):
            x = x + (then - now) * steps * step_size * model(x, now.expand(len(x)))
            yield x

    return lambda monkeypatch: monkeypatch.setattr(sample, "_euler_states", states)


def one_step_more(monkeypatch):
    _euler(lambda steps: torch.arange(steps + 2) / steps)(monkeypatch)


def grid_of_T_points(monkeypatch):
    """As in the authors' samplers: linspace(0, time, T), which has T - 1 gaps. It ends at the right time."""
    _euler(lambda steps: torch.linspace(0, 1, steps))(monkeypatch)


def grid_of_T_plus_one_points(monkeypatch):
    _euler(lambda steps: torch.linspace(0, 1, steps + 1))(monkeypatch)


def _algorithm_4(change):
    real = sample.nsgf_plus_plus
    return lambda monkeypatch: monkeypatch.setattr(
        sample, "nsgf_plus_plus", lambda *all, **rest: change(real, all, rest)
    )


def one_sinkhorn_step_more(monkeypatch):
    _algorithm_4(lambda real, all, rest: real(*all, **rest | {"sinkhorn_steps": rest["sinkhorn_steps"] + 1}))(
        monkeypatch
    )


def predictor_not_counted(monkeypatch):
    def change(real, all, rest):
        made = real(*all, **rest)
        return sample.PlusPlusSamples(made.x, made.x_handover, made.t_handover, made.nfe - 1)

    _algorithm_4(change)(monkeypatch)


def steps_of_full_size(monkeypatch):
    """The number of steps is rounded up, and none is made shorter for it."""
    real = sample.refine_step
    monkeypatch.setattr(
        sample,
        "refine_step",
        lambda model, x, t, size, k, *, moving: real(model, x, t, torch.full_like(size, 0.25), k, moving=moving),
    )


def rounded_to_the_nearest_number(monkeypatch):
    """At least one step where any time is left; of equal size, so that they end at 1."""

    def refine(model, x, t, *, step_size):
        steps = ((1 - t) / step_size).round().long().clamp(min=1) * (t < 1)
        size, x = (1 - t) / steps.clamp(min=1), x.clone()
        for k in range(int(steps.max())):
            sample.refine_step(model, x, t, size, k, moving=steps > k)
        return x, steps

    monkeypatch.setattr(sample, "refine", refine)


def _draws(change):
    real = torch.randint

    def randint(high, size, *, generator):
        return change(real, high, size, generator)

    return lambda monkeypatch: monkeypatch.setattr(torch, "randint", randint)


def last_index_included(monkeypatch):
    """As random.randint(0, T) means it."""
    _draws(lambda real, high, size, generator: real(high + 1, size, generator=generator))(monkeypatch)


def last_row_never(monkeypatch):
    _draws(lambda real, high, size, generator: real(high - 1, size, generator=generator))(monkeypatch)


def share_of_the_rows(monkeypatch):
    """A uniform number below 1 times the number of rows, rounded down."""
    _draws(lambda real, high, size, generator: (torch.rand(size, generator=generator) * high).long())(monkeypatch)


PROOFS = [
    Proof(
        check_pool,
        plant={
            zero_to_T: "3 steps are 4 updates and 4 stored states",
            one_to_T_minus_one: "3 steps are 2 updates and 2 stored states",
            state_after_the_update: "stored are (place, time) [(0.25, 0.0), (0.5, 0.33), (0.75, 0.67)]",
        },
        innocent=[one_to_T, last_state_computed_and_dropped],
    ),
    Proof(
        check_sampling,
        plant={
            one_step_more: "the network is called 4 times for 3 steps",
            grid_of_T_points: "the network is called 2 times for 3 steps",
        },
        innocent=[grid_of_T_plus_one_points],
    ),
    Proof(
        check_plus_plus,
        plant={
            one_sinkhorn_step_more: "Algorithm 4 calls the velocity field 4 times for 3 steps",
            predictor_not_counted: "Algorithm 4 reports 25 evaluations, counted are 30",
            steps_of_full_size: "Algorithm 4: moved for [1.75, 1.5, 1.25, 1.0, 0.75], expected [1.75, 1.4, 1.25, 0.751, 0.75]",
        },
        innocent=[rounded_to_the_nearest_number],
    ),
    Proof(
        check_draws,
        plant={
            last_index_included: "pool: a row is drawn that is not there: index 5 is out of bounds for dimension 0 with size 5",
            last_row_never: "pool: row [4] of 5 is never drawn",
        },
        innocent=[share_of_the_rows],
    ),
]


def test_proof(case):
    case()


def test_the_symptom_is_what_python_and_pytorch_say():
    """random.randint has both ends, and reaches an index that torch.randint with the same arguments does not."""
    states, stream = torch.zeros(100, 2), random.Random(0)
    indices = [stream.randint(0, 100) for _ in range(1000)]
    assert (
        max(indices) == 100
        and int(torch.randint(0, 100, (1000,), generator=torch.Generator().manual_seed(0)).max()) <= 99
    )
    with pytest.raises(IndexError, match="^index 100 is out of bounds for dimension 0 with size 100$"):
        states[100]
