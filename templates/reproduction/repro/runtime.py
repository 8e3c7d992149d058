"""Where a run runs: what the machine is, and nothing that shapes a result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from repro.distributed import World

PoolStorage = Literal["auto", "memory", "disk"]


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within this block a GPU takes algorithms that give the same bits each time, as a CPU with a fixed number of threads does.

    Otherwise its convolutions add up gradients in the order in which they happen to be ready, and no resume can be exact.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before it is first used
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Runtime:
    """Device, folder of data sets, where pools are kept, and this process among the others.

    `stand_in_data`: a method reads no data set and takes a few random examples of the same shape, range and type in its
    place. `repro preflight` sets it where data is not to be had; no run ever does.
    """

    device: torch.device
    data_root: Path = Path("data")
    pool_storage: PoolStorage = "auto"
    world: World = field(default_factory=World)
    stand_in_data: bool = False
