"""Velocity of the Sinkhorn gradient flow, in closed form and without autograd.

Source: NSGF++, arXiv:2401.14069v1, section 4.2 eq. 13 (velocity of a finite sample), appendix A eq. 17-18
(potentials), Remark 1 (computed with GeomLoss). Conventions of GeomLoss 0.3.1, SamplesLoss("sinkhorn", p=2):
cost C_ij = |x_i - y_j|^2 / 2, temperature eps = blur^2, weights 1/n and 1/m, loop annealed and truncated.

The gradient of the potential f that GeomLoss' autograd sees is x_i minus a barycentre, so in eq. 13

    v_i = grad f_xx(x_i) - grad f_xy(x_i) = sum_j P_ij y_j - sum_j Q_ij x_j,

P and Q being the row-normalised plans between x and y, and between x and x: no graph has to be kept. The loop
is truncated, not converged: `scaling` is part of the method, and another solver gives another velocity (up to
a third of it at blur .05, scaling .5).

Two identities make the loop cheap:

1. -C_ij = <x_i, y_j> - |x_i|^2/2 - |y_j|^2/2. With f' = f - |x|^2/2 + c and g' = g - |y|^2/2 - c the exponent
   of the plan is (f'_i + g'_j + <x_i, y_j>) / eps, for any constant c. For images these three are some ten to
   a hundred times smaller than f, g and C, and so is their rounding in float32, which 1 / eps magnifies.
2. The softmin of eq. 17 at the present f, g is A(g)_i = f_i - eps log sum_j K_ij / m with
   K_ij = exp((f_i + g_j - C_ij) / eps): one matrix of exponentials serves both halves of eq. 18, f by its row
   sums and g by its column sums. Between x and itself f = g, and row sums are enough.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Nothing below these exponents is exponentiated. Denormal numbers cost some 100 cycles each: a matrix product
# of them was measured 200 times slower. The margin to the last normal (-87, -708) keeps products normal too.
EXPONENT_FLOOR = {torch.float32: -70.0, torch.float64: -650.0}
# Means of exponentials are trusted while |log mean| stays below: what the floor adds is then under exp(-25).
LOG_MEAN_LIMIT = {torch.float32: 45.0, torch.float64: 600.0}
# Rows are exponentiated in blocks of this size, which stay in the cache of one core over six passes.
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Potentials:
    """W_eps-potentials of two clouds (paper eq. 18) and what the projection needs besides them.

    f: (n,) at x. g: (m,) at y. eps: last temperature, blur**2. inner: (n, m) products <x_i, y_j>.
    reduced_g: (m,) g' of the module's first identity; recomputed from g it would have lost digits.
    """

    f: Tensor
    g: Tensor
    eps: float
    inner: Tensor
    reduced_g: Tensor


def epsilon_schedule(diameter: float, blur: float, scaling: float) -> tuple[float, ...]:
    """Temperatures of the annealing from diameter**2 to blur**2, as `epsilon_schedule` of GeomLoss (p=2).

    The first temperature comes twice, as in GeomLoss. Where GeomLoss crashes, on a diameter of 0 (all points
    coincide), the only temperature is blur**2. Raises ValueError for a diameter < 0 or not finite, blur <= 0,
    or scaling outside (0, 1).
    """
    if not 0 <= diameter < math.inf:
        raise ValueError(f"diameter is {diameter}, expected a finite number >= 0; are all points finite?")
    if not 0 < blur < math.inf:
        raise ValueError(f"blur is {blur}, expected a finite number > 0")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling is {scaling}, expected a number in (0, 1)")
    if diameter == 0:
        return (blur**2,)
    # numpy's arange, not a loop of ours: its rounding decides the number of iterations at the boundary
    cooling = np.exp(np.arange(2 * np.log(diameter), 2 * np.log(blur), 2 * np.log(scaling)))
    return (diameter**2, *cooling.tolist(), blur**2)


def bounding_diameter(x: Tensor, y: Tensor) -> float:
    """Diagonal of the box around x (n, d) and y (m, d), GeomLoss' `max_diameter`; waits for the device.

    Not finite if and only if a point is not finite or the box overflows, so it checks the input at no cost.
    """
    low, high = torch.aminmax(x, dim=0)
    if y is not x:
        low, high = torch.minimum(low, y.amin(0)), torch.maximum(high, y.amax(0))
    return float((high - low).norm())


def check_clouds(x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless x and y are non-empty (n, d) and (m, d) of one dtype and one device."""
    for name, cloud in (("x", x), ("y", y)):
        if cloud.ndim != 2 or 0 in cloud.shape:
            hint = "; flatten images with .flatten(1)" if cloud.ndim > 2 else ""
            shape = tuple(cloud.shape)
            raise ValueError(f"{name} has shape {shape}, expected (points, dimensions), both > 0{hint}")
        if cloud.dtype not in EXPONENT_FLOOR:
            raise ValueError(f"{name} has dtype {cloud.dtype}, expected torch.float32 or torch.float64")
    for name in ("dtype", "device"):
        if getattr(x, name) != getattr(y, name):
            raise ValueError(f"y has {name} {getattr(y, name)}, expected {getattr(x, name)} as x")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y has shape {tuple(y.shape)}, expected (points, {x.shape[1]}) as x has")


