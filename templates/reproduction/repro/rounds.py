"""The data of a round, what `collect` made, in a folder beside the states of its phase (SKILL section 7).

Each column is a file of raw numbers, mapped into memory. Filling it needs no second copy, a minibatch copies
its own rows only, and what is larger than the memory lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from repro.checkpoint import Damaged, flush, writing

COLUMNS, PARTIAL = "columns.json", "round.partial"
DISK_SHARE = 0.9
"""Of the free disk, that a phase may fill. What is free changes."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of one row, by the column's name."""
HALVES = (torch.float16, torch.bfloat16)
Dtypes = torch.dtype | Mapping[str, torch.dtype]
"""One for all columns, or one for each."""


class Rows(Mapping[str, Tensor]):
    """Named columns of `count` rows, such as x (count, d), t (count,): filled in place, then drawn from."""

    def __init__(self, count: int, shapes: Shapes, dtypes: Dtypes = torch.float32):
        kinds = _kinds(shapes, dtypes)
        self._columns = {name: torch.empty((count, *shapes[name]), dtype=kinds[name]) for name in shapes}
        self.count, self.filled = count, 0

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], *, filled: bool = True) -> Rows:
        """The columns themselves, not a copy of them. Raises ValueError when they have unequal lengths."""
        if isinstance(columns, Rows) and columns.full == filled:
            return columns
        rows = cls(0, {})
        rows._columns, rows.count = dict(columns), _common_length(columns)
        rows.filled = rows.count if filled else 0
        return rows

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def full(self) -> bool:
        return self.filled == self.count

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.values())

    def add(self, **rows: Tensor) -> None:
        """Writes rows, (n, *shape) each, behind those there. Raises ValueError when they do not fit."""
        self.put(self.filled, **rows)

    def put(self, first: int, **rows: Tensor) -> None:
        """Writes rows, (n, *shape) each, from number `first` on. Raises ValueError when they do not fit."""
        if rows.keys() != self.keys():
            raise ValueError(f"rows: found {sorted(rows)}, expected {sorted(self)}")
        end = first + _common_length(rows)
        if end > self.count:
            raise ValueError(f"rows: found {end}, expected at most {self.count}")
        targets = {name: self[name][first:end] for name in rows}
        for name, row in rows.items():
            if row.shape != targets[name].shape:
                shapes = f"found {tuple(row.shape)}, expected {tuple(targets[name].shape)}"
                raise ValueError(f"column {name}: {shapes}")
        for name, row in rows.items():
            targets[name].copy_(row.detach())
        self.filled += end - first

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n rows drawn with replacement; halves come as float32. Raises ValueError until all are there."""
        if not self.full:
            raise ValueError(f"rows: found {self.filled}, expected all {self.count}")
        chosen = torch.randint(self.count, (n,), generator=generator)
        drawn = {name: column[chosen] for name, column in self.items()}
        return {name: one.float() if one.dtype in HALVES else one for name, one in drawn.items()}


def allocate(folder: Path, count: int, shapes: Shapes, dtypes: Dtypes = torch.float32) -> Rows:
    """The same in files of `folder`.

    The disk is asked for all of it at once: one that fills up later kills a process without a word. Raises
    RunFailed when it refuses.
    """
    partial, kinds = folder / PARTIAL, _kinds(shapes, dtypes)
    drop(partial)
    sizes = {name: count * torch.Size(shapes[name]).numel() * kinds[name].itemsize for name in shapes}
    columns = {name: (str(kinds[name]).removeprefix("torch."), [count, *shapes[name]]) for name in shapes}
    with writing(partial, needed=sum(sizes.values())):
        partial.mkdir(parents=True)
        (partial / COLUMNS).write_text(json.dumps(columns))
        for number, size in enumerate(sizes.values()):
            with (partial / str(number)).open("wb") as file:
                size = max(16, size)  # nothing at all cannot be mapped
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
        return mapped(partial, filled=False)


def write(folder: Path, rows: Mapping[str, Tensor]) -> str:
    """Keeps rows that lie in memory; returns their folder's name. Raises RunFailed when the disk refuses."""
    shapes = {name: tuple(column.shape[1:]) for name, column in rows.items()}
    own = allocate(
        folder, _common_length(rows), shapes, {name: column.dtype for name, column in rows.items()}
    )
    own.add(**rows)
    return seal(folder)


def seal(folder: Path) -> str:
    """Gives what `allocate` made, filled now, its name: that of its contents. Returns the name."""
    partial = folder / PARTIAL
    with writing(partial):
        for path in partial.iterdir():
            flush(path)
        name = f"round-{_digest(partial)}"
        if (folder / name).exists():
            drop(partial)
        else:
            partial.rename(folder / name)
            flush(folder)
    return name


def read(path: Path) -> Rows:
    """The rows in a folder, to be read only. Raises Damaged for other contents than its name says."""
    try:
        if path.name != f"round-{_digest(path)}":
            raise Damaged(f"{path}: found other contents than its name says, expected those of the round")
        return mapped(path)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise Damaged(f"{path}: no sound data of a round: {error}") from None


def mapped(path: Path, *, filled: bool = True) -> Rows:
    """The columns of a folder, as they lie on the disk. Raises OSError where a file cannot be mapped."""
    found = {}
    for number, (name, (dtype, shape)) in enumerate(json.loads((path / COLUMNS).read_text()).items()):
        size, kind = torch.Size(shape), getattr(torch, dtype)
        try:
            flat = torch.from_file(
                str(path / str(number)), shared=True, size=max(1, size.numel()), dtype=kind
            )
        except RuntimeError as error:
            raise OSError(str(error)) from None
        found[name] = flat[: size.numel()].view(size)
    return Rows.of(found, filled=filled)


def keep(folder: Path, names: Iterable[str | None]) -> None:
    """Deletes the rounds in `folder` that are not named."""
    kept = set(names)
    for path in folder.glob("round[-.]*"):
        if path.name not in kept:
            drop(path)


def drop(path: Path) -> None:
    """Deletes a folder, or a file or link in its place, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def room(folder: Path) -> int:
    """Bytes that rounds may take in `folder`, which need not be there yet; what they take already is free."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    own = sum(file.stat().st_blocks * 512 for file in folder.glob("round[-.]*/*"))
    return int(DISK_SHARE * (shutil.disk_usage(there).free + own))


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path.iterdir()):
        with file.open("rb") as content:
            total.update(f"{file.name} {file.stat().st_size}\n".encode())
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def _kinds(shapes: Shapes, dtypes: Dtypes) -> Mapping[str, torch.dtype]:
    return dict.fromkeys(shapes, dtypes) if isinstance(dtypes, torch.dtype) else dtypes


def _common_length(columns: Mapping[str, Tensor]) -> int:
    if single := [name for name, column in columns.items() if column.ndim == 0]:
        raise ValueError(f"rows: found one number as {single[0]}, expected one for every row")
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise ValueError(f"rows: found {sorted(lengths)}, expected the same number in every column")
    return lengths.pop() if lengths else 0


NOTHING = Rows(0, {})
