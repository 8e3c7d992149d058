"""m23: half precision inside log-sum-exp.

Squared distances of images are some thousands, and are divided by blur squared before they are exponentiated. The velocity computes in float32,
bit for bit the same inside autocast; points in half precision are refused, or read as the float32 numbers that they are.
"""

from contextlib import nullcontext
from functools import partial

import torch
from proof import Proof

from nsgf import geomloss_velocity, sinkhorn
from nsgf.config import Sinkhorn
from nsgf.phases import make_velocity

IMPLEMENTATIONS = ("closed_form", "geomloss_tensorized")
HALF = (torch.bfloat16, torch.float16)
IMAGES = (64, 784)


def velocity_of(implementation, blur=0.5):
    return make_velocity(Sinkhorn(implementation=implementation, blur=blur, scaling=0.85))


def minibatch(shape=IMAGES):
    """Noise, and points in [-1, 1] as images are."""
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=stream), torch.randn(shape, generator=stream)
    return x, y.cumsum(1).div(shape[1] ** 0.5).clamp(-1, 1)


def moved(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


def check_autocast(implementation):
    velocity, (x, y) = velocity_of(implementation), minibatch()
    alone = velocity(x, y)
    for dtype in HALF:
        with torch.autocast("cpu", dtype):
            inside = velocity(x, y)
        assert torch.equal(inside, alone), f"autocast to {dtype} moves the velocity by {moved(inside, alone):.2%}"


def check_points(implementation, dtypes=HALF, shape=IMAGES, blur=0.5):
    velocity = velocity_of(implementation, blur)
    for dtype in dtypes:
        x, y = (points.to(dtype) for points in minibatch(shape))
        try:
            found = velocity(x, y)
        except ValueError as error:
            assert str(error) == f"x has dtype {dtype}, expected torch.float32 or torch.float64", str(error)
            continue
        off = moved(found, velocity(x.float(), y.float()))
        # Rounding the result to bfloat16 costs 0.4 %.
        assert off < 0.005, f"computed in {dtype}: the velocity is off by {off:.0%}"


def products_in_half(monkeypatch):
    """As autocast does them; float32 again afterwards."""
    monkeypatch.setattr(sinkhorn, "_product", lambda a, b: (a @ b).float())


class _WithAutocast:
    """torch, where switching autocast off does nothing."""

    autocast = staticmethod(lambda *args, **kwargs: nullcontext())

    def __getattr__(self, name):
        return getattr(torch, name)


def library_inside_autocast(monkeypatch):
    monkeypatch.setattr(geomloss_velocity, "torch", _WithAutocast())


def half_points_accepted(monkeypatch):
    """GeomLoss takes them without a word."""
    monkeypatch.setattr(geomloss_velocity, "check_clouds", lambda x, y: None)


def half_admitted(monkeypatch):
    for dtype, floor, limit in ((torch.bfloat16, -70.0, 45.0), (torch.float16, -8.0, 8.0)):
        monkeypatch.setitem(sinkhorn.EXPONENT_FLOOR, dtype, floor)
        monkeypatch.setitem(sinkhorn.LOG_MEAN_LIMIT, dtype, limit)


def half_raised_to_float32(monkeypatch):
    """Half precision is taken in, and left before anything is computed."""
    for module in (sinkhorn, geomloss_velocity):
        raised = lambda x, y, real=module.velocity, **settings: real(x.float(), y.float(), **settings)  # noqa: E731
        monkeypatch.setattr(module, "velocity", raised)


def products_in_float64(monkeypatch):
    def product(a, b):
        with torch.autocast("cpu", enabled=False):
            return (a.double() @ b.double()).to(a.dtype)

    monkeypatch.setattr(sinkhorn, "_product", product)


def autocast_off_around_all(monkeypatch):
    """Outside of the velocity instead of inside."""
    for module in (sinkhorn, geomloss_velocity):

        def velocity(x, y, real=module.velocity, **settings):
            with torch.amp.autocast("cpu", enabled=False):
                return real(x, y, **settings)

        monkeypatch.setattr(module, "velocity", velocity)
    monkeypatch.setattr(geomloss_velocity, "torch", _WithAutocast())


CORRECT = [half_raised_to_float32, products_in_float64, autocast_off_around_all]
INSIDE = "autocast to torch.bfloat16 moves the velocity by"
COMPUTED = "computed in torch.bfloat16: the velocity is off by"
OVERFLOW = partial(check_points, "geomloss_tensorized", HALF[1:], (16, 3072), 0.05)
PROOFS = [
    Proof(partial(check_autocast, "closed_form"), {products_in_half: INSIDE}, CORRECT),
    Proof(partial(check_autocast, "geomloss_tensorized"), {library_inside_autocast: INSIDE}, CORRECT),
    Proof(partial(check_points, "closed_form"), {half_admitted: COMPUTED}, CORRECT),
    Proof(partial(check_points, "geomloss_tensorized"), {half_points_accepted: COMPUTED}, CORRECT),
    Proof(OVERFLOW, {half_points_accepted: "computed in torch.float16: the velocity is off by nan%"}, CORRECT),
]


def test_proof(case):
    case()


def test_the_loss_does_not_show_what_the_velocity_loses(monkeypatch):
    """At the paper's finest blur nothing overflows."""
    half_points_accepted(monkeypatch)
    velocity, points = velocity_of("geomloss_tensorized"), minibatch()
    loss = geomloss_velocity.SamplesLoss("sinkhorn", p=2, blur=0.5, scaling=0.85, backend="tensorized")
    for dtype, at_least in ((torch.bfloat16, 0.5), (torch.float16, 0.1)):
        x, y = (one.to(dtype) for one in points)
        assert abs(float(loss(x, y) / loss(*points)) - 1) < 0.005
        assert moved(velocity(x, y), velocity(x.float(), y.float())) > at_least
