"""Checkpoints of tensors and plain values in one safetensors file, written atomically, never unpickled.

`torch.load` runs a pickle machine even with `weights_only=True`; safetensors is a table of bytes with a JSON
header. The nested state of a model and an optimiser becomes named tensors plus a JSON description.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repro.errors import BadInput

FORMAT = "repro-checkpoint-1"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state`: nested dicts, lists and tuples of tensors, numbers, text, booleans and None.

    The file at `path` is the old one or the new one at every moment, also across a power cut.
    Raises TypeError for any other kind of value.
    """
    tensors: dict[str, Tensor] = {}
    header = {"format": FORMAT, "tree": json.dumps(_pack(state, "state", tensors))}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, its tensors on the CPU. Raises BadInput when the file is damaged or not ours."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise BadInput(f"{path}: found format {header.get('format')!r}, expected {FORMAT!r}")
            return _unpack(json.loads(header["tree"]), file)
    except FileNotFoundError:
        raise BadInput(f"{path}: found no such file, expected a checkpoint") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: no sound checkpoint: {error}") from None


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors go into `tensors` under their path. JSON keeps only text keys, so dicts become pairs."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_plain(key, name), _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    return {"value": _plain(value, name)}


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"checkpoint {name}: found {type(value).__name__}, expected tensors and plain values only")


def _unpack(node: dict, file) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {key: _unpack(item, file) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, file) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return content
    raise ValueError(f"unknown kind {kind!r}")


def flush(path: Path) -> None:
    """Waits until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
