"""m01: image tensors handed to an optimal-transport library.

The velocity gives a known answer at the flattened shapes of every experiment of the paper. Images are refused in one line that names what was
found and what is expected, or read as points; they are never read as a batch of clouds.
"""

from functools import partial

import pytest
import torch
from proof import Proof

from nsgf import geomloss_velocity, sinkhorn
from nsgf.config import Sinkhorn
from nsgf.phases import make_velocity

PAPER = [(256, 2), (256, 784), (128, 3072)]  # 2-D, MNIST and CIFAR-10, flattened
IMAGES = [(8, 28, 28), (8, 1, 28, 28), (4, 3, 32, 32)]
IMPLEMENTATIONS = ("closed_form", "geomloss_tensorized")


def velocity_of(implementation):
    return make_velocity(Sinkhorn(implementation=implementation, blur=0.5, scaling=0.8))


def moved(shape):
    """Points and the same points in another order, moved by one. Read as a batch, cloud i would meet another cloud's points."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x, x.flip(0) + 1.0


def check(implementation, points=((16, 2),), images=IMAGES):
    """The velocity of a cloud towards its translation is the translation; of images this holds as well, or they are refused."""
    velocity = velocity_of(implementation)
    for shape in (*points, *images):
        x, y = moved(shape)
        try:
            v = velocity(x, y)
        except ValueError as error:
            told = str(error)
            assert shape in images, f"{shape}: refused: {told}"
            assert "\n" not in told and str(shape) in told and "expected" in told, (
                f"{shape}: refused without found and expected: {told}"
            )
        else:
            wrong = f"{shape}: not read as {shape[0]} points, found a velocity of"
            assert v.shape == shape, f"{wrong} shape {tuple(v.shape)}"
            error = float((v - 1.0).abs().max())
            assert error < 0.03, f"{wrong} {1 + error:.2g} or {1 - error:.2g} where all points move by 1"


def read_as_a_batch(monkeypatch):
    """Every axis before the last two becomes a batch axis."""
    real = sinkhorn.velocity

    def velocity(x, y, **settings):
        if x.ndim == 2:
            return real(x, y, **settings)
        return torch.stack([velocity(a, b, **settings) for a, b in zip(x, y, strict=True)])

    monkeypatch.setattr(sinkhorn, "velocity", velocity)


def trust_in_what_geomloss_accepts(monkeypatch):
    """What GeomLoss accepts is taken for right."""
    monkeypatch.setattr(geomloss_velocity, "check_clouds", lambda x, y: None)


def flattened_at_the_call(monkeypatch):
    """And the shape restored after it."""
    for module in (sinkhorn, geomloss_velocity):
        real = module.velocity
        flattening = lambda x, y, real=real, **settings: real(x.flatten(1), y.flatten(1), **settings).reshape(x.shape)  # noqa: E731
        monkeypatch.setattr(module, "velocity", flattening)


MISREAD = ": not read as 8 points, found a velocity of"
PROOFS = [
    Proof(partial(check, "closed_form", PAPER), {read_as_a_batch: "(8, 28, 28)" + MISREAD}, [flattened_at_the_call]),
    Proof(
        partial(check, "closed_form", images=IMAGES[1:2]),
        {read_as_a_batch: "(8, 1, 28, 28)" + MISREAD},
        [flattened_at_the_call],
    ),
    Proof(
        partial(check, "geomloss_tensorized", PAPER),
        {trust_in_what_geomloss_accepts: "(8, 28, 28)" + MISREAD},
        [flattened_at_the_call],
    ),
]


def test_proof(case):
    case()


def test_the_symptom_is_what_geomloss_says():
    loss = geomloss_velocity.SamplesLoss("sinkhorn", p=2, blur=0.5, scaling=0.5, potentials=True)
    message = r"^Input samples 'x' and 'y' should be encoded as \(N,D\) or \(B,N,D\) \(batch\) tensors\.$"
    with pytest.raises(ValueError, match=message):
        loss(*moved((8, 1, 28, 28)))
    f, _ = loss(*moved((8, 28, 28)))
    assert f.shape == (8, 28)  # no message: 8 clouds of 28 points
