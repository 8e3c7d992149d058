"""The data of a round, what `collect` made, in a folder beside the states of its phase (SKILL section 7).

Each column is a file of raw numbers, mapped into memory. Filling it needs no second copy, a minibatch costs
the same from a thousand rows and from a million, and what is larger than the memory lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from repro.checkpoint import Damaged, flush, writing

COLUMNS, PARTIAL = "columns.json", "round.partial"
DISK_SHARE = 0.9
"""Of the free disk, that a phase may fill. What is free changes."""


def allocate(folder: Path, count: int, row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for `count` rows like `row`, (count, *shape) each, in files of `folder`.

    The disk is asked for all of it at once: one that fills up later kills a process without a word. Raises
    RunFailed when it refuses.
    """
    partial = folder / PARTIAL
    drop(partial)
    columns = {
        name: (str(one.dtype).removeprefix("torch."), [count, *one.shape]) for name, one in row.items()
    }
    with writing(partial, needed=count * sum(one.nbytes for one in row.values())):
        partial.mkdir(parents=True)
        (partial / COLUMNS).write_text(json.dumps(columns))
        for number, one in enumerate(row.values()):
            with (partial / str(number)).open("wb") as file:
                size = max(16, count * one.nbytes)  # nothing at all cannot be mapped
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
        return mapped(partial)


def write(folder: Path, rows: Mapping[str, Tensor]) -> str:
    """Keeps rows that lie in memory, and returns the name of their folder. Raises RunFailed when the disk
    refuses."""
    count = len(next(iter(rows.values()), ()))
    own = allocate(folder, count, {name: column.new_empty(column.shape[1:]) for name, column in rows.items()})
    for name, column in rows.items():
        own[name].copy_(column)
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


def read(path: Path) -> dict[str, Tensor]:
    """The rows in a folder, to be read only. Raises Damaged for other contents than its name says."""
    try:
        if path.name != f"round-{_digest(path)}":
            raise Damaged(f"{path}: found other contents than its name says, expected those of the round")
        return mapped(path)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise Damaged(f"{path}: no sound data of a round: {error}") from None


def mapped(path: Path) -> dict[str, Tensor]:
    """The columns of a folder, as they lie on the disk. Raises OSError where a file cannot be mapped."""
    columns = json.loads((path / COLUMNS).read_text())
    found = {}
    for number, (name, (dtype, shape)) in enumerate(columns.items()):
        size, kind = torch.Size(shape), getattr(torch, dtype)
        try:
            flat = torch.from_file(
                str(path / str(number)), shared=True, size=max(1, size.numel()), dtype=kind
            )
        except RuntimeError as error:
            raise OSError(str(error)) from None
        found[name] = flat[: size.numel()].view(size)
    return found


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
