"""A pool of training examples that is built once and sampled at every step (SKILL section 7).

It lives on the CPU in tensors of their final size. Filling it copies nothing twice, and a minibatch costs the
same whether the pool holds five thousand entries or half a million.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repro.checkpoint import flush


class Pool:
    """Named columns of equal length, e.g. x (capacity, d), v (capacity, d), t (capacity,).

    An entry's values lie side by side in memory: drawing it at random touches one place, not one per column.
    """

    def __init__(self, capacity: int, columns: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
        self._shapes = {name: tuple(shape) for name, shape in columns.items()}
        self._rows = torch.empty((capacity, sum(math.prod(shape) for shape in self._shapes.values())), dtype=dtype)
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the pool holds."""
        return self._rows.numel() * self._rows.element_size()

    @property
    def columns(self) -> dict[str, Tensor]:
        """Views of the filled entries, (entries, *shape) each."""
        return self._split(self._rows[: self._filled])

    def add(self, **rows: Tensor) -> None:
        """Writes rows, each (n, *shape), behind those already there. Raises ValueError when they do not fit."""
        if rows.keys() != self._shapes.keys():
            raise ValueError(f"pool rows: found {sorted(rows)}, expected {sorted(self._shapes)}")
        counts = {len(row) for row in rows.values()}
        if len(counts) != 1:
            raise ValueError(f"pool rows: found {sorted(counts)} entries, expected the same number in every column")
        end = self._filled + counts.pop()
        if end > len(self._rows):
            raise ValueError(f"pool rows: found {end} entries, expected at most {len(self._rows)}")
        targets = self._split(self._rows[self._filled : end])
        for name, row in rows.items():
            if row.shape != targets[name].shape:
                raise ValueError(f"pool column {name}: found {tuple(row.shape)}, expected {tuple(targets[name].shape)}")
        for name, row in rows.items():
            targets[name].copy_(row.detach())
        self._filled = end

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n entries drawn uniformly with replacement, on the CPU. Raises ValueError until the pool is full."""
        self._require_full()
        index = torch.randint(len(self._rows), (n,), generator=generator)
        return self._split(self._rows.index_select(0, index))

    def save(self, path: Path) -> None:
        """Writes the pool in one atomic step. Raises ValueError until it is full."""
        self._require_full()
        partial = path.with_name(path.name + ".partial")
        save_file({"rows": self._rows}, partial, metadata={"shapes": json.dumps(self._shapes)})
        flush(partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Pool:
        """A pool that `save` wrote. Raises ValueError when the file is no such pool."""
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                rows, shapes = file.get_tensor("rows"), json.loads((file.metadata() or {})["shapes"])
            pool = cls(0, shapes, rows.dtype)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no pool: {error}") from None
        pool._rows, pool._filled = rows, len(rows)
        return pool

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of (n, width) rows as the named columns, (n, *shape) each."""
        parts = rows.split([math.prod(shape) for shape in self._shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _require_full(self) -> None:
        if self._filled != len(self._rows):
            raise ValueError(f"pool: found {self._filled} entries, expected all {len(self._rows)}")
