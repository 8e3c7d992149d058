"""m18: the stored state one step off its velocity.

Each entry of the pool holds the velocity at its own state, recomputed here from that state and the targets; and its time is the one at which
sampling asks the network at that state.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from pools import pool_of
from proof import Proof
from torch import nn

from nsgf import flow, phases, sample
from nsgf.flow import FlowState
from nsgf.metrics import w2_squared
from nsgf.phases import VelocityField, make_phases
from repro.config import load
from repro.randomness import generator
from repro.runtime import Runtime

SEED, BATCHES, N = 5, 2, 16
# float16 keeps three digits of values up to about 10.
PRECISE, HALF = 1e-4, 0.02


def phase_1(project, experiment, *more):
    settings = [f"phases.*.pool.batches={BATCHES}", f"phases.*.pool.batch_size={N}", "sinkhorn.scaling=0.8", *more]
    config = load(project.config_class(experiment), project.experiments()[experiment], settings)[0]
    return make_phases(config, Runtime(torch.device("cpu"), stand_in_data=True))[0]


def minibatches(phase, n=N):
    """(x_0, y, rows) of each minibatch: what was drawn for it, and its entries in the pool, images as points."""
    columns = pool_of(phase, SEED).items()
    for batch in range(BATCHES):
        x_0, y = phase.laws.draw(n, generator(SEED, phase.name, "pool", batch))
        own = slice(batch * phase.entries_of_batch, (batch + 1) * phase.entries_of_batch)
        rows = {name: column[own].float() for name, column in columns}
        yield x_0.flatten(1), y.flatten(1), {"t": rows["t"]} | {name: rows[name].flatten(1) for name in ("x_t", "v_t")}


def check_velocities(project, experiment, tolerance=PRECISE, more=()):
    """v_t is the velocity at x_t, all particles of that time together: the velocity of one depends on the others."""
    phase = phase_1(project, experiment, *more)
    for _, y, rows in minibatches(phase):
        for t in rows["t"].unique():
            x, v = (rows[name][rows["t"] == t] for name in ("x_t", "v_t"))
            expected = phase.velocity(x, y)
            off = float((v - expected).norm() / expected.norm())
            assert off < tolerance, (
                f"{experiment}, t = {t:.2f}: the stored velocity is {off:.0%} off the one at its state"
            )


class ByHeart(nn.Module):
    """A network that has learned a pool by heart: the velocity of the nearest entry of the time that it is asked at."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.farthest = rows, 0.0

    def forward(self, x, t):
        now = (self.rows["t"] - t[0]).abs() < 1e-3
        assert now.any(), f"sampling asks at t = {t[0]:.2f}, the pool has no entry of that time"
        apart = torch.cdist(x, self.rows["x_t"][now], compute_mode="donot_use_mm_for_euclid_dist")
        found = apart.min(1)
        self.farthest = max(self.farthest, float(found.values.max()))
        return self.rows["v_t"][now][found.indices]


def check_sampling(project, experiment, tolerance=PRECISE):
    """Sampling from the points of a minibatch walks over the states of its trajectory, at their times."""
    phase = phase_1(project, experiment)
    setting = phase.config.flow
    for x_0, _, rows in minibatches(phase):
        network = ByHeart(rows)
        sample.sinkhorn_flow(network, x_0, steps=setting.steps, horizon=setting.steps * setting.step_size)
        assert network.farthest < tolerance, (
            f"{experiment}: sampling comes to states {network.farthest:.2g} away from those of the same time in the pool"
        )


def flow_of(monkeypatch, changed):
    """Each state of the flow, with the one after it, as the pool gets it."""
    real = flow.euler_flow

    def euler_flow(*args, step_size, **rest):
        for state in real(*args, step_size=step_size, **rest):
            yield changed(state, state.x_t + step_size * state.v_t, rest["steps"])

    monkeypatch.setattr(phases, "euler_flow", euler_flow)


def state_after_the_update(monkeypatch):
    """As in the authors' 2-D code: the particles are moved, then they are noted beside the velocity that moved them."""
    flow_of(monkeypatch, lambda state, following, steps: replace(state, x_t=following))


def state_and_time_after_the_update(monkeypatch):
    """The same with the time of the state: only the velocity is one behind."""
    flow_of(monkeypatch, lambda state, following, steps: FlowState(following, state.v_t, state.t + 1 / steps))


