"""The state of a phase, what training changes: looked through, saved and put back, in one safetensors file.

A state is a dataclass. Its fields hold networks, optimisers, torch's schedulers and averages, whatever else
has `state_dict` and `load_state_dict`, tensors, generators, plain numbers and text, and lists, tuples and
dicts of these. What no `state_dict` shows is saved beside it: the mode of every module and which weights are
frozen.

A file is written atomically, checksummed, and never unpickled: `torch.load` runs a pickle machine even with
`weights_only=True`, and safetensors is a table of bytes with a JSON header. The nested state becomes named
tensors plus a JSON description.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from repro.errors import BadInput, RunFailed

EXPECTED = (
    "what has state_dict and load_state_dict, a tensor, a torch.Generator, a number, text, or a list, tuple "
    "or dict of these"
)


@runtime_checkable
class Stateful(Protocol):
    """What saves itself: networks, optimisers, schedulers, a replay memory, an environment."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def fields_of(state: Any) -> dict[str, Any]:
    """The fields of a dataclass by name."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def parts(value: Any) -> dict[Any, Any] | None:
    """What a dataclass, dict, list or tuple holds, by name or number; None for a leaf."""
    if isinstance(value, Stateful | type):
        return None
    if dataclasses.is_dataclass(value):
        return fields_of(value)
    if isinstance(value, dict):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, list | tuple) else None


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything in a state that holds no parts, with its dotted name."""
    if (inside := parts(value)) is None:
        yield name, value
    else:
        for key, item in inside.items():
            yield from leaves(item, f"{name}.{key}")


def _of_parts(value: Any, inside: dict[Any, Any]) -> Any:
    """`value` with other parts: a dataclass in place, another container anew."""
    if isinstance(value, dict):
        return inside
    if isinstance(value, list):
        return list(inside.values())
    if isinstance(value, tuple):
        return type(value)(*inside.values()) if hasattr(value, "_fields") else tuple(inside.values())
    for name, item in inside.items():
        setattr(value, name, item)
    return value


def modules(state: Any) -> dict[str, nn.Module]:
    """The networks of a state by dotted name, averages among them."""
    return {name: leaf for name, leaf in leaves(state, "state") if isinstance(leaf, nn.Module)}


def parameters(state: Any) -> dict[str, nn.Parameter]:
    """Every trainable tensor of a state by dotted name: those of its networks, and its own."""
    found = {}
    for name, leaf in leaves(state, "state"):
        if isinstance(leaf, nn.Module):
            found.update({f"{name}.{key}": parameter for key, parameter in leaf.named_parameters()})
        elif isinstance(leaf, nn.Parameter):
            found[name] = leaf
    return found


def move(state: Any, device: torch.device) -> None:
    """Brings networks and tensors to the device; networks in place, since optimisers hold their weights."""
    _moved(state, device)
    for _, leaf in leaves(state, "state"):
        if isinstance(leaf, torch.optim.Optimizer) and _is_apart(leaf):
            leaf.load_state_dict(leaf.state_dict())  # which brings all of it to where the weights are


def _moved(value: Any, device: torch.device) -> Any:
    if (inside := parts(value)) is not None:
        return _of_parts(value, {key: _moved(item, device) for key, item in inside.items()})
    if isinstance(value, nn.Module):
        tensors = (*value.parameters(), *value.buffers())
        # Asked first: a network of fake tensors, which need no memory, cannot be moved to where it is.
        return value if all(tensor.device == device for tensor in tensors) else value.to(device)
    if isinstance(value, nn.Parameter):
        value.data = value.data.to(device)
        return value
    return value.to(device) if isinstance(value, Tensor) else value


def _is_apart(optimiser: torch.optim.Optimizer) -> bool:
    """Whether it holds tensors elsewhere than its weights are: Adagrad makes its sums before they move."""
    return any(
        isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.device != weight.device
        for weight in _weights(optimiser)
        for tensor in optimiser.state.get(weight, {}).values()
    )


def _weights(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimiser.param_groups for weight in group["params"]]


