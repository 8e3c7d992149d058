"""m22: potentials debiased twice.

The velocity has one self term, -grad f_ab + grad f_aa. A cloud towards itself rests, and a cloud towards its translation moves by it, at a blur
where points share their targets: elsewhere the self term is 0, and neither twice of it nor none is seen. `repro probe` asks at such a blur.
"""

from dataclasses import replace
from functools import partial

import torch
from proof import Proof

from nsgf import geomloss_velocity, probes, sinkhorn
from nsgf.config import Sinkhorn
from nsgf.laws import PointLaws
from nsgf.phases import make_velocity

BLUR = 1.0
SHARED, APART = (32, 2), (32, 784)  # normal points: neighbours are nearer than blur, or far from it


def velocity_of(implementation):
    return make_velocity(Sinkhorn(implementation=implementation, blur=BLUR, scaling=0.95))


def cloud(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def furthest_off(implementation, shape, shift):
    x = cloud(shape)
    return float((velocity_of(implementation)(x, x + shift) - shift).abs().max())


def check(implementation):
    x = cloud(SHARED)
    self_term = x - sinkhorn.barycentric_projection(sinkhorn.potentials(x, x, blur=BLUR, scaling=0.95), x)
    assert self_term.abs().max() > BLUR / 2, "the self term is not seen at this blur: the check would be blind"
    for shift, meaning in ((0.0, "towards itself"), (3.0, "towards its translation by 3")):
        off = furthest_off(implementation, SHARED, shift)
        assert off < 0.02, f"a cloud {meaning}: a velocity is off by {off:.2f}"


def check_probe(implementation):
    """At the shape and blur of the image experiments."""
    velocity = make_velocity(Sinkhorn(implementation=implementation, blur=0.5, scaling=0.95))
    torch.manual_seed(0)
    probes.check_velocity(velocity, APART, (1, 28, 28), torch.device("cpu"))


def _with_debias(monkeypatch, debias_of_self, debias_of_targets):
    """GeomLoss' `debias` in the calls of one velocity; None: this call is not made."""
    real = geomloss_velocity._gradient

    def gradient(loss, particles, targets):
        is_self = targets.data_ptr() == particles.data_ptr()
        debias = debias_of_self if is_self else debias_of_targets
        if debias is None:
            return torch.zeros_like(particles)
        loss.debias = debias
        return real(loss, particles, targets)

    monkeypatch.setattr(geomloss_velocity, "_gradient", gradient)


def self_potential_subtracted_again(monkeypatch):
    """F = f_ab - f_aa comes from a debiased call, and f_aa from another one is subtracted from it."""
    _with_debias(monkeypatch, debias_of_self=False, debias_of_targets=True)


def no_self_potential(monkeypatch):
    _with_debias(monkeypatch, debias_of_self=None, debias_of_targets=False)


def one_debiased_call(monkeypatch):
    _with_debias(monkeypatch, debias_of_self=None, debias_of_targets=True)


def debiased_in_both_calls(monkeypatch):
    """GeomLoss' default, left in both: f_aa - f_aa = 0 is subtracted."""
    _with_debias(monkeypatch, debias_of_self=True, debias_of_targets=True)


def self_term_added_again(monkeypatch):
    real = sinkhorn.velocity

    def velocity(x, y, **settings):
        own = sinkhorn.barycentric_projection(sinkhorn.potentials(x, x, **settings), x)
        return real(x, y, **settings) + (x - own)

    monkeypatch.setattr(sinkhorn, "velocity", velocity)


def plan_of_debiased_potentials(monkeypatch):
    """exp((F + G - C) / eps), with G = g_ab - g_bb."""
    real = sinkhorn.potentials

    def potentials(x, y, **settings):
        p = real(x, y, **settings)
        return p if y is x else replace(p, reduced_g=p.reduced_g - real(y, y, **settings).g)

    monkeypatch.setattr(sinkhorn, "potentials", potentials)


def self_term_by_the_general_loop(monkeypatch):
    real = sinkhorn.potentials
    monkeypatch.setattr(sinkhorn, "potentials", lambda x, y, **settings: real(x, y.clone(), **settings))


def difference_of_gradients(monkeypatch):
    """(x - Q x) - (x - P y): each gradient by itself, and one of each."""
    real = sinkhorn.barycentric_projection

    def velocity(x, y, **settings):
        to_self, to_targets = (x - real(sinkhorn.potentials(x, z, **settings), z) for z in (x, y))
        return to_self - to_targets

    monkeypatch.setattr(sinkhorn, "velocity", velocity)


AT_REST = "a cloud towards itself: a velocity is off by"
PROBED = "off the translation, expected less than"
LIBRARY = (
    {self_potential_subtracted_again: AT_REST, no_self_potential: AT_REST},
    [one_debiased_call, debiased_in_both_calls],
)
CLOSED_FORM = (
    {self_term_added_again: AT_REST, plan_of_debiased_potentials: AT_REST},
    [self_term_by_the_general_loop, difference_of_gradients],
)
PROOFS = [
    Proof(partial(check, "geomloss_tensorized"), *LIBRARY),
    Proof(partial(check, "closed_form"), *CLOSED_FORM),
    Proof(partial(check_probe, "geomloss_tensorized"), dict.fromkeys(LIBRARY[0], PROBED), LIBRARY[1]),
    Proof(partial(check_probe, "closed_form"), {self_term_added_again: PROBED}, CLOSED_FORM[1]),
]


def test_proof(case):
    case()


def test_what_twice_costs_and_where_it_is_not_seen(monkeypatch):
    """In percent of the velocity: of 2d-8gaussians, by blur; of points in 784 dimensions."""
    x, y = (one.double() for one in PointLaws("gaussian", "8gaussians").draw(256, torch.Generator().manual_seed(0)))
    minibatches = [(x, y, blur) for blur in (0.25, 0.5, 1.0, 2.0)] + [(cloud(APART), cloud(APART) + 3, 2.0)]
    right = [sinkhorn.velocity(x, y, blur=blur, scaling=0.95) for x, y, blur in minibatches]
    self_term_added_again(monkeypatch)
    twice = [sinkhorn.velocity(x, y, blur=blur, scaling=0.95) for x, y, blur in minibatches]
    assert [round(100 * float((b - a).norm() / a.norm())) for a, b in zip(right, twice, strict=True)] == [
        2,
        5,
        15,
        41,
        0,
    ]
