"""m24: a gradient that carries the weight of its point.

v_i = -(1 / a_i) dS / dx_i. With a_i = 1/n the gradient of a loss is n times too short: a cloud towards its translation moves by the translation,
whatever the number of its points and of its targets.
"""

from functools import partial

import torch
from proof import Proof

from nsgf import geomloss_velocity, sinkhorn
from nsgf.config import Sinkhorn
from nsgf.phases import make_velocity

SIZES = [(2, 2), (16, 16), (16, 32), (128, 128)]  # particles and targets, each target as often as the next


def check(implementation):
    velocity = make_velocity(Sinkhorn(implementation=implementation, blur=0.5, scaling=0.95))
    stream = torch.Generator().manual_seed(0)
    for n, m in SIZES:
        x, shift = torch.randn((n, 2), generator=stream, dtype=torch.float64), torch.tensor([3.0, -4.0])
        v = velocity(x, (x + shift).repeat(m // n, 1))
        share = float((v @ shift.double()).mean() / shift.square().sum())
        assert abs(share - 1) < 1e-3, f"{n} particles, {m} targets: the velocity is {share:.4g} of the translation"


def gradient_of_the_loss(monkeypatch):
    """GeomLoss weighs potentials by a_i = 1/n: its gradients carry the weight."""

    def gradient(loss, particles, targets):
        f, g = loss(particles, targets)
        return torch.autograd.grad(f.mean() + g.mean(), particles)[0]

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def times_the_number_of_targets(monkeypatch):
    """Right as long as there are as many as particles."""

    def gradient(loss, particles, targets):
        f, g = loss(particles, targets)
        return len(targets) * torch.autograd.grad(f.mean() + g.mean(), particles)[0]

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def times_the_number_of_particles(monkeypatch):
    def gradient(loss, particles, targets):
        f, g = loss(particles, targets)
        return len(particles) * torch.autograd.grad(f.mean() + g.mean(), particles)[0]

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def weights_given(monkeypatch):
    """Uniform ones, in words: the gradient of a sum of potentials does not carry them."""

    def gradient(loss, particles, targets):
        f, _ = loss(
            *(
                one
                for points in (particles, targets)
                for one in (points.new_full((len(points),), 1 / len(points)), points)
            )
        )
        return torch.autograd.grad(f.sum(), particles)[0]

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def joint_plan(p, y):
    """The plan as POT returns it: its entries sum to 1, and each row to 1/n."""
    logits = (p.reduced_g + p.inner) / p.eps
    return logits.softmax(1) / len(logits)


def rows_of_the_joint_plan(monkeypatch):
    monkeypatch.setattr(sinkhorn, "barycentric_projection", lambda p, y: joint_plan(p, y) @ y)


def rows_divided_by_their_mass(monkeypatch):
    def projection(p, y):
        plan = joint_plan(p, y)
        return plan @ y / plan.sum(1, keepdim=True)

    monkeypatch.setattr(sinkhorn, "barycentric_projection", projection)


PROOFS = [
    Proof(
        partial(check, "geomloss_tensorized"),
        {
            gradient_of_the_loss: "2 particles, 2 targets: the velocity is 0.5 of the translation",
            times_the_number_of_targets: "16 particles, 32 targets: the velocity is",
        },
        [times_the_number_of_particles, weights_given],
    ),
    Proof(
        partial(check, "closed_form"),
        {rows_of_the_joint_plan: "2 particles, 2 targets: the velocity is 0.5 of the translation"},
        [rows_divided_by_their_mass],
    ),
]


def test_proof(case):
    case()


def test_how_far_ten_steps_come(monkeypatch):
    """Those of the 2-D experiments: steps of 0.5, 256 particles."""
    rows_of_the_joint_plan(monkeypatch)
    velocity = make_velocity(Sinkhorn(implementation="closed_form", blur=0.25, scaling=0.95))
    start = torch.randn((256, 2), generator=torch.Generator().manual_seed(0))
    x, y = start, start + 3
    for _ in range(10):
        x = x + 0.5 * velocity(x, y)
    assert 0.015 < float((x - start).mean()) / 3 < 0.025
