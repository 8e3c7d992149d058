"""Distances between two clouds of points or features, each under the name of what it computes.

Table 1 calls its numbers "2-Wasserstein distance"; refs/nsgf.md shows why they cannot all be one.
"""

from __future__ import annotations

import ot
import torch
from geomloss import SamplesLoss
from torch import Tensor


def w2_squared(x: Tensor, y: Tensor) -> float:
    """Exact squared 2-Wasserstein distance of uniform clouds x (n, d), y (m, d): cost |x - y|^2, no half, in float64.

    Raises ValueError for points that are not finite: POT would answer 0, a perfect score, with a warning.
    """
    for cloud in (x, y):
        if not cloud.isfinite().all():
            raise ValueError(f"W2: found {int((~cloud.isfinite()).any(1).sum())} of {len(cloud)} points not finite")
    cost = ot.dist(x.double().cpu().numpy(), y.double().cpu().numpy(), metric="sqeuclidean")
    return float(ot.emd2([], [], cost, numItermax=2_000_000))


def transport_distances(x: Tensor, y: Tensor) -> dict[str, float]:
    """The three readings of "2-Wasserstein": w2, w2_squared, half_w2_squared."""
    squared = w2_squared(x, y)
    return {"w2": squared**0.5, "w2_squared": squared, "half_w2_squared": squared / 2}


def sinkhorn_divergence(x: Tensor, y: Tensor, *, blur: float, scaling: float) -> float:
    """GeomLoss' debiased divergence, cost |x - y|^2 / 2: what the authors' 2-D evaluators print as "W2"."""
    return float(divergence_tensor(x, y, blur=blur, scaling=scaling))


def divergence_tensor(x: Tensor, y: Tensor, *, blur: float, scaling: float, diameter: float | None = None) -> Tensor:
    """The same, (), without waiting for the device when `diameter` is given: where the annealing starts, else measured."""
    loss = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, diameter=diameter, backend="tensorized")
    with torch.no_grad():
        return loss(x, y)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The squared Fréchet distance |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the normal laws that fit x (n, d) and y (m, d), in float64.

    FID is this in Inception features (Heusel et al. 2017, eq. 6); in other features it is another number and not called FID.
    The trace of the root is taken from the eigenvalues of R S' R with R = S^(1/2), which is symmetric: no complex numbers appear.
    """
    x, y = x.double(), y.double()
    s, other = torch.atleast_2d(x.T.cov()), torch.atleast_2d(y.T.cov())
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + s.trace() + other.trace() - 2 * cross)
