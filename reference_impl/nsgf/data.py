"""The 2-D laws of section 5.1 (page 6) and appendix E.1 (page 13), as samplers of independent points.

The paper names the sets and points to torchcfm, which holds two families of generators that differ in scale.
Taken here is the one whose axes fit the paper's figures (-6 to 6); spec.yaml lists the alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EIGHT_RADIUS = 5.0
EIGHT_STD = 0.1**0.25  # torchcfm passes sqrt(0.1) as a covariance

LAWS = ("gaussian", "8gaussians", "moons", "scurve", "checkerboard")


def sample(law: str, n: int, generator: torch.Generator) -> Tensor:
    """n independent points of `law`, (n, 2) float32 on the CPU. Raises KeyError for an unknown law."""
    return _SAMPLERS[law](n, generator)


def _gaussian(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def _eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centre = EIGHT_RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)  # (n, 2)
    return centre + EIGHT_STD * torch.randn(n, 2, generator=generator)


def _moons(n: int, generator: torch.Generator) -> Tensor:
    """Two half circles, blurred along the diagonal by one uniform draw for both coordinates, times 3, minus 1."""
    angle = math.pi * torch.rand(n, generator=generator)
    outer = torch.stack([angle.cos(), angle.sin()], dim=1)
    inner = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    is_outer = torch.rand(n, 1, generator=generator) < 0.5
    blur = 0.2 * torch.rand(n, 1, generator=generator)
    return 3 * (torch.where(is_outer, outer, inner) + blur) - 1


def _scurve(n: int, generator: torch.Generator) -> Tensor:
    """scikit-learn's S-curve seen from the side, times 1.5."""
    angle = 3 * math.pi * (torch.rand(n, generator=generator) - 0.5)
    curve = torch.stack([angle.sin(), angle.sign() * (angle.cos() - 1)], dim=1)
    return 1.5 * (curve + 0.05 * torch.randn(n, 2, generator=generator))


def _checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Eight unit squares of side 2 on [-4, 4] x [-4, 4], as in FFJORD."""
    x = 4 * torch.rand(n, generator=generator) - 2
    row = 2.0 * torch.randint(2, (n,), generator=generator)
    y = torch.rand(n, generator=generator) - row + x.floor().remainder(2)
    return 2 * torch.stack([x, y], dim=1)


_SAMPLERS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "8gaussians": _eight_gaussians,
    "moons": _moons,
    "scurve": _scurve,
    "checkerboard": _checkerboard,
}
