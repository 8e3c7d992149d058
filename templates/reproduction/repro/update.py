"""What a step is done with: parts of the minibatch, gradients, optimisers, draws, numbers for the log.

A step takes its losses backward with `backward`, and `step` moves an optimiser by what has come together. So
several losses, optimisers and backward passes are written down in the paper's order. The gradient of an
optimiser's weights is summed over processes when it steps, and cleared after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repro import rounds
from repro.errors import RunFailed
from repro.phases import Batch, Phase
from repro.randomness import generator
from repro.rounds import Dtypes, Rows, Shapes
from repro.runtime import Runtime

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Weights = nn.Module | Tensor | Iterable[nn.Module | Tensor]
"""Networks, trainable tensors, or several of them."""


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
        self._share = 1.0 / runtime.world.size
        self._loss: Tensor | None = None
        self._complete = True  # the next backward begins a new loss
        self._scale_used = False
        self._backwards = 0
        self._stepped: dict[int, int] = {}
        self._shared: tuple[Batch, dict[str, Tensor]] | None = None
        self._folder: Path | None = None
        self._room: Rows | None = None

    # For the method.

    @property
    def device(self) -> torch.device:
        """Where networks, tensors of the state and parts of a minibatch lie."""
        return self._runtime.device

    def parts(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """This process' rows of a minibatch, on the device."""
        if self._shared is None or self._shared[0] is not batch:
            own = self._runtime.world.share_of(batch, self._phase.name)
            self._shared = batch, {name: column.to(self._runtime.device) for name, column in own.items()}
        yield self._shared[1]

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in the phase's precision."""
        half = self._dtype is not torch.float32
        return torch.autocast(self._runtime.device.type, dtype=self._dtype, enabled=half)

    def generator(self, *names: str | int) -> torch.Generator:
        """For draws within this step or `collect`, on the CPU: a function of (seed, phase, step, names)."""
        return generator(self._seed, self._phase.stream, "step", self.step_number, *names)

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
        batch["real"].sum()`; by default that of its rows. `inputs` are the weights whose gradient is wanted;
        by default all that the loss depends on.
        """
        if loss.numel() != 1 or not loss.requires_grad:
            what = f"of shape {tuple(loss.shape)}" if loss.requires_grad else "that does not require grad"
            expected = "expected a number that depends on weights"
            raise self._refusal(f"update.backward: found a loss {what}, {expected}")
        if self._complete:
            self._update_scale()
            self._loss, self._complete = None, False
        share = self._share if weight is None else weight
        if not isinstance(share, float) or share != 1.0:
            loss = loss * share
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
        elif self._stepped.get(id(optimiser), 0) == self._backwards:
            found = f"found no backward since the last step of this {type(optimiser).__name__}"
            raise self._refusal(f"update.step: {found}, expected one before it")
        else:
            self._runtime.world.sum_gradients(weights)
        self._stepped[id(optimiser)] = self._backwards
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
        _clear(weights)
        self._complete = True
        return torch.zeros(()) if self._loss is None else self._loss

    def gradient(self, weights: Weights) -> list[Tensor | None]:
        """The gradient of the weights, in their order, taken off them; None where there is none; not fp16."""
        if self.scaler.is_enabled():
            raise self._refusal("update.gradient: found fp16, expected bf16 or float32")
        tensors = list(_tensors(weights))
        self._runtime.world.sum_gradients(tensors)
        found = [tensor.grad for tensor in tensors]
        _clear(tensors)
        self._complete = True
        return found

    def log(self, name: str, value: Tensor | float) -> None:
        """A number for the curve of this name: the newest one is written at every `pace.log_every` steps.

        It counts as one after this step, also where `collect` logs it before.
        """
        self.logged[name] = self.step_number + 1, value.detach() if isinstance(value, Tensor) else value

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
        self.step_number, self._complete = step, True
        self._backwards, self._stepped = 0, {}
        self._folder, self._room = folder, None

    def end(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """After a step. Raises RunFailed when a gradient is left on a named weight: no state holds it."""
        self._update_scale()
        self._shared = None
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
        """What is logged, as numbers of the whole minibatch; the processes' shares of a loss add up to it."""
        total = self._runtime.world.total
        return {name: (step, total(float(value))) for name, (step, value) in self.logged.items()}

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
            self._complete = True
            self._runtime.world.sum_gradients(weights)
            if clip is not None:
                nn.utils.clip_grad_norm_(weights, clip)
            return self._loss

        first = optimiser.step(whole)  # type: ignore[arg-type]
        _clear(weights)
        return torch.as_tensor(first).detach()

    def _update_scale(self) -> None:
        """After the last step with the scale that a loss was taken backward with."""
        if self._scale_used:
            self.scaler.update()
            self._scale_used = False

    def _refusal(self, why: str) -> RunFailed:
        return RunFailed(f"phase {self._phase.name}, step {self.step_number + 1}: {why}")


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
