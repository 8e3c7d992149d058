"""m25: differentiating through the Sinkhorn loop.

Storages are counted: a velocity holds as many matrices after 20 iterations as after 7. And it is the derivative of the transport cost: held against
finite differences, where the loop has converged.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from geomloss import SamplesLoss
from proof import Proof

from nsgf import geomloss_velocity, sinkhorn
from nsgf.config import Sinkhorn
from nsgf.phases import make_velocity

SCALINGS = {0.5: 7, 0.85: 20}  # and the iterations that they mean for these clouds at blur 1
FLOAT32 = 4


def clouds(n, dtype=torch.float32):
    stream = torch.Generator().manual_seed(0)
    x, y = (torch.randn((n, 2), generator=stream, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (2 * y + 5).to(dtype)


def matrices(storages, implementation, scaling):
    """How many N x N are alive at once in one velocity, of particles that require gradients, as those of a network do."""
    n = 64
    x, y = clouds(n)
    diameter = sinkhorn.bounding_diameter(x, y)
    assert len(sinkhorn.epsilon_schedule(diameter, 1.0, scaling)) == SCALINGS[scaling]
    velocity = make_velocity(Sinkhorn(implementation=implementation, blur=1.0, scaling=scaling))
    with storages() as counted:
        velocity(x.requires_grad_(), y, diameter=diameter)
    return round(counted.peak / (FLOAT32 * n * n), 1)


def check_memory(storages, implementation):
    alive = {iterations: matrices(storages, implementation, scaling) for scaling, iterations in SCALINGS.items()}
    assert alive[20] == alive[7], (
        f"memory grows with the iterations: {alive[7]} N x N are alive at once after 7, {alive[20]} after 20"
    )


def check_gradient(implementation):
    """-n dW(x, y) + n dW(x, x'), along two directions: all particles shifted, and the cloud widened."""
    blur, scaling, h = 2.0, 0.99, 1e-4
    x, y = clouds(16, torch.float64)
    loss = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, diameter=20.0, debias=False, backend="tensorized")
    v = make_velocity(Sinkhorn(implementation=implementation, blur=blur, scaling=scaling))(x, y)
    for name, along in (("a shift", torch.ones_like(x)), ("widening", x - x.mean(0))):
        to_y, to_self = (float(loss(x + h * along, z) - loss(x - h * along, z)) / (2 * h) for z in (y, x))
        expected, found = len(x) * (to_self - to_y), float((v * along).sum())
        off = abs(found / expected - 1)
        assert off < 0.01, (
            f"along {name} the velocity is {found / expected:.2f} of the derivative of the transport cost"
        )


def _recorded(loss, particles, targets):
    """The potentials of GeomLoss, with the graph of all iterations."""
    with pytest.MonkeyPatch.context() as recording:
        recording.setattr(torch.autograd, "set_grad_enabled", lambda mode: None)
        recording.setattr(torch.Tensor, "detach", lambda tensor: tensor)
        return loss(particles, targets)


def cost_through_the_loop(monkeypatch):
    """The whole dual value, differentiated through every iteration."""

    def gradient(loss, particles, targets):
        f, g = _recorded(loss, particles, targets)
        return len(particles) * torch.autograd.grad(f.mean() + g.mean(), particles)[0]

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def potential_through_the_loop(monkeypatch):
    """The sum of f, as the velocity has it, but of an f that was recorded."""

    def gradient(loss, particles, targets):
        f, _ = _recorded(loss, particles, targets)
        return torch.autograd.grad(f.sum(), particles)[0]

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def closed_form_that_keeps_its_graph(monkeypatch):
    """Written to be differentiable: no `no_grad`, nothing detached. Nobody calls backward."""
    loop_by_log_sum_exp(monkeypatch)
    monkeypatch.setattr(sinkhorn, "_has_values", lambda v: False)  # looking at the values would warn of the graph
    monkeypatch.setattr(torch, "no_grad", nullcontext)
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)


def both_points_of_a_pair_moved(monkeypatch):
    """The self term is differentiated by both of its arguments."""

    def gradient(loss, particles, targets):
        if targets.data_ptr() != particles.data_ptr():
            return real(loss, particles, targets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
            return real(loss, particles, particles)

    real = geomloss_velocity._gradient
    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def self_term_left_out_of_the_closed_form(monkeypatch):
    """What remains when a loop is differentiated whose cost was not."""
    real = sinkhorn.barycentric_projection
    monkeypatch.setattr(
        sinkhorn, "velocity", lambda x, y, **settings: real(sinkhorn.potentials(x, y, **settings), y) - x
    )


def targets_not_detached(monkeypatch):
    """GeomLoss detaches them itself."""
    real = geomloss_velocity._gradient

    def gradient(loss, particles, targets):
        is_self = targets.data_ptr() == particles.data_ptr()
        return real(loss, particles, particles if is_self else targets)

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def one_debiased_call(monkeypatch):
    """More matrices, and none for each iteration."""
    real = geomloss_velocity._gradient

    def gradient(loss, particles, targets):
        if targets.data_ptr() == particles.data_ptr():
            return torch.zeros_like(particles)
        loss.debias = True
        return real(loss, particles, targets)

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def loop_by_log_sum_exp(monkeypatch):
    monkeypatch.setattr(sinkhorn, "_is_eager_cpu", lambda x: False)


def rows_in_small_blocks(monkeypatch):
    monkeypatch.setattr(sinkhorn, "BLOCK_BYTES", 2**12)


GROWS = "memory grows with the iterations: "
PROOFS = [
    Proof(
        partial(check_memory, implementation="geomloss_tensorized"),
        {cost_through_the_loop: GROWS, potential_through_the_loop: GROWS},
        [targets_not_detached, one_debiased_call],
    ),
    Proof(
        partial(check_memory, implementation="closed_form"),
        {closed_form_that_keeps_its_graph: GROWS},
        [loop_by_log_sum_exp, rows_in_small_blocks],
    ),
    Proof(
        partial(check_gradient, "geomloss_tensorized"),
        {
            potential_through_the_loop: "along a shift the velocity is 0.49 of the derivative",
            both_points_of_a_pair_moved: "along widening the velocity is",
        },
        [cost_through_the_loop, targets_not_detached, one_debiased_call],
    ),
    Proof(
        partial(check_gradient, "closed_form"),
        {self_term_left_out_of_the_closed_form: "along widening the velocity is"},
        [loop_by_log_sum_exp, rows_in_small_blocks],
    ),
]


def test_proof(case):
    case()
