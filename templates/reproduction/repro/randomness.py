"""Every random draw is a pure function of what it is for, so a resumed run needs no saved random state."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: str | int) -> int:
    """A seed for the draw that `parts` name, e.g. (run seed, phase, "step", 17). Below 2**32.

    PyTorch's CPU generator keeps 32 bits of a seed: a wider one would promise more streams than there are.
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for the draw that `parts` name."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


def seed_global_generators(*parts: str | int) -> None:
    """Seeds what a library draws from without asking: Python, NumPy and PyTorch (dropout, weight initialisation)."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
