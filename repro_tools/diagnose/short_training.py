"""Short trainings of a phase: a few rows fitted, pairs true and shuffled, other learning rates; and what its parameters do meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from repro.randomness import generator
from repro.runtime import progress
from repro_tools.diagnose.bench import Batch, Bench, constants
from repro_tools.diagnose.instruments import Unfit, outputs_recorded, outputs_replaced
from repro_tools.diagnose.measured import FASTER, Fit, Learning, Parameters

FACTORS = (0.01, 0.1, 10.0, 100.0)
"""Of the learning rate, tried where a few rows are not fitted at the configured one."""
FIT_ROWS = 4
EARLY_STEPS = 10
"""Over which gradients of different layers are compared."""


def faster(bench: Bench, held: Sequence[Batch], steps: int) -> float:
    """Where training ends with FASTER times the learning rate; inf when it breaks."""
    model = bench.model()
    return math.inf if train_in_place(bench, model, steps, None, None, FASTER) is not None else bench.value(model, held)


def fit(bench: Bench, batch: Batch, steps: int, at_other_rates: bool = False) -> Fit:
    """Fits a few fixed rows, at other learning rates too when asked, or where the configured one does not do it."""
    model = bench.model()
    with torch.no_grad(), outputs_recorded(model) as outputs:
        bench.loss(model, batch)
    numbers = outputs[0][0].numel() if outputs and outputs[0].ndim else 1
    able = sum(p.numel() for p in model.parameters() if p.requires_grad) // (2 * numbers)
    count = max(1, min(FIT_ROWS, able, len(next(iter(batch.values())))))
    some = {name: tensor[:count] for name, tensor in batch.items()}
    zero, constant = constants(bench, model, [some])
    if constant <= 1e-3 * zero:
        constant = bench.value(model, [some])
    losses = {1.0: _fitted(bench, some, steps, 1.0)}
    result = Fit(count, steps, constant, losses)
    if at_other_rates or not result.fitted():
        losses |= {factor: _fitted(bench, some, steps, factor) for factor in FACTORS}
    return Fit(count, steps, constant, dict(sorted(losses.items())))


def _fitted(bench: Bench, batch: Batch, steps: int, factor: float) -> float:
    model = bench.model()
    optimiser, update = bench.optimiser(model, factor), bench.update()
    losses = []
    for step in progress(range(steps), f"{bench.phase.name} fit"):
        loss = bench.loss(model, batch)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return math.inf
        bench.step(update, optimiser, loss, step)
    return median(losses[-max(1, steps // 10) :])


def learn(bench: Bench, held: Sequence[Batch], steps: int) -> tuple[nn.Module, Parameters, Learning]:
    model = bench.model()
    watch = _Watch(model)
    broke_at = train_in_place(bench, model, steps, watch, None)
    true = bench.value(model, held)
    shuffled = None
    other = bench.model()
    try:
        if train_in_place(bench, other, steps, None, _paired_at_random(bench)) is None:
            shuffled = bench.value(other, held)
    except Unfit:
        pass
    return model, watch.parameters(), Learning(steps, true, shuffled, broke_at)


def train_in_place(
    bench: Bench, model: nn.Module, steps: int, watch: _Watch | None, change: Callable | None, factor: float = 1.0
) -> int | None:
    """Trains in place. Returns the step whose loss was not finite, None when all were."""
    optimiser, update = bench.optimiser(model, factor), bench.update()
    for step in progress(range(steps), f"{bench.phase.name} training"):
        batch = bench.minibatch(step, "draws")
        if change is None:
            loss = bench.loss(model, batch, "step", step)
        else:
            with outputs_replaced(model, change(step, len(next(iter(batch.values()))))):
                loss = bench.loss(model, batch, "step", step)
        if not math.isfinite(float(loss.detach())):
            return step
        if watch is None:
            bench.step(update, optimiser, loss, step)
            continue
        watch.before_step(early=step < EARLY_STEPS, late=step >= steps // 2)
        bench.step(update, optimiser, loss, step, partial(watch.look_at_gradients, optimiser, first=step == 0))
        watch.after_step()
    return None


def _paired_at_random(bench: Bench) -> Callable[[int, int], Callable[[Tensor], Tensor]]:
    def change(step: int, rows: int) -> Callable[[Tensor], Tensor]:
        order = torch.randperm(rows, generator=generator(bench.seed, bench.phase.name, "shuffled", step))

        def permuted(out: Tensor) -> Tensor:
            if out.ndim == 0 or len(out) != rows:
                raise Unfit("the network's output has not one row per example")
            return out[order.to(out.device)]

        return permuted

    return change


class _Watch:
    """What happens to each parameter while a network is trained."""

    def __init__(self, model: nn.Module):
        self._named = dict(model.named_parameters())
        self._began = {name: p.detach().clone() for name, p in self._named.items()}
        self._last: dict[str, Tensor] = {}
        self._ratios: dict[str, list[float]] = {}
        self._given: set[int] = set()
        self._gradients: dict[str, float] = {}
        self._pulls: dict[str, float] = {}
        self._sizes: dict[str, float] = {}

    def before_step(self, early: bool, late: bool) -> None:
        matrices = {name: p.detach() for name, p in self._named.items() if p.ndim > 1}
        self._sizes = {name: float(p.norm()) for name, p in matrices.items()} if early else {}
        self._last = {name: p.clone() for name, p in matrices.items()} if late else {}

    def look_at_gradients(self, optimiser: torch.optim.Optimizer, first: bool) -> None:
        if first:
            self._given = {id(p) for group in optimiser.param_groups for p in group["params"]}
            self._gradients = {n: float(p.grad.norm()) for n, p in self._named.items() if p.grad is not None}
        for name, size in self._sizes.items():
            gradient = self._named[name].grad
            if gradient is not None:
                self._pulls[name] = max(self._pulls.get(name, 0.0), size * float(gradient.norm()))

    def after_step(self) -> None:
        for name, before in self._last.items():
            size, change = (
                float(before.square().mean().sqrt()),
                float((self._named[name].detach() - before).square().mean().sqrt()),
            )
            if size > 0 and change > 0:
                self._ratios.setdefault(name, []).append(math.log10(change / size))

    def parameters(self) -> Parameters:
        def those(condition: Callable[[str, nn.Parameter], bool]) -> tuple[str, ...]:
            return tuple(name for name, p in self._named.items() if condition(name, p))

        given = self._given
        return Parameters(
            gradients=self._gradients,
            none=those(lambda name, p: p.requires_grad and name not in self._gradients),
            frozen=those(lambda name, p: not p.requires_grad and id(p) in given),
            outside=those(lambda name, p: p.requires_grad and id(p) not in given),
            still=those(lambda n, p: p.requires_grad and id(p) in given and torch.equal(p, self._began[n])),
            pulls=self._pulls,
            updates={name: median(ratios) for name, ratios in self._ratios.items()},
        )
