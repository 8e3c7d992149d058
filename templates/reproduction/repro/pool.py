"""A pool of training examples that is built once and sampled at every step (SKILL section 7).

It lives on the CPU in tensors of their final size. Filling it copies nothing twice, and a minibatch costs the
same whether the pool holds five thousand entries or half a million.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repro.checkpoint import flush


class Pool:
    """Named columns of equal length, e.g. x (capacity, d), v (capacity, d), t (capacity,)."""

    def __init__(self, capacity: int, columns: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
        self._columns = {name: torch.empty((capacity, *shape), dtype=dtype) for name, shape in columns.items()}
        self._capacity = capacity
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the pool holds."""
        return sum(column.numel() * column.element_size() for column in self._columns.values())

    def add(self, **rows: Tensor) -> None:
        """Writes rows, each (n, *shape), behind those already there. Raises ValueError when they do not fit."""
        if rows.keys() != self._columns.keys():
            raise ValueError(f"pool rows: found {sorted(rows)}, expected {sorted(self._columns)}")
        counts = {len(row) for row in rows.values()}
        if len(counts) != 1:
            raise ValueError(f"pool rows: found {sorted(counts)} entries, expected the same number in every column")
        end = self._filled + counts.pop()
        if end > self._capacity:
            raise ValueError(f"pool rows: found {end} entries, expected at most {self._capacity}")
        for name, row in rows.items():
            target = self._columns[name][self._filled : end]
            if row.shape != target.shape:
                raise ValueError(f"pool column {name}: found {tuple(row.shape)}, expected {tuple(target.shape)}")
            target.copy_(row.detach())
        self._filled = end

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n entries drawn uniformly with replacement, on the CPU. Raises ValueError until the pool is full."""
        self._require_full()
        index = torch.randint(self._capacity, (n,), generator=generator)
        return {name: column[index] for name, column in self._columns.items()}

    def save(self, path: Path) -> None:
        """Writes the pool in one atomic step. Raises ValueError until it is full."""
        self._require_full()
        partial = path.with_name(path.name + ".partial")
        save_file(self._columns, partial)
        flush(partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Pool:
        """A pool that `save` wrote. Raises ValueError when the file is no such pool."""
        try:
            columns = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no pool: {error}") from None
        pool = cls(0, {})
        pool._columns = columns
        pool._capacity = pool._filled = len(next(iter(columns.values())))
        return pool

    def _require_full(self) -> None:
        if self._filled != self._capacity:
            raise ValueError(f"pool: found {self._filled} entries, expected all {self._capacity}")
