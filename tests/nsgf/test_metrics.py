import math

import pytest
import torch

from nsgf.metrics import divergence_tensor, sinkhorn_divergence, transport_distances, w2_squared


def cloud(n=64, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def test_a_translation_costs_its_squared_length():
    """W2 of a cloud and its translate by (3, 4) is 5 exactly; float32 points limit the digits."""
    x = cloud()
    found = transport_distances(x, x + torch.tensor([3.0, 4.0]))
    assert found == pytest.approx({"w2": 5.0, "w2_squared": 25.0, "half_w2_squared": 12.5}, rel=1e-6)


def test_order_does_not_matter():
    x = cloud()
    assert w2_squared(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


def test_clouds_of_different_size_are_compared_by_mass():
    assert w2_squared(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [2.0, 0.0]])) == pytest.approx(2.0)


def test_gaussians_in_one_direction_follow_the_closed_form():
    """Sorted 1-D points are optimally matched in order."""
    x, y = cloud(seed=1), cloud(seed=2)
    x[:, 1] = y[:, 1] = 0
    expected = (x[:, 0].double().sort().values - y[:, 0].double().sort().values).square().mean()
    assert w2_squared(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_the_sinkhorn_divergence_of_far_clouds_is_half_the_squared_distance():
    """GeomLoss' cost carries the factor one half; blur 0.05 is far below the distance 10."""
    x = cloud()
    found = sinkhorn_divergence(x, x + torch.tensor([10.0, 0.0]), blur=0.05, scaling=0.9)
    assert found == pytest.approx(50.0, rel=1e-3)


def test_the_sinkhorn_divergence_of_a_cloud_with_itself_is_zero():
    assert sinkhorn_divergence(cloud(), cloud(), blur=0.05, scaling=0.9) == pytest.approx(0, abs=1e-6)


def test_blur_scaling_and_diameter_are_those_that_were_asked_for():
    """Each moves the divergence of clouds that overlap; GeomLoss' own defaults are 0.05, 0.5 and the measured diameter."""
    x, y = cloud(seed=1), cloud(seed=2)
    usual = float(divergence_tensor(x, y, blur=1.0, scaling=0.8))
    assert float(divergence_tensor(x, y, blur=0.05, scaling=0.8)) > 1.5 * usual
    assert float(divergence_tensor(x, y, blur=1.0, scaling=0.8, diameter=8.0)) == pytest.approx(usual, rel=1e-2)
    for other in ({"scaling": 0.3}, {"scaling": 0.8, "diameter": 100.0}):
        assert float(divergence_tensor(x, y, blur=1.0, **other)) != pytest.approx(usual, rel=1e-4)


def test_points_that_are_not_finite_are_counted_and_refused():
    x = cloud(seed=1)
    x[3, 0], x[5] = math.nan, math.inf
    for clouds in ((x, cloud()), (cloud(), x)):
        with pytest.raises(ValueError, match=r"^W2: found 2 of \d+ points not finite$"):
            w2_squared(*clouds)


def test_the_floor_is_not_zero():
    """Two samples of one law differ: for 64 standard normal points W2 is about 0.4, never below 0.1."""
    assert math.sqrt(w2_squared(cloud(seed=1), cloud(seed=2))) > 0.1
