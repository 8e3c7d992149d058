"""The state of a phase: what training changes. How it is looked through, saved and put back.

A state is a dataclass. Its fields hold networks, optimisers, torch's schedulers and averages, whatever else
has `state_dict` and `load_state_dict`, tensors, generators, plain numbers and text, and lists, tuples and
dicts of these. What no `state_dict` shows is saved beside it: the mode of every module and which weights are
frozen.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from repro.errors import BadInput, RunFailed
from repro.randomness import derive_seed

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


class Replayed:
    """An environment without `state_dict`, saved as its seed and the actions since its last reset.

    `make` gives a new environment with `reset(seed=...)` and `step(action)`, whose answers are a function of
    the seed and the actions. Actions are numbers, lists of numbers or tensors. A resumed phase takes the
    actions again.
    """

    def __init__(self, make: Callable[[], Any], seed: int):
        self.environment, self._seed = make(), seed
        self._episode, self._actions = 0, list[Any]()

    def reset(self) -> Any:
        """Begins a new episode and returns what the environment's own `reset` does."""
        self._episode, self._actions = self._episode + 1, []
        return self.environment.reset(seed=derive_seed(self._seed, "episode", self._episode))

    def step(self, action: Any) -> Any:
        """Takes an action and returns what the environment's own `step` does."""
        self._actions.append(action.detach().clone() if isinstance(action, Tensor) else action)
        return self.environment.step(action)

    def state_dict(self) -> dict[str, Any]:
        return {"episode": self._episode, "actions": list(self._actions)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._episode, self._actions = state_dict["episode"] - 1, []
        if state_dict["episode"]:
            self.reset()
        for action in state_dict["actions"]:
            self.step(action)
