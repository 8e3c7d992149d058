"""Checkpoints of tensors and plain values in one safetensors file: written atomically, checksummed, never
unpickled.

`torch.load` runs a pickle machine even with `weights_only=True`; safetensors is a table of bytes with a JSON
header. The nested state of a model and an optimiser becomes named tensors plus a JSON description.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repro.errors import BadInput, RunFailed

FORMAT = "repro-checkpoint-3"
OLDER = "repro-checkpoint-2"
"""What version 0.1 wrote: one network per phase. Its finished networks are read, its running states are
not."""
HEADER = {"format", "tree", "sha256"}


class Damaged(BadInput):
    """A file that is no sound checkpoint of this format: cut short, changed on the disk, or never one."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state`: nested dicts, lists and tuples of tensors, numbers, text, booleans and None.

    A file that was at `path` before is kept as `previous(path)`. At every moment one of the two is whole,
    also across a power cut. Raises TypeError for any other kind of value, and RunFailed when the disk
    refuses; both leave what was there as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, "state", tensors))
    header = {"format": FORMAT, "tree": tree, "sha256": _checksum(tree, tensors, FORMAT)}
    partial = path.with_name(path.name + ".partial")
    with writing(path, needed=len(tree) + sum(tensor.nbytes for tensor in tensors.values())):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=header)
            flush(partial)
            if path.exists():
                os.replace(path, previous(path))
            os.replace(partial, path)
            flush(path.parent)
        except Exception:
            partial.unlink(missing_ok=True)
            raise


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, its tensors on the CPU.

    Raises Damaged, one line, for anything but the bytes that `save` wrote: the checksum covers every value,
    name, shape and dtype.
    """
    try:
        if not path.is_file():
            raise Damaged(f"{path}: found no such file, expected a checkpoint")
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") not in (FORMAT, OLDER):
                raise Damaged(
                    f"{path}: no sound checkpoint: found format {header.get('format')!r}, expected {FORMAT!r}"
                )
            if set(header) != HEADER:
                raise ValueError(
                    f"found the header {', '.join(sorted(header))}, expected {', '.join(sorted(HEADER))}"
                )
            # Copies: what lies in a file is not aligned, and sums of numbers that are not aligned round
            # differently.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dict)
        if _checksum(header["tree"], tensors, header["format"]) != header["sha256"]:
            raise ValueError("found other contents than its checksum says")
        state = _unpack(json.loads(header["tree"]), tensors)
        if tensors:
            raise ValueError(f"found {len(tensors)} tensors that nothing refers to, expected none")
        if not isinstance(state, dict):
            raise ValueError(f"found {type(state).__name__}, expected a dict")
        return state
    except Damaged:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes its readers raise
        raise Damaged(f"{path}: no sound checkpoint: {_line(error)}") from None


def pretrained(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file from elsewhere, by name: the weights that a phase begins with.

    Raises BadInput when the file is not there or is another one than the SHA-256 says. A pickle (.pth, .bin)
    is refused: to read one is to run it.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise BadInput(f"{path}: found a file of SHA-256 {found}, expected {sha256}")
        with safe_open(path, framework="pt", device="cpu") as tensors:
            names = tensors.keys()
            return {name: tensors.get_tensor(name).clone() for name in names}
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({error.strerror}), expected a safetensors file of weights"
        ) from None
    except SafetensorError as error:
        raise BadInput(
            f"{path}: found no safetensors file ({_line(error)}); convert a pickle once, by hand"
        ) from None


def previous(path: Path) -> Path:
    """Where the file is kept that was at `path` before the one that is there."""
    return path.with_stem(path.stem + ".previous")


def newest(
    path: Path, complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state
) -> tuple[dict[str, Any], str | None] | None:
    """The newest sound state of `path` and `previous(path)`; None when neither exists.

    `complete` adds what a state needs from other files, and raises Damaged where that is not sound: then the
    state is not. Returned with it is what is wrong with the file at `path`, when it had to be passed over.
    Raises Damaged when none is sound.
    """
    problems: list[str] = []
    for candidate in (path, previous(path)):
        if os.path.lexists(candidate):
            try:
                return complete(load(candidate)), problems[0] if problems else None
            except Damaged as error:
                problems.append(str(error))
    if problems:
        raise Damaged("; ".join(problems))
    return None


def sweep(folder: Path) -> None:
    """Deletes what killed saves left in `folder`, which must be of one run: our partial files and those of
    safetensors."""
    for pattern in ("*.safetensors.partial", ".tmp*"):
        for left in folder.glob(pattern):
            left.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Within this block what a disk refuses raises RunFailed: one line with the path, the bytes `needed`, the
    free ones."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        wanted = "" if needed is None else f", expected room for {needed:,} bytes"
        raise RunFailed(
            f"{path}: cannot be written ({_line(error)}): found {_free(path)} bytes free{wanted}; what was "
            "saved before is kept, "
            "go on with the same command and --resume"
        ) from None


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        return "no"


def _line(error: Exception) -> str:
    """What an error says, in one short line. safetensors has no error class of its own for the disk: only the
    text tells."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if found := re.search(r"\(os error (\d+)\)", text):
        return os.strerror(int(found[1]))
    return text if len(text) <= 200 else f"{text[:197]}..."


def _checksum(tree: str, tensors: dict[str, Tensor], form: str) -> str:
    """SHA-256 of the format, the description, and every tensor's name, dtype, shape and bytes."""
    # Version 0.1 left the format out; one flipped bit makes a 2 of a 3.
    total = hashlib.sha256(tree.encode() if form == OLDER else f"{form}\n{tree}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors go into `tensors` under their path. JSON keeps only text keys, so dicts
    become pairs."""
    if isinstance(value, Tensor):
        while name in tensors:  # {"a.b": x, "a": {"b": y}} and {0: x, "0": y} give one path twice
            name += "'"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": [
                [_plain(key, name), _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    return {"value": _plain(value, name)}


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"checkpoint {name}: found {type(value).__name__}, expected tensors and plain values only"
    )


def _unpack(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The value of `node`. Takes its tensors out of `tensors`: each belongs to one place."""
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors.pop(content)
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return _plain(content, "value")
    raise ValueError(f"unknown kind {kind!r}")


def flush(path: Path) -> None:
    """Waits until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