def check(state: Any, phase: str, shared: tuple[str, ...] = ()) -> None:
    """Looks through a new state. Raises BadInput, a line per problem, for what cannot be saved and what would
    go unseen.

    That is a value of a kind that is not saved, an optimiser over weights of no network in the state or over
    those of another optimiser (unless `shared` names both), and a scheduler outside the state.
    """
    if not dataclasses.is_dataclass(state) or isinstance(state, type) or _frozen(state):
        expected = "expected a dataclass that is not frozen"
        raise BadInput(f"phase {phase}: setup: found {type(state).__name__}, {expected}")
    problems: list[str] = []
    found = list(leaves(fields_of(state), "state"))
    known = {id(parameter) for parameter in parameters(state).values()}
    scheduled = {id(one) for _, leaf in found if isinstance(leaf, LRScheduler) for one in _scheduled(leaf)}
    held: dict[int, str] = {}
    for name, leaf in found:
        if not isinstance(leaf, Stateful | Tensor | torch.Generator | bool | int | float | str | None):
            problems.append(f"{name}: found {type(leaf).__name__}, expected {EXPECTED}")
        if not isinstance(leaf, torch.optim.Optimizer):
            continue
        if hasattr(leaf.step, "_wrapped_by_lr_sched") and id(leaf) not in scheduled:
            expected = "expected it in a field of the state"
            problems.append(f"{name}: found a scheduler of its rates outside the state, {expected}")
        weights = _weights(leaf)
        others = {held.setdefault(id(weight), name) for weight in weights} - {name}
        if unknown := [weight for weight in weights if id(weight) not in known]:
            shape = "" if is_lazy(unknown[0]) else f" of shape {tuple(unknown[0].shape)}"
            expected = "expected its network in a field"
            problems.append(f"{name}: found a weight{shape} of no network in the state, {expected}")
        for other in sorted(others):
            if not {other.removeprefix("state."), name.removeprefix("state.")} <= {*shared}:
                advice = "where the paper has two, name both in shared_parameters of the phase"
                expected = f"expected one optimiser for it; {advice}"
                problems.append(f"{name}: found a weight that {other} holds as well, {expected}")
    if problems:
        raise BadInput(*(f"phase {phase}: {problem}" for problem in problems))


def _frozen(state: Any) -> bool:
    frozen: bool = type(state).__dataclass_params__.frozen
    return frozen


def _scheduled(scheduler: Any) -> list[torch.optim.Optimizer]:
    """The optimisers whose rates it sets, by way of others too."""
    own = getattr(scheduler, "optimizer", None)
    inside = [one for part in getattr(scheduler, "_schedulers", []) for one in _scheduled(part)]
    return inside + ([own] if own is not None else [])


def require_finite(state: Any, phase: str, steps_done: int) -> None:
    """Raises RunFailed for weights that are not finite. Buffers may hold infinities, as a mask does."""
    weights = parameters(state).items()
    broken = [name.removeprefix("state.") for name, weight in weights if not _finite(weight)]
    if broken:
        names = ", ".join(broken[:3]) + f" and {len(broken) - 3} more" * (len(broken) > 3)
        found = f"the weights of {names} are not finite"
        raise RunFailed(f"phase {phase}, step {steps_done}: {found}; the last saved state is kept")


def _finite(weight: Tensor) -> bool:
    return is_lazy(weight) or bool(weight.detach().isfinite().all())