def potentials(x: Tensor, y: Tensor, *, blur: float, scaling: float, diameter: float | None = None) -> Potentials:
    """Fixed point of eq. 18 approached by GeomLoss' loop: eps annealed, f and g updated at once and averaged.

    x: (n, d), y: (m, d), same dtype (float32 or float64) and device; `y is x` selects the cheaper symmetric
    loop. diameter: where the annealing starts; None measures it (GeomLoss' default). Errors: see `velocity`.
    """
    check_clouds(x, y)
    schedule = epsilon_schedule(bounding_diameter(x, y) if diameter is None else diameter, blur, scaling)
    n, m = len(x), len(y)
    with torch.no_grad():
        inner = _product(x, y.T)
        halves = _balanced_half_squares(x, y)
        h = halves.neg()  # f' and g' in one vector; f = g = 0 before the first softmin
        log_means = (_log_means_fast if _is_eager_cpu(x) else _log_means_stable)(inner, y is x)
        h.sub_(log_means(h, schedule[0]), alpha=schedule[0])
        for eps in schedule:
            h.sub_(log_means(h, eps), alpha=eps / 2)  # (f + A(g)) / 2, and the same for g
        full = h + halves
    return Potentials(full[:n], full[-m:], schedule[-1], inner, h[-m:])


def barycentric_projection(p: Potentials, y: Tensor) -> Tensor:
    """(n, d): sum_j P_ij y_j, where row i of P is the softmax over j of (g_j - C_ij) / eps.

    This is x_i - grad f(x_i) for f extended by one last softmin, which is what GeomLoss' autograd sees.
    """
    out = y.new_empty(len(p.inner), y.shape[1])
    with torch.no_grad():
        for rows in _row_blocks(p.inner):
            plan = torch.add(p.reduced_g / p.eps, p.inner[rows], alpha=1 / p.eps)  # f_i, |x_i|^2 cancel in the softmax
            plan.sub_(plan.amax(1, keepdim=True)).clamp_(min=EXPONENT_FLOOR[y.dtype]).exp_()
            out[rows] = _product(plan.div_(plan.sum(1, keepdim=True)), y)
    return out


def velocity(x: Tensor, y: Tensor, *, blur: float, scaling: float, diameter: float | None = None) -> Tensor:
    """Velocity of the Sinkhorn flow at the particles x towards the targets y; particles move by dx/dt = +v.

    x: (n, d) particles, y: (m, d) targets, same dtype (float32 or float64) and device; images flattened.
    blur, scaling: GeomLoss' settings (paper E.2: blur in {.5, 1, 2}, scaling in {.80, .85, .95}).
    diameter: start of the annealing of both problems; None measures it on the data, as GeomLoss does. It has
    to be given for tensors without values (FakeTensorMode).
    Returns v, shape and dtype of x, detached. Equals two SamplesLoss calls with debias=False and autograd
    (`nsgf.geomloss_velocity`) up to rounding.
    Raises ValueError for anything but two non-empty (n, d), (m, d) of one dtype and device, for points that
    are not finite, blur <= 0, scaling outside (0, 1); FloatingPointError when finite points overflow.
    Source: paper eq. 13, section 4.2, page 4; two calls without debiasing: the authors' Sinkhorn_flow.py.
    """
    check_clouds(x, y)
    x, y = x.detach(), y.detach()
    settings = {"blur": blur, "scaling": scaling, "diameter": diameter}
    v = barycentric_projection(potentials(x, y, **settings), y)
    v -= barycentric_projection(potentials(x, x, **settings), x)
    if _has_values(v) and not math.isfinite(v.sum()):
        raise FloatingPointError(f"velocity is not finite: x or y is not, or products overflow {x.dtype}")
    return v


