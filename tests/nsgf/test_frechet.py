"""The Fréchet distance of the normal laws that fit two clouds, against closed forms and an independent matrix root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from nsgf.metrics import frechet_distance


def fitted(mean, covariance, n=200, seed=0):
    """A cloud (n, d) in float64 whose sample mean and unbiased sample covariance are exactly the given ones."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ whitened).T + mean


def rotated(values, angle):
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T


def by_sqrtm(x, y):
    """As the FID paper's own code does: the root of the product of two covariances, by a general matrix function."""
    s, other = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(s @ other)
    mean = x.numpy().mean(0) - y.numpy().mean(0)
    return mean @ mean + np.trace(s) + np.trace(other) - 2 * np.trace(root).real


def test_commuting_covariances_follow_the_closed_form():
    """|m - m'|^2 + sum (sigma - sigma')^2 = 25 + (3 - 1)^2 + (2 - 5)^2."""
    x = fitted([0.0, 0.0], torch.diag(torch.tensor([9.0, 4.0])))
    y = fitted([3.0, 4.0], torch.diag(torch.tensor([1.0, 25.0])), seed=1)
    assert frechet_distance(x, y) == pytest.approx(25 + 4 + 9, rel=1e-12)


def test_covariances_that_do_not_commute_follow_the_closed_form():
    """In two dimensions tr (S S')^(1/2) = (tr S S' + 2 (det S det S')^(1/2))^(1/2). The roots' own product would be wrong."""
    s, other = rotated([9.0, 1.0], 0.3), rotated([4.0, 0.25], 1.2)
    cross = ((s @ other).trace() + 2 * (s.det() * other.det()).sqrt()).sqrt()
    found = frechet_distance(fitted([0.0, 0.0], s), fitted([0.0, 0.0], other, seed=1))
    assert found == pytest.approx(float(s.trace() + other.trace() - 2 * cross), rel=1e-12)


def test_it_agrees_with_a_general_matrix_root():
    x, y = (torch.randn(60, 12, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    y = y @ torch.randn(12, 12, generator=torch.Generator().manual_seed(2)).double() + 0.5
    assert frechet_distance(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-9)


def test_fewer_points_than_dimensions_are_no_obstacle():
    """Of 5 points in 40 dimensions the covariances have rank 4. Where they lie in planes without a common direction, nothing
    is transported inside a plane: the distance is that of the means and both traces."""
    x, y = torch.zeros(5, 40), torch.zeros(5, 40)
    x[:, :4], y[:, 4:8] = (torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_few_points_against_themselves_moved_cost_the_move():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(x, x + 0.5) == pytest.approx(40 * 0.25, rel=1e-6)


def test_a_cloud_has_no_distance_to_itself():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_it_is_symmetric():
    x, y = fitted([0.0, 1.0], rotated([9.0, 1.0], 0.3)), fitted([2.0, 0.0], rotated([4.0, 0.25], 1.2), seed=1)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)


def test_features_in_float32_lose_no_digits():
    """Far from the origin a covariance in float32 would be noise: 1e4 squared leaves it no digit of a variance of one."""
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    assert frechet_distance(x, x.double() + 1) == pytest.approx(3, rel=1e-6)


def test_one_dimension_is_enough():
    """(m - m')^2 + (sigma - sigma')^2."""
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([[4.0], [8.0]])
    sigma, other = 2**0.5, 8**0.5
    assert frechet_distance(x, y) == pytest.approx(36 + (other - sigma) ** 2, rel=1e-12)
