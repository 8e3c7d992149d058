"""m13: the velocity stored with the wrong sign.

Particles approach the target at every step of the flow that fills the pool, each stored velocity points where its particle goes, and a network
that has learned the pool carries samples to the target.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from pools import pool_of
from proof import Proof
from torch import nn

from nsgf import flow, geomloss_velocity, phases, sample, sinkhorn
from nsgf.laws import Laws, PointLaws
from nsgf.metrics import sinkhorn_divergence, w2_squared
from nsgf.phases import VelocityField
from repro.config import load
from repro.randomness import generator
from repro.runtime import Runtime
from repro_tools.minibatch import draw

CPU = Runtime(torch.device("cpu"))
SEED = 0
SMALL = ["phases.*.pool.batches=2", "phases.*.pool.batch_size=16", "sinkhorn.scaling=0.8"]
AWAY = torch.tensor([6.0, 0.0])


@dataclass(frozen=True)
class Away(Laws):
    """Two clouds of one law, the target moved by AWAY: what a velocity must do on average is known."""

    shape: tuple[int, ...] = (2,)

    def draw(self, n, generator):
        x_0, y = torch.randn(2, n, 2, generator=generator)
        return x_0, y + AWAY


def phase_1(project, *more, laws=Away()):  # noqa: B008
    config = load(project.config_class("2d-moons"), project.experiments()["2d-moons"], [*SMALL, *more])[0]
    return VelocityField("velocity_field", config.phases.velocity_field, laws, config.sinkhorn, CPU)


def targets(phase, batch):
    return phase.laws.draw(phase.config.pool.batch_size, generator(SEED, phase.name, "pool", batch))[1]


def check_flow(project, implementation):
    """The Sinkhorn divergence to the targets, of which v is the descent, falls until they are reached; and every v_t points forward."""
    phase = phase_1(project, f"sinkhorn.implementation={implementation}")
    rows = list(phase.trajectory(0))
    divergences = [sinkhorn_divergence(one["x_t"], targets(phase, 0), blur=0.25, scaling=0.8) for one in rows]
    arrived = 0.01 * divergences[0]  # the annealing is truncated: at the target the divergence wavers
    assert all(b < max(a, arrived) for a, b in zip(divergences, divergences[1:], strict=False)), (
        f"the particles do not approach the target: divergence {', '.join(f'{value:.3g}' for value in divergences)}"
    )
    for k, (one, following) in enumerate(zip(rows, rows[1:], strict=False)):
        forward = float(((following["x_t"] - one["x_t"]) * one["v_t"]).sum())
        assert forward > 0, f"step {k}: the particles move against their stored velocity"


class Constant(nn.Module):
    """One velocity for all points and times."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(2))

    def forward(self, x, t):
        return self.v.expand_as(x)


def fitted(phase):
    """A network that has learned what the loss asks for. The mean square of (v - v_i) has the gradient v - mean(v_i): one step lands there."""
    model = Constant()
    phase.loss(model, dict(pool_of(phase, SEED))).backward()
    model.v.data -= model.v.grad
    return model


def distances(phase, model, points):
    """W2 from source points to the target, and from the samples that they become."""
    x_0, y = phase.laws.draw(points, generator(SEED, "test"))
    setting = phase.config.flow
    with torch.no_grad():
        end = sample.sinkhorn_flow(model, x_0, steps=setting.steps, horizon=setting.steps * setting.step_size)[-1]
    return w2_squared(x_0, y) ** 0.5, w2_squared(end, y) ** 0.5


def check_samples(project):
    """Loss, pool and sampling mean one sign: what was learned carries source points towards the target."""
    phase = phase_1(project)
    before, after = distances(phase, fitted(phase), points=64)
    assert after < before, f"samples move away from the target: W2 {before:.2f} before the flow, {after:.2f} after it"


def stored_negated(monkeypatch):
    """As in commit 52361b0: the particles go the right way, what is stored is minus their velocity."""
    real = flow.euler_flow
    negated = lambda *args, **rest: (replace(state, v_t=-state.v_t) for state in real(*args, **rest))  # noqa: E731
    monkeypatch.setattr(phases, "euler_flow", negated)