def digests(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """A number for each tensor and plain value of a saved state, by dotted name: equal for equal bits."""
    if isinstance(value, dict | list | tuple):
        for key, item in parts(value).items():  # type: ignore[union-attr]
            yield from digests(item, f"{name}.{key}")
    else:
        yield name, _digest(value) if isinstance(value, Tensor) else zlib.crc32(repr(value).encode())


def _digest(tensor: Tensor) -> int:
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = octets.numel() // 8 * 8
    total = zlib.crc32(bytes(octets[whole:].tolist()))
    for piece in octets[:whole].split(2**25):
        words = piece.clone().view(torch.int64)  # a copy begins where words do
        total += int((words * (words | 1)).sum())  # both wrap around
    return (total + 2**63) % 2**64 - 2**63


def saved(value: Any) -> Any:
    """A state, or a part of one, as plain containers of tensors and plain values. Nothing is copied."""
    if (inside := parts(value)) is not None:
        kept = {key: saved(item) for key, item in inside.items()}
        return type(value)(kept.values()) if type(value) in (list, tuple) else kept
    if isinstance(value, nn.Module):
        return {
            "state_dict": dict(value.state_dict()),
            "resting": [name for name, module in value.named_modules() if not module.training],
            "frozen": [name for name, parameter in value.named_parameters() if not parameter.requires_grad],
        }
    if isinstance(value, Stateful):
        return dict(value.state_dict())
    return value.get_state() if isinstance(value, torch.Generator) else value


def restore(state: Any, before: Any, where: str = "state") -> Any:
    """Puts what `saved` gave back into a new state, or a part of one, in place where it can be. Returns it.

    Raises ValueError when its parts are others than those.
    """
    if (inside := parts(state)) is not None:
        return _parts_restored(state, inside, before, where)
    if isinstance(state, nn.Module):
        _require_same_names(where, before, ["state_dict", "resting", "frozen"])
        state.load_state_dict(before["state_dict"])
        for name, module in state.named_modules():
            module.training = name not in before["resting"]
        for name, parameter in state.named_parameters():
            parameter.requires_grad_(name not in before["frozen"])
    elif isinstance(state, Stateful):
        state.load_state_dict(before)
    elif isinstance(state, torch.Generator):
        state.set_state(before)
    elif isinstance(state, nn.Parameter):
        with torch.no_grad():
            state.copy_(before)
    elif isinstance(state, Tensor):
        if not isinstance(before, Tensor):
            raise ValueError(f"{where}: found {type(before).__name__}, expected a tensor")
        return before.to(state.device).requires_grad_(state.requires_grad)
    else:
        return before
    return state


def _parts_restored(value: Any, inside: dict[Any, Any], before: Any, where: str) -> Any:
    """Part by part; a container of data alone may have become another one."""
    old = before if isinstance(before, dict) else dict(enumerate(before))
    if dataclasses.is_dataclass(value):
        _require_same_names(where, old, list(inside))
    elif inside.keys() != old.keys():
        lasting = (Stateful, nn.Parameter, torch.Generator)
        if any(isinstance(leaf, lasting) for _, leaf in leaves(value, where)):
            raise ValueError(f"{where}: found the parts {list(old)}, expected {list(inside)}")
        return before
    new = {key: restore(item, old[key], f"{where}.{key}") for key, item in inside.items()}
    return _of_parts(value, new)


def _require_same_names(where: str, before: Any, names: list[Any]) -> None:
    found = list(before) if isinstance(before, dict) else type(before).__name__
    if not isinstance(before, dict) or set(before) != set(names):
        raise ValueError(f"{where}: found {found}, expected the parts {names}")


# Files.

FORMAT = "repro-checkpoint-3"
OLDER = "repro-checkpoint-2"
"""What version 0.1 wrote: one network a phase. Its finished networks are read, its running states not."""


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
            if (form := header.get("format")) not in (FORMAT, OLDER):
                raise ValueError(f"found format {form!r}, expected {FORMAT!r}")
            if header.keys() != {"format", "tree", "sha256"}:
                raise ValueError(
                    f"found the header {', '.join(sorted(header))}, expected format, sha256, tree"
                )
            # Copies: numbers in a file are not aligned, and sums of such round differently.
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
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except OSError as error:
        expected = "expected a safetensors file of weights"
        raise BadInput(f"{path}: cannot be read ({error.strerror}), {expected}") from None
    except SafetensorError as error:
        found = f"found no safetensors file ({_line(error)})"
        raise BadInput(f"{path}: {found}; convert a pickle once, by hand") from None


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
    """Deletes what killed saves left in a phase's folder: our partial files and those of safetensors."""
    for pattern in ("*.safetensors.partial", ".tmp*"):
        for left in folder.glob(pattern):
            left.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Within this block what a disk refuses raises RunFailed: the path, the bytes `needed`, the free ones."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        wanted = "" if needed is None else f", expected room for {needed:,} bytes"
        found = f"({_line(error)}): found {_free(path)} bytes free{wanted}"
        kept = "what was saved before is kept, go on with the same command and --resume"
        raise RunFailed(f"{path}: cannot be written {found}; {kept}") from None


def replace(path: Path, content: bytes) -> None:
    """Writes a small file as a whole. Raises RunFailed when the disk refuses; then what was there is kept."""
    partial = path.with_name(path.name + ".partial")
    with writing(path, needed=len(content)):
        try:
            partial.write_bytes(content)
            flush(partial)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        return "no"


def _line(error: Exception) -> str:
    """What an error says, in one short line. Of safetensors' errors only the text tells those of the disk."""
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
    """JSON for `value`, its tensors into `tensors` by their path. Dicts become pairs: JSON has text keys."""
    if isinstance(value, Tensor):
        while name in tensors:  # {"a.b": x, "a": {"b": y}} and {0: x, "0": y} give one path twice
            name += "'"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[_plain(key, name), _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    return {"value": _plain(value, name)}


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    expected = "expected tensors and plain values only"
    raise TypeError(f"checkpoint {name}: found {type(value).__name__}, {expected}")


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