def _log_means_fast(inner: Tensor, symmetric: bool) -> Callable[[Tensor, float], Tensor]:
    """For the CPU: step(h, eps) -> log of the row means of K, then of its column means unless symmetric.

    Not shifted by row maxima: near the fixed point the means are near 1 (eq. 19). Each step looks at its
    result and repeats itself by the stable formula if that left the safe range, as it does when scaling .5
    cools an image batch to blur .05 in float32.
    """
    n, m = inner.shape
    blocks = _row_blocks(inner)
    # Buffers and their views are made once: at n = 128, slicing or allocating costs as much as computing.
    buffer = torch.empty_like(inner[blocks[0]])
    scaled, means = inner.new_empty(2, n if symmetric else n + m).unbind()
    counts = torch.cat([inner.new_full((n,), m), inner.new_full((m,), n)])[: len(means)]
    scaled_g, column_means, column_sums = scaled[-m:], means[-m:], inner.new_empty(m)
    views = [(scaled[r, None], inner[r], buffer[: r.stop - r.start], means[r]) for r in blocks]
    floor, limit = EXPONENT_FLOOR[inner.dtype], LOG_MEAN_LIMIT[inner.dtype]
    stable = _log_means_stable(inner, symmetric)

    def step(h: Tensor, eps: float) -> Tensor:
        torch.mul(h, 1 / eps, out=scaled)
        for f, products, kernel, row_sums in views:
            torch.add(f, products, alpha=1 / eps, out=kernel)
            kernel.add_(scaled_g).clamp_(min=floor).exp_()
            torch.sum(kernel, 1, out=row_sums)
            if not symmetric:
                first = row_sums is views[0][3]
                torch.sum(kernel, 0, out=column_means if first else column_sums)
                if not first:
                    column_means.add_(column_sums)
        means.div_(counts).log_()
        trusted = torch.linalg.vector_norm(means, math.inf).item() <= limit  # False for nan
        return means if trusted else stable(h, eps)

    return step


def _log_means_stable(inner: Tensor, symmetric: bool) -> Callable[[Tensor, float], Tensor]:
    """The same by log-sum-exp: safe at any scale, and no branch on values, so no waiting for a GPU."""
    n, m = inner.shape

    def step(h: Tensor, eps: float) -> Tensor:
        exponents = (inner + h[:n, None]).add_(h[-m:]).div_(eps)
        rows = exponents.logsumexp(1).sub_(math.log(m))
        return rows if symmetric else torch.cat([rows, exponents.logsumexp(0).sub_(math.log(n))])

    return step


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b at full precision, whatever the caller chose for a network: TF32, bfloat16 or autocast would put
    errors of 1e-3 |x|^2 into exponents that are then divided by eps."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float64 or _matmul_keeps_float32():
            return a @ b
        return (a.double() @ b.double()).float()


def _matmul_keeps_float32() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # since torch 2.9: it refuses to answer once a backend's own fp32_precision was set
        return False


def _balanced_half_squares(x: Tensor, y: Tensor) -> Tensor:
    """|x|^2/2 - c and |y|^2/2 + c in one vector, (n,) if y is x; c makes their means equal, for then f' and
    g' stay small: otherwise they settle near plus and minus (mean |x|^2 - mean |y|^2) / 4."""
    halves_x = torch.linalg.vector_norm(x, dim=1).square_().div_(2)
    if y is x:
        return halves_x
    halves_y = torch.linalg.vector_norm(y, dim=1).square_().div_(2)
    c = (halves_x.mean() - halves_y.mean()) / 2
    return torch.cat([halves_x - c, halves_y + c])


def _row_blocks(matrix: Tensor) -> list[slice]:
    n, m = matrix.shape
    size = max(1, BLOCK_BYTES // (m * matrix.element_size())) if _is_eager_cpu(matrix) else n
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _has_values(x: Tensor) -> bool:
    return type(x) is Tensor  # a FakeTensor has a shape only


def _is_eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and _has_values(x)  # without values it stands for a tensor of a GPU