def time_after_the_update(monkeypatch):
    """State and velocity belong together, counted from 1."""
    flow_of(monkeypatch, lambda state, following, steps: replace(state, t=state.t + 1 / steps))


def updated_in_place(monkeypatch):
    """x += eta v on the tensor that was handed out, before the pool has copied it."""

    def euler_flow(x_0, y, velocity, *, steps, step_size):
        x_t = x_0.clone()
        for k in range(steps):
            state = FlowState(x_t, velocity(x_t, y), k / steps)
            x_t += step_size * state.v_t
            yield state

    monkeypatch.setattr(phases, "euler_flow", euler_flow)


def updated_in_place_of_a_copy(monkeypatch):
    def euler_flow(x_0, y, velocity, *, steps, step_size):
        x_t = x_0.clone()
        for k in range(steps):
            state = FlowState(x_t.clone(), velocity(x_t, y), k / steps)
            x_t += step_size * state.v_t
            yield state

    monkeypatch.setattr(phases, "euler_flow", euler_flow)


def last_state_first(monkeypatch):
    real = VelocityField.trajectory
    monkeypatch.setattr(VelocityField, "trajectory", lambda *args: reversed(list(real(*args))))


def midpoint_steps(monkeypatch):
    """The particles go along the velocity half a step ahead; stored is the one at their state."""

    def midpoint_flow(x_0, y, velocity, *, steps, step_size):
        x = x_0
        for k in range(steps):
            v = velocity(x, y)
            yield FlowState(x, v, k / steps)
            x = x + step_size * velocity(x + step_size / 2 * v, y)

    monkeypatch.setattr(phases, "euler_flow", midpoint_flow)


PROOFS = [
    *(
        Proof(
            partial(check_velocities, experiment=experiment),
            plant=dict.fromkeys(
                [state_after_the_update, state_and_time_after_the_update, updated_in_place],
                f"{experiment}, t = ",
            ),
            innocent=[updated_in_place_of_a_copy, last_state_first, midpoint_steps],
        )
        for experiment in ("2d-moons", "mnist")
    ),
    *(
        Proof(
            partial(check_sampling, experiment=experiment),
            plant={
                state_after_the_update: f"{experiment}: sampling comes to states ",
                updated_in_place: f"{experiment}: sampling comes to states ",
                state_and_time_after_the_update: "sampling asks at t = 0.00, the pool has no entry of that time",
                time_after_the_update: "sampling asks at t = 0.00, the pool has no entry of that time",
            },
            innocent=[updated_in_place_of_a_copy, last_state_first],
        )
        for experiment in ("2d-moons", "mnist")
    ),
    Proof(
        partial(check_velocities, experiment="mnist", tolerance=HALF, more=["phases.*.pool.precision=float16"]),
        plant={state_after_the_update: "the stored velocity is "},
        innocent=[last_state_first],
    ),
]


def test_proof(case):
    case()


@pytest.mark.parametrize(("step_size", "least", "most"), [(0.02, 0.01, 0.05), (0.05, 0.04, 0.08), (0.5, 0.7, 1.1)])
def test_the_error_grows_with_the_step(project, monkeypatch, step_size, least, most):
    """About eta / (1 - eta): hardly seen at 100 steps of 0.02, as large as the velocity at 10 steps of 0.5."""
    phase = phase_1(project, "2d-moons", f"phases.velocity_field.flow.step_size={step_size}")
    state_after_the_update(monkeypatch)
    for _, y, rows in minibatches(phase):
        x, v = (rows[name][rows["t"] == 0] for name in ("x_t", "v_t"))
        expected = phase.velocity(x, y)
        assert least < float((v - expected).norm() / expected.norm()) < most


def test_samples_of_the_mistake_overshoot(project, monkeypatch):
    """Ten steps of 0.5 by a network that has learned the pool: W2 to the targets of the minibatch."""
    phase, ends = phase_1(project, "2d-moons", "phases.velocity_field.pool.batch_size=64"), []
    for plant in (lambda patch: None, state_after_the_update):
        plant(monkeypatch)
        x_0, y, rows = next(minibatches(phase, 64))
        path = sample.sinkhorn_flow(ByHeart(rows), x_0, steps=10, horizon=5.0)
        ends.append(w2_squared(path[-1], y) ** 0.5)
    assert ends[1] > 2 * ends[0]
