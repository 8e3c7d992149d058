import math

import pytest
import torch

from nsgf import data

N = 200_000
"""With this many points a mean is known to about std / 450."""


def points(law):
    return data.sample(law, N, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("law", data.LAWS)
def test_points_follow_the_generator_and_nothing_else(law):
    one, again = (data.sample(law, 7, torch.Generator().manual_seed(1)) for _ in range(2))
    torch.manual_seed(5)
    other = data.sample(law, 7, torch.Generator().manual_seed(2))
    assert one.shape == (7, 2) and one.dtype == torch.float32
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_gaussian_is_standard():
    """Five standard errors of a mean are 0.011, of a covariance entry 0.016."""
    x = points("gaussian")
    assert x.mean(0).abs().max() < 0.011 and (x.T.cov() - torch.eye(2)).abs().max() < 0.016


def test_eight_gaussians_stand_on_a_circle_of_radius_five_with_equal_weights():
    x = points("8gaussians")
    sector = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().remainder(8).long()
    centres = torch.stack([x[sector == k].mean(0) for k in range(8)])
    angles = torch.arange(8) * math.pi / 4
    expected = 5 * torch.stack([angles.cos(), angles.sin()], dim=1)
    assert (centres - expected).abs().max() < 0.03
    assert (torch.bincount(sector) / N - 1 / 8).abs().max() < 0.004
    residual = x - expected[sector]
    assert residual.std(0).sub(0.1**0.25).abs().max() < 0.01


def test_moons_are_two_half_circles_blurred_along_the_diagonal():
    """Undoing scale and shift, the distance to the nearer half circle along (1, 1) lies in [0, 0.2]."""
    x = (points("moons") + 1) / 3
    angles = torch.linspace(0, math.pi, 2001)
    outer = torch.stack([angles.cos(), angles.sin()], dim=1)
    inner = torch.stack([1 - angles.cos(), 0.5 - angles.sin()], dim=1)
    curve = torch.cat([outer, inner])
    # Along the diagonal x - y is constant and x + y grows by twice the blur.
    sample = x[:2000]
    gap = (sample[:, None] - curve[None]) @ torch.tensor([[1.0, 0.5], [-1.0, 0.5]])  # difference and half sum
    along = torch.where(gap[..., 0].abs() < 2e-3, gap[..., 1], torch.nan)
    on = ((along >= -2e-3) & (along <= 0.2 + 2e-3)).any(1)
    assert on.all()


def test_scurve_lies_on_its_curve():
    """Noise 0.05 in both coordinates: nothing is farther than six standard deviations from the curve."""
    x = points("scurve")[:5000] / 1.5
    angle = torch.linspace(-1.5 * math.pi, 1.5 * math.pi, 4001)
    curve = torch.stack([angle.sin(), angle.sign() * (angle.cos() - 1)], dim=1)
    assert torch.cdist(x, curve).amin(1).max() < 0.3


def test_checkerboard_fills_every_second_square():
    x = points("checkerboard")
    cell = (x / 2).floor().long() + 2
    counts = torch.zeros(4, 4).index_put_((cell[:, 0], cell[:, 1]), torch.ones(N), accumulate=True)
    assert x.min() >= -4 and x.max() <= 4
    assert ((counts > 0).sum(), (counts > 0).sum(0).unique(), (counts > 0).sum(1).unique()) == (8, 2, 2)
    assert (counts[counts > 0] / N - 1 / 8).abs().max() < 0.004


def test_an_unknown_law_is_an_error():
    with pytest.raises(KeyError):
        data.sample("spiral", 1, torch.Generator())