def negation_forgotten_in_training(monkeypatch):
    """As in test_sinkhorn.py: the loss takes the stored gradients for velocities."""
    real = VelocityField.loss
    negated = lambda self, model, batch: real(self, model, batch | {"v_t": -batch["v_t"]})  # noqa: E731
    monkeypatch.setattr(VelocityField, "loss", negated)


def potentials_exchanged(monkeypatch):
    """Ascent, as in the paper's eq. 15: stored velocity and movement agree, and both lead away."""
    for module in (sinkhorn, geomloss_velocity):
        real = module.velocity
        monkeypatch.setattr(module, "velocity", lambda x, y, real=real, **settings: -real(x, y, **settings))


def moved_against_the_velocity(monkeypatch):
    """x - eta v, as of a gradient, with the v of eq. 13, which is minus a gradient."""
    real = flow.euler_flow
    backwards = lambda *args, step_size, **rest: real(*args, step_size=-step_size, **rest)  # noqa: E731
    monkeypatch.setattr(phases, "euler_flow", backwards)


def sampled_backwards(monkeypatch):
    real = sample.sinkhorn_flow
    monkeypatch.setattr(sample, "sinkhorn_flow", lambda *args, horizon, **rest: real(*args, horizon=-horizon, **rest))


def gradients_stored_and_negated_in_training(monkeypatch):
    """The other convention, complete: the pool holds the gradient, the loss takes minus it."""
    stored_negated(monkeypatch)
    negation_forgotten_in_training(monkeypatch)


def gradients_learned_and_sampled_backwards(monkeypatch):
    """How a checkpoint of the negated velocity can still be used: the network has the other sign, and so has the time."""
    stored_negated(monkeypatch)
    sampled_backwards(monkeypatch)


def midpoint_steps(monkeypatch):
    """A step along the velocity half a step ahead: the stored velocity is not the movement, but not its opposite either."""

    def midpoint_flow(x_0, y, velocity, *, steps, step_size):
        x = x_0
        for k in range(steps):
            v = velocity(x, y)
            yield flow.FlowState(x, v, k / steps)
            x = x + step_size * velocity(x + step_size / 2 * v, y)

    monkeypatch.setattr(phases, "euler_flow", midpoint_flow)


APART = "the particles do not approach the target: divergence"
AGAINST = "step 0: the particles move against their stored velocity"
LOST = "samples move away from the target: W2"
PROOFS = [
    *(
        Proof(
            partial(check_flow, implementation=implementation),
            plant={
                stored_negated: AGAINST,
                potentials_exchanged: APART,
                moved_against_the_velocity: APART,
            },
            innocent=[midpoint_steps],
        )
        for implementation in ("closed_form", "geomloss_tensorized")
    ),
    Proof(
        check_samples,
        plant={
            stored_negated: LOST,
            negation_forgotten_in_training: LOST,
            potentials_exchanged: LOST,
            sampled_backwards: LOST,
        },
        innocent=[
            gradients_stored_and_negated_in_training,
            gradients_learned_and_sampled_backwards,
            midpoint_steps,
        ],
    ),
]


def test_proof(case):
    case()


def trained(phase, steps=300, rate=0.1, last=50):
    """A network after plain gradient descent, and the mean of its last losses."""
    torch.manual_seed(SEED)
    model, pool, losses = phase.make_model(), pool_of(phase, SEED), []
    for step in range(steps):
        loss = phase.loss(model, draw(phase, step, SEED, pool))
        for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data -= rate * gradient
        losses.append(loss.item())
    return model, sum(losses[-last:]) / last


def test_the_loss_cannot_tell(project, monkeypatch):
    sizes = {"pool.batches": 8, "pool.batch_size": 64, "batch_size": 64, "network.width": 32}
    small = [f"phases.*.{name}={value}" for name, value in sizes.items()]
    phase = phase_1(project, *small, laws=PointLaws("gaussian", "moons"))
    found = []
    for plant in (None, stored_negated):
        if plant:
            plant(monkeypatch)
        model, loss = trained(phase)
        found.append((loss, *distances(phase, model, points=256)))
    (loss, before, after), (planted_loss, _, planted_after) = found
    assert abs(planted_loss / loss - 1) < 0.05
    assert after < 0.75 * before and planted_after > 1.3 * before
