"""What a step is done with: parts of the minibatch, gradients, optimisers, draws, numbers for the log.

A step takes its losses backward with `backward`, and `step` moves an optimiser by what has come together. So
several losses, optimisers and backward passes are written down in the paper's order.

A minibatch is gone through in parts: the micro-batches of each process. Each part counts by its fraction of
the whole, and the gradient of an optimiser's weights is summed over parts and processes when it steps, and
cleared after it. So any number of parts gives what the whole does, where the loss is a mean over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repro import rounds
from repro.errors import RunFailed
from repro.phases import Batch, Phase
from repro.randomness import generator, seed_global_generators
from repro.rounds import Dtypes, Rows, Shapes
from repro.runtime import Runtime

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Weights = nn.Module | Tensor | Iterable[nn.Module | Tensor]
"""Networks, trainable tensors, or several of them."""

WEIGHTS_OFF, NUMBERS_OFF = 1e-3, 1e-4
"""By how much the weights of all parts may miss 1, and numbers of two processes each other, relatively."""


@dataclass(frozen=True)
class Part:
    """Number `number` of the `of` parts of a minibatch: its rows, and their fraction of the whole."""

    number: int
    of: int
    fraction: float


def rows_of(part: int, parts: int) -> slice:
    """Every parts-th row. So rows that were drawn together, as in pairs, spread over the parts."""
    return slice(part, None, parts)


class Update:
    """Does the steps of one phase. The loop makes it, and calls `begin` and `end` around each step."""

    def __init__(self, phase: Phase[Any], seed: int, runtime: Runtime):
        self.step_number = 0
        """Of the step that is being done, counted from 0."""
        self.logged: dict[str, tuple[int, Tensor | float]] = {}
        """The newest number of each name, with the number of steps done when it was logged."""
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=phase.precision == "fp16")
        self._phase, self._seed, self._runtime = phase, seed, runtime
        self._dtype = DTYPES[phase.precision]
        self._micro_batches = runtime.micro_batches_of(phase.name)
        self._loss: Tensor | None = None
        self._complete = True  # the next backward begins a new loss
        self._scale_used = False
        self._backwards = 0
        self._stepped: dict[int, int] = {}
        self._device_parts: tuple[Batch, list[tuple[Part, dict[str, Tensor]]]] | None = None
        self._part: Part | None = None  # the one that the step is at
        self._passes = 0  # through the parts, in this step
        self._calls: dict[int, int] | None = None  # of backward, in each part, since an optimiser stepped
        self._fraction: Tensor | float = 0.0  # of the whole, that they counted
        self._off: Tensor | float = 0.0  # by how much the fractions of a whole missed 1, at most
        self._partial: dict[str, tuple[tuple[int, int], Tensor | float]] = {}
        self._folder: Path | None = None
        self._room: Rows | None = None

    # For the method.

    @property
    def device(self) -> torch.device:
        """Where networks, tensors of the state and parts of a minibatch lie."""
        return self._runtime.device

    def parts(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """This process' rows of a minibatch, in its micro-batches, on the device.

        Within the loop over them `backward`, `log` and `generator` are those of the part.
        """
        if self._device_parts is None or self._device_parts[0] is not batch:
            self._device_parts = batch, list(self._divided(batch))
        self._passes += 1
        if self._calls is None:
            self._calls, self._fraction = {}, 0.0
        around = self._part
        try:
            for part, columns in self._device_parts[1]:
                self._part = part
                if self._calls is not None:
                    self._calls.setdefault(part.number, 0)
                self.draw_apart("part", part.number)
                yield columns
        finally:
            self._part = around
            self.draw_apart("after")

    def draw_apart(self, *names: str | int) -> None:
        """Lets each part draw from the global generators for itself, as dropout must, and all processes the
        same elsewhere."""
        if self._runtime.parts_of(self._phase.name) > 1:
            place = ("step", self.step_number, "pass", self._passes)
            seed_global_generators(self._seed, self._phase.stream, *place, *names)

    def _divided(self, batch: Batch) -> Iterator[tuple[Part, dict[str, Tensor]]]:
        world, device = self._runtime.world, self._runtime.device
        parts = world.size * self._micro_batches
        if parts == 1:
            yield (
                Part(0, 1, 1.0),
                {name: column.to(device, non_blocking=True) for name, column in batch.items()},
            )
            return
        lengths = {len(column) for column in batch.values()}
        if len(lengths) != 1:
            expected = f"expected the same number in each with {parts} parts"
            raise self._refusal(f"found columns of {', '.join(map(str, sorted(lengths)))} rows, {expected}")
        (rows,) = lengths
        world.require_rows(rows, self._phase.name)
        for number in range(world.rank, min(rows, parts), world.size):
            own = {name: column[rows_of(number, parts)].contiguous() for name, column in batch.items()}
            fraction = len(next(iter(own.values()))) / rows
            part = Part(number, parts, fraction)
            yield part, {name: column.to(device, non_blocking=True) for name, column in own.items()}

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in the phase's precision."""
        half = self._dtype is not torch.float32
        return torch.autocast(self._runtime.device.type, dtype=self._dtype, enabled=half)

    def generator(self, *names: str | int) -> torch.Generator:
        """For draws within this step or `collect`, on the CPU: a function of (seed, phase, step, names).

        Within the loop over parts each part has one of its own; elsewhere all processes draw the same.
        """
        apart = () if self._part is None or self._part.of == 1 else ("part", self._part.number)
        return generator(self._seed, self._phase.stream, "step", self.step_number, *names, *apart)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, from (n, ...) each, for a loss or statistics that couple rows.

        In the order of the processes; the gradient goes back to the process of each row. Raises RunFailed
        with several micro-batches: the others are not there.
        """
        if self._micro_batches > 1:
            found = f"found {self._micro_batches} micro-batches"
            raise self._refusal(f"update.gather: {found}, expected one: the rows of the others are not there")
        return self._runtime.world.gather(rows, self._place("update.gather"))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, without a gradient: of statistics that are added up over the parts."""
        return self._runtime.world.all_reduce(tensor, self._place("update.all_reduce"))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first process' tensor in all of them: of what is decided once, such as actions."""
        return self._runtime.world.broadcast(tensor, self._place("update.broadcast"))

    def backward(
        self,
        loss: Tensor,
        *,
        weight: Tensor | float | None = None,
        inputs: Weights | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Adds the gradient of a loss, a number, to what is there.

        `weight` is the part's fraction of the whole minibatch, as in `part["real"].sum() /
        batch["real"].sum()`; by default that of its rows. Over all parts it sums to 1. `inputs` are the
        weights whose gradient is wanted; by default all that the loss depends on.
        """
        if loss.numel() != 1 or not loss.requires_grad:
            what = f"of shape {tuple(loss.shape)}" if loss.requires_grad else "that does not require grad"
            expected = "expected a number that depends on weights"
            raise self._refusal(f"update.backward: found a loss {what}, {expected}")
        if self._complete:
            self._update_scale()
            self._loss, self._complete = None, False
        if self._calls is None:
            self._calls, self._fraction = {}, 0.0
        share = self._share() if weight is None else weight
        if self._part is not None:
            self._calls[self._part.number] = self._calls.get(self._part.number, 0) + 1
            self._fraction = self._fraction + (share.detach() if isinstance(share, Tensor) else share)
        loss = _weighted(loss, share)
        self._backwards += 1
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        wanted = None if inputs is None else [one for one in _tensors(inputs) if one.requires_grad]
        self.scaler.scale(loss).backward(inputs=wanted, retain_graph=retain_graph)

    def step(
        self,
        optimiser: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        closure: Callable[[], object] | None = None,
        gradient: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """One step of an optimiser with the gradient of its weights, which is cleared then. Returns the loss
        of the whole minibatch: the sum of what went backward since a step before it, detached.

        `clip` is the largest norm of the gradient over all weights of this optimiser. `closure` calls
        `backward`, once for each part, and is called as often as the optimiser asks (L-BFGS). `gradient` is
        one that `gradient` gave, changed or not, in the order of the optimiser's weights.
        """
        weights = _weights_of(optimiser)
        if self.scaler.is_enabled() and (closure is not None or gradient is not None):
            expected = "expected bf16 or float32 for them"
            raise self._refusal(f"update.step: found closure= or gradient= with fp16, {expected}")
        if closure is not None:
            return self._step_with(optimiser, weights, closure, clip)
        if gradient is not None:
            for weight, own in zip(weights, gradient, strict=True):
                weight.grad = own
        elif self._stepped.get(id(optimiser), 0) == self._backwards and not self._may_lack_a_loss():
            found = f"found no backward since the last step of this {type(optimiser).__name__}"
            raise self._refusal(f"update.step: {found}, expected one before it")
        else:
            self._sum_up(weights, f"update.step of {type(optimiser).__name__}")
        self._stepped[id(optimiser)] = self._backwards
        self.move(optimiser, weights, clip)
        _clear(weights)
        self._complete = True
        return torch.zeros(()) if self._loss is None else self._loss

    def gradient(self, weights: Weights) -> list[Tensor | None]:
        """The gradient of the weights, in their order, taken off them; None where there is none; not fp16."""
        if self.scaler.is_enabled():
            raise self._refusal("update.gradient: found fp16, expected bf16 or float32")
        tensors = list(_tensors(weights))
        self._sum_up(tensors, "update.gradient")
        found = [tensor.grad for tensor in tensors]
        _clear(tensors)
        self._complete = True
        return found

    def log(self, name: str, value: Tensor | float, *, weight: Tensor | float | None = None) -> None:
        """A number for the curve of this name: the newest one is written at every `pace.log_every` steps.

        Within the loop over parts it is the part's, and counts by `weight` as in `backward`; elsewhere it is
        the same in all processes. It counts as one after this step, also where `collect` logs it before.
        """
        value = value.detach() if isinstance(value, Tensor) else value
        if self._part is None:
            self._partial.pop(name, None)
        else:
            value = _weighted(value, self._share() if weight is None else weight)
            before = self._partial.get(name)
            place = self.step_number, self._passes
            if before is not None and before[0] == place:
                value = before[1] + value
            self._partial[name] = place, value
        self.logged[name] = self.step_number + 1, value

    def room(self, count: int, shapes: Shapes, dtypes: Dtypes = torch.float32) -> Rows:
        """For `collect`: columns of `count` rows, to be filled in place and returned.

        They lie in files of the run's folder, so that they may be larger than the memory. All processes see
        the same ones.
        """
        if self._folder is None:
            self._room = Rows(count, shapes, dtypes)
            return self._room
        world = self._runtime.world
        if world.first:
            self._room = rounds.allocate(self._folder, count, shapes, dtypes)
        world.barrier()
        if not world.first:
            self._room = rounds.mapped(self._folder / rounds.PARTIAL, filled=False)
        assert self._room is not None
        return self._room

    # For the loop.

    def begin(self, step: int, folder: Path | None = None) -> None:
        """Before a step or a `collect`, the data of which lie in `folder`, or in memory."""
        self.step_number, self._complete, self._calls, self._passes = step, True, None, 0
        self._backwards, self._stepped = 0, {}
        self._folder, self._room = folder, None

    def end(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """After a step. Raises RunFailed when a gradient is left on a named weight: no state holds it."""
        self._update_scale()
        self._device_parts = None
        if left := [name.removeprefix("state.") for name, weight in weights if weight.grad is not None]:
            names = ", ".join(left[:3]) + f" and {len(left) - 3} more" * (len(left) > 3)
            raise self._refusal(
                f"found a gradient left on {names}, expected none at the end of a step; step the optimiser "
                "that holds it, give backward(..., inputs=) the weights that are meant, or take it off by "
                "update.gradient"
            )

    @property
    def gave_room_on_disk(self) -> bool:
        return self._room is not None and self._folder is not None

    def collected(self, rows: Batch) -> Rows:
        """What `collect` returned, on the CPU. Raises RunFailed for a part of the room that it was given."""
        if self._room is None:
            try:
                return Rows.of({name: column.detach().cpu() for name, column in rows.items()})
            except ValueError as error:
                raise self._refusal(f"collect: {error}") from None
        if rows is not self._room:
            raise self._refusal("collect: found other columns than update.room gave, expected those")
        if (found := self._runtime.world.total(self._room.filled)) != self._room.count:
            raise self._refusal(f"collect: found {found:.0f} rows filled, expected {self._room.count}")
        return Rows.of(self._room)

    def numbers(self) -> dict[str, tuple[int, float]]:
        """What is logged, as numbers of the whole minibatch. Raises RunFailed where parts do not make one."""
        self._require_whole(float(self._off))
        self._off = 0.0
        names = sorted(self.logged)
        place = ", ".join(f"{name} of {'parts' if name in self._partial else 'all'}" for name in names)
        own = torch.tensor([[float(self.logged[name][1]) for name in names]], dtype=torch.float64)
        columns = self._runtime.world.gather(own, self._place(f"the numbers {place}")).unbind(1)
        for name, column in zip(names, columns, strict=True):
            if name in self._partial:
                self.logged[name] = self.logged[name][0], float(column.sum())
            elif (column - column[0]).abs().max() > NUMBERS_OFF * column.abs().max():
                found = f"found {column.tolist()} in the processes for '{name}'"
                expected = "expected the same, or update.log within the loop over parts"
                raise self._refusal(f"update.log: {found}, {expected}")
        self._partial = {}
        return {name: (step, float(value)) for name, (step, value) in self.logged.items()}

    def move(self, optimiser: torch.optim.Optimizer, weights: list[Tensor], clip: float | None) -> None:
        """Moves an optimiser by the gradients of its weights, which are those of the whole minibatch."""
        if not self.scaler.is_enabled():
            if clip is not None:
                nn.utils.clip_grad_norm_(weights, clip)
            optimiser.step()
        elif any(weight.grad is not None for weight in weights):  # the scaler refuses a step without one
            if clip is not None:
                self.scaler.unscale_(optimiser)
                nn.utils.clip_grad_norm_(weights, clip)
            self.scaler.step(optimiser)
            self._scale_used = True

    def move_by(
        self, optimiser: torch.optim.Optimizer, weights: list[Tensor], whole: Callable[[], Tensor]
    ) -> Tensor:
        """Moves an optimiser that asks for loss and gradients of the whole minibatch by `whole`."""
        return torch.as_tensor(optimiser.step(whole))  # type: ignore[arg-type]

    def _share(self) -> float:
        """The part's fraction of the rows; of what belongs to no part, each process' of the whole."""
        return 1.0 / self._runtime.world.size if self._part is None else self._part.fraction

    def _may_lack_a_loss(self) -> bool:
        """Whether the loss may be that of another process' parts: this one went through its own."""
        return self._device_parts is not None and self._runtime.world.size > 1

    def _sum_up(self, weights: list[Tensor], place: str) -> None:
        """Puts the whole minibatch's gradients in the place of those of this process' parts, and its loss."""
        begun, fraction = self._calls is not None, self._counted()
        self._calls = None
        if self._runtime.world.size == 1:
            if isinstance(fraction, Tensor):
                off, before = (fraction - 1).nan_to_num(0), torch.as_tensor(self._off).to(fraction)
                self._off = off.where(off.abs() > before.abs(), before)  # not looked at: a GPU would wait
            else:
                self._require_whole(fraction - 1)
            return
        loss = torch.zeros(()) if self._complete or self._loss is None else self._loss
        numbers = [float(loss), float(fraction)] if begun else []  # otherwise it was summed up before
        sums = self._runtime.world.sum_gradients(weights, *numbers, place=self._place(place))
        if begun:
            self._require_whole(sums[1] - 1)
            self._loss = torch.tensor(sums[0], dtype=loss.dtype, device=loss.device)

    def _counted(self) -> Tensor | float:
        """What this process' parts count of the whole, for each loss; NaN where that cannot be said."""
        calls = set((self._calls or {}).values())
        if not calls:
            return 1.0 / self._runtime.world.size
        return self._fraction / calls.pop() if len(calls) == 1 and 0 not in calls else math.nan

    def _require_whole(self, off: float) -> None:
        if abs(off) > WEIGHTS_OFF:
            found = f"found weights that sum to {1 + off:.4g} over all parts"
            expected = (
                "expected 1: each part's fraction of the rows, tokens or whatever the loss is a mean over"
            )
            raise self._refusal(f"update.backward: {found}, {expected}")

    def _step_with(
        self,
        optimiser: torch.optim.Optimizer,
        weights: list[Tensor],
        closure: Callable[[], object],
        clip: float | None,
    ) -> Tensor:
        def whole() -> Tensor:
            _clear(weights)
            before = self._backwards
            closure()
            if self._backwards == before or self._loss is None:
                expected = "expected update.backward in it"
                raise self._refusal(f"update.step: found a closure without backward, {expected}")
            self._sum_up(weights, "update.step with a closure")
            self._complete = True
            if clip is not None:
                nn.utils.clip_grad_norm_(weights, clip)
            return self._loss

        first = self.move_by(optimiser, weights, whole)
        _clear(weights)
        return first.detach()

    def _update_scale(self) -> None:
        """After the last step with the scale that a loss was taken backward with."""
        if self._scale_used:
            self.scaler.update()
            self._scale_used = False

    def _place(self, what: str) -> str:
        return f"phase {self._phase.name}, step {self.step_number + 1}, {what}"

    def _refusal(self, why: str) -> RunFailed:
        return RunFailed(f"phase {self._phase.name}, step {self.step_number + 1}: {why}")


def _weighted(value: Any, weight: Tensor | float) -> Any:
    """The bits stay where the weight is 1."""
    return value if isinstance(weight, float) and weight == 1.0 else value * weight


def _tensors(weights: Weights) -> Iterator[Tensor]:
    if isinstance(weights, nn.Module):
        yield from weights.parameters()
    elif isinstance(weights, Tensor):
        yield weights
    else:
        for one in weights:
            yield from _tensors(one)


def _weights_of(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimiser.param_groups for weight in group["params"]]


def _clear(weights: Iterable[Tensor]) -> None:
    for weight in weights:
        weight.grad = None
