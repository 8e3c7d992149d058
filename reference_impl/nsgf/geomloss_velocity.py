"""The velocity of the Sinkhorn gradient flow as the paper computes it: GeomLoss and autograd (appendix E.2, page 14)."""

from __future__ import annotations

import torch
from geomloss import SamplesLoss
from torch import Tensor


def velocity(x: Tensor, y: Tensor, *, blur: float, scaling: float, backend: str) -> Tensor:
    """Eq. 13 (page 4): gradient of f_xx minus gradient of f_xy at the particles x (n, d), targets y (m, d)."""
    loss = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, debias=False, potentials=True, backend=backend)
    gradients = []
    for targets in (x.detach(), y):
        with torch.enable_grad():
            particles = x.detach().requires_grad_(True)
            f, _ = loss(particles, targets)
            gradients.append(torch.autograd.grad(f.sum(), particles)[0])
    return gradients[0] - gradients[1]
