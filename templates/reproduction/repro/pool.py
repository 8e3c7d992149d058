"""A pool of training examples that is built once and sampled at every step (SKILL section 7).

It lies on the CPU, in memory or in a file that is mapped into memory. Filling it copies nothing twice, and a
minibatch costs the same whether the pool holds five thousand entries or half a million.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from repro.checkpoint import flush
from repro.errors import RunFailed
from repro.runtime import PoolStorage, available_host_bytes

DTYPES = {torch.float32: ("F32", np.float32), torch.float16: ("F16", np.float16)}
DTYPE_OF = {name: dtype for dtype, (name, _) in DTYPES.items()}
MEMORY_SHARE, DISK_SHARE = 0.7, 0.9


class Pool:
    """Named columns of equal length, e.g. x (capacity, d), v (capacity, d), t (capacity,).

    An entry's values lie side by side in memory: drawing it at random touches one place, not one per column.
    """

    def __init__(
        self, capacity: int, columns: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
    ):
        self._shapes = {name: tuple(shape) for name, shape in columns.items()}
        self._rows = torch.empty((capacity, width(columns)), dtype=dtype)
        self._filled = 0

    @classmethod
    def in_file(
        cls,
        path: Path,
        capacity: int,
        columns: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
    ) -> Pool:
        """An empty pool whose rows are those of the file at `path`, made by `make_file`: what is written goes
        to the disk.

        Raises ValueError when the file has another size.
        """
        pool = cls(0, columns, dtype)
        start = _start_of_file(columns, capacity, dtype)
        size = len(start) + capacity * width(columns) * dtype.itemsize
        if path.stat().st_size != size:  # NumPy would lengthen a file that is too short
            raise ValueError(f"{path}: found {path.stat().st_size} bytes, expected {size}")
        rows = np.memmap(path, DTYPES[dtype][1], "r+", len(start), (capacity, width(columns)))
        pool._rows = torch.from_numpy(rows)
        return pool

    def __len__(self) -> int:
        return self._filled

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, or of the disk, that the pool holds."""
        return self._rows.numel() * self._rows.element_size()

    @property
    def columns(self) -> dict[str, Tensor]:
        """Views of the filled entries, (entries, *shape) each."""
        return self._split(self._rows[: self._filled])

    def add(self, **rows: Tensor) -> None:
        """Writes rows, each (n, *shape), behind those already there. Raises ValueError when they do not
        fit."""
        self._filled = self._write(self._filled, rows)

    def replace(self, first: int, **rows: Tensor) -> None:
        """Writes rows, each (n, *shape), over the entries from number `first` on. Raises ValueError when they
        do not fit."""
        self._write(first, rows)

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n entries drawn uniformly with replacement, float32 on the CPU. Raises ValueError until the pool is
        full."""
        self._require_full()
        index = torch.randint(len(self._rows), (n,), generator=generator)
        return self._split(self._rows.index_select(0, index).float())

    def save(self, path: Path) -> None:
        """Writes the pool in one atomic step. Raises ValueError until it is full."""
        self._require_full()
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            file.write(_start_of_file(self._shapes, len(self._rows), self._rows.dtype))
            self._rows.numpy().tofile(file)
        publish(partial, path)

    @classmethod
    def load(cls, path: Path) -> Pool:
        """A pool that `save` wrote; its rows are read when they are drawn. Raises ValueError when the file is
        no such pool."""
        try:
            with safe_open(path, framework="np") as file:
                rows, columns = file.get_slice("rows"), json.loads((file.metadata() or {})["shapes"])
                capacity, dtype = rows.get_shape()[0], DTYPE_OF[rows.get_dtype()]
            # Not file.get_tensor, which maps a private copy: the system refuses one that is larger than its
            # memory.
            pool = cls.in_file(path, capacity, columns, dtype)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no pool: {error}") from None
        pool._filled = capacity
        return pool

    def into_memory(self) -> Pool:
        """The same pool with its rows in memory of their own."""
        self._rows = self._rows.clone()
        return self

    def _write(self, first: int, rows: Mapping[str, Tensor]) -> int:
        """The number of the entry behind the last one written."""
        if rows.keys() != self._shapes.keys():
            raise ValueError(f"pool rows: found {sorted(rows)}, expected {sorted(self._shapes)}")
        counts = {len(row) for row in rows.values()}
        if len(counts) != 1:
            raise ValueError(
                f"pool rows: found {sorted(counts)} entries, expected the same number in every column"
            )
        end = first + counts.pop()
        if end > len(self._rows):
            raise ValueError(f"pool rows: found {end} entries, expected at most {len(self._rows)}")
        targets = self._split(self._rows[first:end])
        for name, row in rows.items():
            if row.shape != targets[name].shape:
                raise ValueError(
                    f"pool column {name}: found {tuple(row.shape)}, expected {tuple(targets[name].shape)}"
                )
        for name, row in rows.items():
            targets[name].copy_(row.detach())
        return end

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


def width(columns: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in one entry."""
    return sum(math.prod(shape) for shape in columns.values())


def make_file(
    path: Path, capacity: int, columns: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> None:
    """An empty file for `Pool.in_file`, in the format of safetensors. Raises RunFailed when the disk is
    full."""
    start = _start_of_file(columns, capacity, dtype)
    size = len(start) + capacity * width(columns) * dtype.itemsize
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            # Now and not at the first write: a disk that is full then kills the process without a word.
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise RunFailed(
                    f"{path}: the disk does not take the {gib(size)} of the pool: {error.strerror}"
                ) from None


def publish(partial: Path, path: Path) -> None:
    """Gives a finished file its name, after its bytes are on the disk."""
    flush(partial)
    os.replace(partial, path)


def _start_of_file(columns: Mapping[str, tuple[int, ...]], capacity: int, dtype: torch.dtype) -> bytes:
    """What a safetensors file with the one tensor `rows` begins with: a length, and that much JSON padded to
    eight bytes."""
    size = (capacity, width(columns))
    rows = {"dtype": DTYPES[dtype][0], "shape": size, "data_offsets": (0, math.prod(size) * dtype.itemsize)}
    header = json.dumps({"__metadata__": {"shapes": json.dumps(dict(columns))}, "rows": rows}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header


@dataclass(frozen=True)
class Placement:
    """Where a pool is kept, from what the machine has at this moment."""

    storage: PoolStorage
    """memory or disk."""
    kept: bool
    """Whether its file survives a kill. Otherwise a resumed run builds it again, to the same bits."""
    reason: str


def place(nbytes: int, folder: Path, *, asked: PoolStorage, processes: int, own: int = 0) -> Placement | None:
    """Where a pool of `nbytes` bytes can be kept; None when there is room nowhere.

    In memory when it takes at most 70 percent of what is available (all of it, when memory is asked for),
    else in a file in `folder` when it takes at most 90 percent of what is free. Several processes share one
    file. Both give the same minibatches. `own` bytes of the disk are the pool's already.
    """
    memory, disk = free(folder)
    disk += own
    room = f"{gib(nbytes)} needed, {gib(memory)} of memory available, {gib(disk)} of disk free"
    fits_disk = nbytes <= DISK_SHARE * disk
    fits_memory = nbytes <= (memory if asked == "memory" else MEMORY_SHARE * memory)
    if fits_memory and asked != "disk" and processes == 1:
        return Placement("memory", fits_disk, room)
    return Placement("disk", True, room) if fits_disk and asked != "memory" else None


def free(folder: Path) -> tuple[int, int]:
    """Bytes of memory that are available, and of disk that are free for files in `folder`."""
    return available_host_bytes(), shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The nearest folder above that is already there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
