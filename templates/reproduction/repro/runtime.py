"""Where a run runs: what the machine is, and nothing that shapes a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from repro.distributed import World

PoolStorage = Literal["auto", "memory", "disk"]


@dataclass(frozen=True)
class Runtime:
    """Device, folder of data sets, where pools are kept, and this process among the others."""

    device: torch.device
    data_root: Path = Path("data")
    pool_storage: PoolStorage = "auto"
    world: World = field(default_factory=World)
