"""A prepared phase on a bench: its fresh network, its minibatches, its loss, its step, and the loss of a constant output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from repro.phases import SingleLossPhase
from repro.randomness import seed_global_generators
from repro.runtime import Runtime
from repro.update import Update
from repro_tools import minibatch
from repro_tools.diagnose.instruments import Unfit, outputs_recorded

Batch = Mapping[str, Tensor]


class Bench:
    """A prepared phase on a device: its fresh network, its minibatches, its loss, its step."""

    def __init__(self, phase: SingleLossPhase, seed: int, device: torch.device):
        self.phase, self.seed, self.device = phase, seed, device
        self._collected = minibatch.first_round(phase, seed, Runtime(device), {})

    def model(self) -> nn.Module:
        seed_global_generators(self.seed, self.phase.stream, "initialise")
        return without_dropout(self.phase.make_model().to(self.device))

    def optimiser(self, model: nn.Module, factor: float = 1.0) -> torch.optim.Optimizer:
        """The phase's optimiser with `factor` times its learning rates."""
        optimiser = self.phase.make_optimiser(model)
        for group in optimiser.param_groups:
            group["lr"] = factor * group["lr"]
        return optimiser

    def update(self) -> Update:
        """What does steps in the phase's precision."""
        return Update(self.phase, self.seed, Runtime(self.device))

    def step(
        self,
        update: Update,
        optimiser: torch.optim.Optimizer,
        loss: Tensor,
        number: int,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """One step from a loss whose graph is alive, without warm-up, which would hold the rate near zero for all the steps that are
        taken here. `look` is called when the gradients are there.
        """
        update.begin(number)
        update.backward(loss)
        look()
        update.step(optimiser, clip=self.phase.options.clip_norm)
        update.end([])

    def minibatch(self, step: int, *draw: str | int, rows_of: int | None = None) -> dict[str, Tensor]:
        """That of a step, by the draw that is named. `rows_of`: the step whose rows of an epoch it takes, if another."""
        seed_global_generators(self.seed, self.phase.stream, *draw, step)
        drawn = minibatch.draw(self.phase, step, self.seed, self._collected, draw, rows_of)
        return {name: column.to(self.device) for name, column in drawn.items()}

    def loss(self, model: nn.Module, batch: Batch, *draw: str | int) -> Tensor:
        seed_global_generators(self.seed, self.phase.stream, *(draw or ("diagnosis",)))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.phase.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.phase.loss(model, batch)

    def value(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """The mean loss of several minibatches."""
        with torch.no_grad():
            return sum(float(self.loss(model, batch)) for batch in batches) / len(batches)


def without_dropout(model: nn.Module) -> nn.Module:
    """The network in train mode with its dropout layers at rest: what is measured must not be noise."""
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    return model


def constants(bench: Bench, model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """The loss when the network's output is 0, and when it is the same best value for every row.

    The second is the variance of the targets for a mean squared error, and the entropy of the labels for a cross-entropy. It is
    found by L-BFGS from the fresh network's mean output, so that no knowledge of the loss is needed.
    """
    with torch.no_grad(), outputs_recorded(model) as outputs:
        for batch in batches:
            bench.loss(model, batch)
    if not outputs or len({out.shape[1:] for out in outputs}) != 1 or outputs[0].ndim == 0:
        raise Unfit("the network's outputs have no common shape with one row per example")
    value = torch.cat(outputs).float().mean(0).requires_grad_()
    real = model.forward

    def loss_of(value: Tensor) -> Tensor:
        shapes = iter(out.shape for out in outputs)
        model.forward = lambda *positional, **named: value.expand(next(shapes))
        try:
            return torch.stack([bench.loss(model, batch) for batch in batches]).float().mean()
        finally:
            model.forward = real

    with torch.no_grad():
        zero = float(loss_of(torch.zeros_like(value)))
    search = torch.optim.LBFGS([value], max_iter=100, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = loss_of(value)
        loss.backward()
        return loss

    endless = Unfit("no constant output has the least loss: it falls without end")
    try:
        search.step(closure)
    except RuntimeError as error:  # a step that is no number any more cannot be taken
        raise endless from error
    with torch.no_grad():
        best = float(loss_of(value))
    if not math.isfinite(best) or float(value.detach().abs().max()) > 1e8:
        raise endless
    return zero, best
