"""What `repro diagnose` looks through: hooks and modes that watch a network at work or put something in place of its output.

None of them knows what a network is for. The network's output is the one place where every method's input meets its target, so
a constant output, or one whose rows have changed places, needs no knowledge of which column of a minibatch is the target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

ELEMENTWISE = {
    "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "mul", "__mul__", "__rmul__", "div", "__truediv__",
    "subtract", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits",
}  # fmt: skip
FLAT = {
    # The inputs at which an activation passes on less than 1 part in 400 of a gradient.
    "relu": lambda x: x <= 0,
    "relu_": lambda x: x <= 0,
    "sigmoid": lambda x: x.abs() > 6,
    "sigmoid_": lambda x: x.abs() > 6,
    "tanh": lambda x: x.abs() > 3.7,
    "tanh_": lambda x: x.abs() > 3.7,
    "silu": lambda x: x < -9,
    "gelu": lambda x: x < -4,
    "elu": lambda x: x < -7,  # SELU too
}


@contextmanager
def outputs_replaced(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this block calling `model` gives `change(output)`. Raises Unfit, at the call, for an output that is no tensor."""

    def hook(module: nn.Module, inputs: tuple, output: object) -> Tensor:
        return change(_tensor(output))

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def outputs_recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of the calls of `model` within this block, in their order. Raises Unfit, at the call, for one that is no tensor."""
    outputs: list[Tensor] = []

    def record(output: Tensor) -> Tensor:
        outputs.append(output)
        return output

    with outputs_replaced(model, record):
        yield outputs


class Unfit(Exception):
    """A measurement that does not apply to this phase, and why."""


def _tensor(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise Unfit(f"the network gives a {type(output).__name__}, not a tensor")
    return output


@dataclass
class Calls:
    """What a network was called with: the arguments by name, of each call."""

    arguments: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def calls_recorded(model: nn.Module) -> Iterator[Calls]:
    calls, signature = Calls(), inspect.signature(model.forward)

    def hook(module: nn.Module, positional: tuple, named: dict) -> None:
        calls.arguments.append(dict(signature.bind(*positional, **named).arguments))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def call(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Calls `model` as it was called when `arguments` were recorded. Raises Unfit for an output that is no tensor."""
    parameters = inspect.signature(model.forward).parameters
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            positional += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.KEYWORD_ONLY:
            named[name] = value
        else:
            positional.append(value)
    return _tensor(model(*positional, **named))


class Pairings(TorchFunctionMode):
    """Elementwise operations of two tensors that turned `rows` rows into a table of rows by rows, as (rows,) and (rows, 1) do.

    A table that is asked for, (1, rows) and (rows, 1), is not among them.
    """

    def __init__(self, rows: int):
        super().__init__()
        self._rows = rows
        self.found: list[str] = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        name = getattr(function, "__name__", "").removeprefix("wrapper_")
        operands = [a for a in (*arguments, *(named or {}).values()) if isinstance(a, Tensor)][:2]
        if name in ELEMENTWISE and len(operands) == 2:
            shapes = sorted((tuple(operand.shape) for operand in operands), key=len)
            if shapes == [(self._rows,), (self._rows, 1)] and self._rows > 1:
                self.found.append(f"{name.strip('_')} of {' and '.join(str(tuple(o.shape)) for o in operands)}")
        return result


@dataclass(frozen=True)
class Flatness:
    """An activation in a network: which, where, how many of its units pass on no gradient for any example, of how many."""

    operation: str
    place: str
    dead: int
    units: int


class Activations(TorchDispatchMode):
    """Every activation that `model` computes within the block, whether a module or a function call, as `Flatness`.

    A unit is a place along dimension 1; an output of one dimension is one unit.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = model
        self._places: list[str] = []
        self._handles: list[RemovableHandle] = []
        self.found: list[Flatness] = []

    def __enter__(self):
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda m, i, name=name: self._places.append(name)),
                module.register_forward_hook(lambda m, i, o: self._leave(), always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def _leave(self) -> None:
        self._places.pop()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        if self._places and name in FLAT:
            flat = FLAT[name](arguments[0].detach())
            units = flat.transpose(0, 1).flatten(1).all(1) if flat.ndim > 1 else flat.all()[None]
            self.found.append(Flatness(name.strip("_"), self._places[-1], int(units.sum()), len(units)))
        return function(*arguments, **(named or {}))


def tensors_of(arguments: Mapping[str, object], rows: int) -> dict[str, Tensor]:
    """Those arguments of a call that are tensors with `rows` rows."""
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
    }
