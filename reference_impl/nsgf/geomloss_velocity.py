"""Velocity of the Sinkhorn flow the paper's own way: two GeomLoss calls and autograd. Kept as the reference.

Source: NSGF++, arXiv:2401.14069v1, eq. 13 and Remark 1; settings of the authors' algorithm/Sinkhorn_flow.py
(p=2, debias=False, potentials=True). `nsgf.sinkhorn` gives the same numbers faster.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pykeops
import torch
from geomloss import SamplesLoss
from torch import Tensor

from nsgf.sinkhorn import bounding_diameter, check_clouds

pykeops.set_verbose(False)  # KeOps reports each compilation on stdout, which belongs to results
BACKENDS = ("tensorized", "online")


def velocity(
    x: Tensor, y: Tensor, *, blur: float, scaling: float, backend: str, diameter: float | None = None
) -> Tensor:
    """Velocity v (n, d) at the particles x (n, d) towards the targets y (m, d); particles move by dx/dt = +v.

    x, y: float32 or float64, one dtype and device; images flattened (GeomLoss reads (n, h, w) as a batch of n
    clouds, without a word). backend: "tensorized" (n x m matrices) or "online" (KeOps: no matrices, compiles
    once per dtype and dimension, and rounds 1 / eps to float32 even for float64 points). diameter: where the
    annealing starts; None measures it, which tensors without values do not allow.
    Raises ValueError for other shapes, dtypes or backends and for particles that all coincide, RuntimeError
    for "online" without a C++ compiler, or with KeOps in a folder whose path has a space.
    """
    check_clouds(x, y)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {BACKENDS}")
    if backend == "online" and compiler() is None:
        raise RuntimeError('backend "online" compiles at first use: install g++ or set CXX to a C++ compiler')
    if backend == "online" and " " in keops_folder():
        found = f"found a space in {keops_folder()}, which KeOps hands to the compiler without quotes"
        raise RuntimeError(f'backend "online": {found}; make the environment in another folder')
    if diameter is None and bounding_diameter(x, x) == 0:
        raise ValueError("all particles coincide: GeomLoss cannot anneal from diameter 0; nsgf.sinkhorn can")
    settings = {"p": 2, "blur": blur, "scaling": scaling, "diameter": diameter}
    loss = SamplesLoss("sinkhorn", **settings, debias=False, potentials=True, backend=backend)
    # GeomLoss leaves gradients switched on; the context gives the caller's setting back.
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        particles = x.detach().requires_grad_()
        return _gradient(loss, particles, particles.detach()) - _gradient(loss, particles, y.detach())


def compiler() -> str | None:
    """Path of the C++ compiler that KeOps would take, or None."""
    names = (os.environ.get("CXX", ""), "clang++" if sys.platform == "darwin" else "g++", "g++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def keops_folder() -> str:
    """Where KeOps is installed; its kernels are compiled against its own headers. Empty where it is not."""
    found = find_spec("keopscore")
    return str(Path(found.origin).parent) if found and found.origin else ""


def _gradient(loss: SamplesLoss, particles: Tensor, targets: Tensor) -> Tensor:
    f, _ = loss(particles, targets)
    (gradient,) = torch.autograd.grad(f.sum(), particles)
    return gradient
