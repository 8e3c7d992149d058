"""The state of a phase: what training changes. How it is looked through, saved and put back.

A state is a dataclass. Its fields hold networks, optimisers, torch's schedulers and averages, whatever else
has `state_dict` and `load_state_dict`, tensors, generators, plain numbers and text, and lists, tuples and
dicts of these. What no `state_dict` shows is saved beside it: the mode of every module and which weights are
frozen.
"""

from __future__ import annotations

import dataclasses
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


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything in a state that is no list, tuple or dict, with its dotted name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Stateful):
        for key, item in fields_of(value).items():
            yield from leaves(item, f"{name}.{key}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}.{index}")
    else:
        yield name, value


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
    """Brings networks and tensors to the device; networks in place, so that optimisers go on holding their
    weights."""
    for name, value in fields_of(state).items():
        setattr(state, name, _moved(value, device))
    for _, leaf in leaves(state, "state"):
        if isinstance(leaf, torch.optim.Optimizer) and _is_apart(leaf):
            leaf.load_state_dict(leaf.state_dict())  # which brings all of it to where the weights are


def _is_apart(optimiser: torch.optim.Optimizer) -> bool:
    """Whether it holds tensors elsewhere than their weights are: Adagrad makes its sums before the weights
    move."""
    return any(
        isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.device != weight.device
        for group in optimiser.param_groups
        for weight in group["params"]
        for tensor in optimiser.state.get(weight, {}).values()
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, nn.Module):
        tensors = (*value.parameters(), *value.buffers())
        # Asked first: a network of fake tensors, which need no memory, cannot be moved to where it is.
        return value if all(tensor.device == device for tensor in tensors) else value.to(device)
    if isinstance(value, nn.Parameter):
        value.data = value.data.to(device)
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Stateful):
        return value
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_moved(item, device) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        move(value, device)
    return value


def check(state: Any, phase: str, shared: tuple[str, ...] = ()) -> None:
    """Looks through a new state. Raises BadInput, a line per problem, for what cannot be saved and what would
    go unseen.

    That is a value of a kind that is not saved, an optimiser over weights of no network in the state or over
    those of another optimiser (unless `shared` names both), and a scheduler outside the state.
    """
    if not dataclasses.is_dataclass(state) or isinstance(state, type) or _frozen(state):
        found_one = f"found {type(state).__name__}, expected a dataclass that is not frozen"
        raise BadInput(f"phase {phase}: setup: {found_one}")
    problems: list[str] = []
    held: dict[int, str] = {}
    scheduled: set[int] = set()
    known = {id(parameter) for parameter in parameters(state).values()}
    found = [(f"state.{name}", value) for name, value in fields_of(state).items()]
    found = [leaf for name, value in found for leaf in leaves(value, name)]
    for name, leaf in found:
        if isinstance(leaf, LRScheduler):
            scheduled |= {id(one) for one in _optimisers_of(leaf)}
        if not isinstance(leaf, Stateful | Tensor | torch.Generator | bool | int | float | str | None):
            problems.append(f"{name}: found {type(leaf).__name__}, expected {EXPECTED}")
    for name, leaf in found:
        if not isinstance(leaf, torch.optim.Optimizer):
            continue
        if hasattr(leaf.step, "_wrapped_by_lr_sched") and id(leaf) not in scheduled:
            problems.append(
                f"{name}: found a scheduler of its rates outside the state, expected it in a field of the "
                "state"
            )
        for parameter in (p for group in leaf.param_groups for p in group["params"]):
            if id(parameter) not in known:
                shape = "" if is_lazy(parameter) else f" of shape {tuple(parameter.shape)}"
                problems.append(
                    f"{name}: found a weight{shape} of no network in the state, expected its network in a "
                    "field"
                )
                break
            other = held.setdefault(id(parameter), name)
            if other != name and not {other.removeprefix("state."), name.removeprefix("state.")} <= {*shared}:
                problems.append(
                    f"{name}: found a weight that {other} holds as well, expected one optimiser for it; "
                    "where the paper has "
                    "two, name both in shared_parameters of the phase"
                )
                break
    if problems:
        raise BadInput(*(f"phase {phase}: {problem}" for problem in problems))


def _frozen(state: Any) -> bool:
    frozen: bool = type(state).__dataclass_params__.frozen
    return frozen


def _optimisers_of(scheduler: Any) -> list[torch.optim.Optimizer]:
    parts = getattr(scheduler, "_schedulers", [])
    own = getattr(scheduler, "optimizer", None)
    return [one for part in parts for one in _optimisers_of(part)] + ([own] if own is not None else [])


def require_finite(state: Any, phase: str, steps_done: int) -> None:
    """Raises RunFailed for weights that are not finite. A loss says nothing about the step that was made from
    it.

    Buffers may hold infinities, as a mask does.
    """
    broken = [
        name.removeprefix("state.") for name, weight in parameters(state).items() if not _finite(weight)
    ]
    if broken:
        names = ", ".join(broken[:3]) + f" and {len(broken) - 3} more" * (len(broken) > 3)
        raise RunFailed(
            f"phase {phase}, step {steps_done}: the weights of {names} are not finite; the last saved state "
            "is kept"
        )


def _finite(weight: Tensor) -> bool:
    return is_lazy(weight) or bool(weight.detach().isfinite().all())


def saved(state: Any) -> dict[str, Any]:
    """A state as plain containers of tensors and plain values, for a checkpoint. Nothing is copied."""
    return {name: _saved(value) for name, value in fields_of(state).items()}


def _saved(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return {
            "state_dict": dict(value.state_dict()),
            "resting": [name for name, module in value.named_modules() if not module.training],
            "frozen": [name for name, parameter in value.named_parameters() if not parameter.requires_grad],
        }
    if isinstance(value, Stateful):
        return dict(value.state_dict())
    if isinstance(value, torch.Generator):
        return value.get_state()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return saved(value)
    if isinstance(value, dict):
        return {key: _saved(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_saved(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def restore(state: Any, before: dict[str, Any], where: str = "state") -> None:
    """Puts what `saved` gave back into a new state, in place. Raises ValueError when its parts are others
    than those."""
    _require_same_names(where, before, list(fields_of(state)))
    for name, value in fields_of(state).items():
        setattr(state, name, _restored(value, before[name], f"{where}.{name}"))


def _restored(value: Any, before: Any, where: str) -> Any:
    if isinstance(value, nn.Module):
        _require_same_names(where, before, ["state_dict", "resting", "frozen"])
        value.load_state_dict(before["state_dict"])
        for name, module in value.named_modules():
            module.training = name not in before["resting"]
        for name, parameter in value.named_parameters():
            parameter.requires_grad_(name not in before["frozen"])
        return value
    if isinstance(value, Stateful):
        value.load_state_dict(before)
        return value
    if isinstance(value, torch.Generator):
        value.set_state(before)
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        restore(value, before, where)
        return value
    if isinstance(value, dict | list | tuple):
        return _container_restored(value, before, where)
    if isinstance(value, nn.Parameter):
        with torch.no_grad():
            value.copy_(before)
        return value
    if isinstance(value, Tensor):
        if not isinstance(before, Tensor):
            raise ValueError(f"{where}: found {type(before).__name__}, expected a tensor")
        return before.to(value.device).requires_grad_(value.requires_grad)
    return before


def _container_restored(value: Any, before: Any, where: str) -> Any:
    """Part by part; a container of data alone may have become another one."""
    new = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    old = dict(before) if isinstance(before, dict) else dict(enumerate(before))
    if new.keys() != old.keys():
        if any(
            isinstance(leaf, Stateful | nn.Parameter | torch.Generator) for _, leaf in leaves(value, where)
        ):
            raise ValueError(f"{where}: found the parts {list(old)}, expected {list(new)}")
        return before
    parts = {key: _restored(item, old[key], f"{where}.{key}") for key, item in new.items()}
    return parts if isinstance(value, dict) else type(value)(parts.values())


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
