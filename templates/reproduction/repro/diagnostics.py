"""What can be measured of a phase that does not train, without knowing its method. Judges nothing: see `repro.hypotheses`.

All of it goes by three things that every phase has: a minibatch with one row per example, a network, and a loss that is the mean
over the rows. Nothing here writes a file, and the phase's own step, optimiser and precision are used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from repro.instruments import (
    Activations,
    Flatness,
    Pairings,
    Unfit,
    call,
    calls_recorded,
    outputs_replaced,
    tensors_of,
)
from repro.phases import Phase
from repro.progress import progress
from repro.randomness import generator, seed_global_generators
from repro.step import Stepper, arithmetic

Batch = Mapping[str, Tensor]
FACTORS = (0.01, 0.1, 10.0, 100.0)
"""Of the learning rate, tried where one batch is not fitted at the configured one."""
FASTER = 1000.0
"""Times the learning rate: a network that trains better still at so many times it was given far too little. See `faster`."""
FITTED = 0.5
"""A few rows count as fitted when their loss is below this share of the loss of the best constant."""
BINS = 10
HELD_ROWS = 1024
FIT_ROWS = 4
ROW_TEST = 7


@dataclass(frozen=True)
class Column:
    """A tensor of a minibatch, or an argument of the network: over several minibatches."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    least: float
    most: float
    finite: bool
    constant: bool
    """Whether every row of every minibatch is the same."""
    constant_places: int
    """Places within a row that never change."""


@dataclass(frozen=True)
class Rows:
    """How the loss treats its rows, on `rows` of them, the network fresh and in eval mode."""

    rows: int
    ratio: float | None
    """Loss of the rows together over the mean of their losses one by one: 1 for a mean, `rows` for a sum. None: not measured."""
    unpaired: float | None
    """Relative change of the loss when the network's outputs change places among the rows: 0 when it does not matter which is whose."""
    tables: tuple[str, ...]
    """Operations that made a table of rows by rows out of two columns."""
    random: bool
    """Whether the loss itself draws random numbers."""


@dataclass(frozen=True)
class Parameters:
    """Of the network, by name, over the steps that were trained."""

    gradients: Mapping[str, float]
    """Norm of the gradient at the first step, of those parameters that got one."""
    none: tuple[str, ...]
    """Trainable, and the loss does not reach them."""
    frozen: tuple[str, ...]
    """Given to the optimiser with requires_grad False."""
    outside: tuple[str, ...]
    """Trainable, and not given to the optimiser."""
    still: tuple[str, ...] = ()
    """Given to the optimiser, trainable, and to the last bit where they began."""
    updates: Mapping[str, float] = field(default_factory=dict)
    """log10 of root mean square of a step over that of the weights, the median of the later half of the steps; for each matrix."""


@dataclass(frozen=True)
class Fit:
    """A few fixed rows, fitted for `steps` steps with everything that is drawn inside the loss held fixed too."""

    rows: int
    steps: int
    begun: float
    """What counts as not having begun: the loss of the best constant on these rows, or the first loss where a constant fits them."""
    losses: Mapping[float, float]
    """Loss at the end by factor of the learning rate; inf where it was not finite."""

    def fitted(self, factor: float = 1.0) -> bool:
        return self.losses.get(factor, math.inf) < FITTED * self.begun


@dataclass(frozen=True)
class Learning:
    """`steps` steps of real training, judged on other minibatches; and the same with outputs and targets paired at random."""

    steps: int
    true: float
    shuffled: float | None
    broke_at: int | None
    """The first step whose loss was not finite."""
    faster: float | None = None
    """`true` with FASTER times the learning rate; tried where a few rows are not fitted to a thousandth, and training is not done."""

    def worse_than(self, initial: float, constant: float | None) -> bool:
        """Whether training left the network clearly worse than it was, and than a constant is."""
        return self.broke_at is not None or not self.true <= 1.25 * max(initial, constant or 0.0)


@dataclass(frozen=True)
class Measured:
    """All that was measured of a phase. What could not be is None, with the reason in `skipped`."""

    phase: str
    seed: int
    columns: tuple[Column, ...] = ()
    arguments: tuple[Column, ...] = ()
    batch_rows: int = 0
    repeated: float = 0.0
    """Share of the rows of a minibatch that occur in it twice or more."""
    same_minibatch: bool = False
    lengths_differ: bool = False
    """Whether the columns have not all as many rows: then nothing else was measured."""
    raised: str | None = None
    """The error of the first loss."""
    bad_rows: Mapping[str, tuple[float, float]] | None = None
    """Where the loss of a fresh network is not finite: range of each one-dimensional column over those rows."""
    bad_count: tuple[int, int] = (0, 0)
    warnings: tuple[str, ...] = ()
    initial: float | None = None
    zero: float | None = None
    constant: float | None = None
    expected: float | None = None
    rows: Rows | None = None
    flat: tuple[Flatness, ...] = ()
    flat_after: tuple[Flatness, ...] = ()
    parameters: Parameters | None = None
    fit: Fit | None = None
    learning: Learning | None = None
    ignored: tuple[str, ...] = ()
    """Arguments of the network that do not change its output after training."""
    unused: tuple[str, ...] = ()
    """Columns of the minibatch that do not change the loss after training."""
    affine_layers: int | None = None
    """Layers with weights, when the network is nothing but an affine map of its input; else None."""
    times: tuple[tuple[float, float | None] | None, ...] = ()
    """In ten bins of time in [0, 1], after training: the loss, and that of the bin's own best constant; None for an empty bin."""
    skipped: Mapping[str, str] = field(default_factory=dict)


class Bench:
    """A prepared phase on a device: its fresh network, its minibatches, its loss, its step."""

    def __init__(self, phase: Phase, seed: int, device: torch.device):
        self.phase, self.seed, self.device = phase, seed, device
        # Warm-up would hold the rate near zero for all the steps that are taken here; the average is nobody's here.
        self.options = phase.options.model_copy(update={"warmup_steps": 0, "ema_decay": None})

    def model(self) -> nn.Module:
        seed_global_generators(self.seed, self.phase.name, "initialise")
        return without_dropout(self.phase.make_model().to(self.device))

    def stepper(self, model: nn.Module, factor: float = 1.0) -> tuple[Stepper, torch.optim.Optimizer]:
        optimiser = self.phase.make_optimiser(model)
        for group in optimiser.param_groups:
            group["lr"] = factor * group["lr"]
        return Stepper(model, optimiser, self.options, self.device), optimiser

    def minibatch(self, step: int, *draw: str | int) -> dict[str, Tensor]:
        seed_global_generators(self.seed, self.phase.name, *draw, step)
        drawn = self.phase.minibatch(step, generator(self.seed, self.phase.name, *draw, step))
        return {name: column.to(self.device) for name, column in drawn.items()}

    def loss(self, model: nn.Module, batch: Batch, *draw: str | int) -> Tensor:
        seed_global_generators(self.seed, self.phase.name, *(draw or ("diagnosis",)))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.precision)
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


def measure(phase: Phase, seed: int, device: torch.device, steps: int) -> tuple[Measured, nn.Module]:
    """Measures a prepared phase with `steps` steps each of fitting, training and training on shuffled pairs.

    Returns the measurements and the network that was trained.
    """
    with arithmetic(phase.options.precision), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, model = _measure(Bench(phase, seed, device), steps)
    return Measured(**found), model


def train(phase: Phase, seed: int, device: torch.device, steps: int) -> nn.Module:
    """A prepared phase's network after some steps of its training."""
    bench = Bench(phase, seed, device)
    model = bench.model()
    with arithmetic(phase.options.precision):
        _train(bench, model, steps, None, None)
    return model


def _measure(bench: Bench, steps: int) -> tuple[dict, nn.Module]:
    model = bench.model()
    first, second = bench.minibatch(0, "draws"), bench.minibatch(1, "draws")
    rows = len(next(iter(first.values())))
    held = [bench.minibatch(0, "held", k) for k in range(min(32, max(4, math.ceil(HELD_ROWS / rows))))]
    found: dict = {"phase": bench.phase.name, "seed": bench.seed, "batch_rows": rows}
    found["columns"] = tuple(column(name, [batch[name] for batch in held]) for name in first)
    found["same_minibatch"] = all(torch.equal(first[name], second[name]) for name in first)
    skipped = found["skipped"] = {}
    if any(len(tensor) != rows for tensor in first.values()):
        return found | {"lengths_differ": True}, model
    found["repeated"] = repeated(first)

    try:
        with calls_recorded(model) as calls, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            initial = bench.value(model, held)
    except Exception as error:  # whatever a method's loss may raise is the finding
        return found | {"raised": f"{type(error).__name__}: {error}"}, model
    found["warnings"] = tuple(dict.fromkeys(" ".join(str(one.message).split()) for one in told))
    found |= {"initial": initial, "expected": bench.phase.expected_initial_loss()}
    if not calls.arguments:
        skipped["network"] = "the loss does not call the network by its name, model(...)"
    found["arguments"] = tuple(argument_columns(calls.arguments, rows))
    if not math.isfinite(initial):
        return found | _where_not_finite(bench, model, held), model

    with _skipping(skipped, "best constant"):
        found["zero"], found["constant"] = constants(bench, model, held)
    with _skipping(skipped, "rows"):
        found["rows"] = row_test(bench, model, held[0])
    found["flat"] = flatness(bench, model, held[0])
    with _skipping(skipped, "training"):
        model, found["parameters"], learning = learn(bench, held, steps)
        found["learning"] = learning
        with _skipping(skipped, "fit"):
            worse = learning.worse_than(initial, found.get("constant"))
            found["fit"] = fit(bench, held[0], steps, at_other_rates=worse)
            if not worse and found["fit"].losses[1.0] > 1e-3 * found["fit"].begun and learning.true > 0.1 * initial:
                found["learning"] = replace(learning, faster=faster(bench, held, steps))
        with _skipping(skipped, "inputs"):
            found["ignored"], found["affine_layers"] = use_of_arguments(bench, model, held[0])
        found["unused"] = unused_columns(bench, model, held[0])
        found["flat_after"] = flatness(bench, model, held[0])
        found["times"] = by_time(bench, model, held)
    return found, model


@contextmanager
def _skipping(skipped: dict[str, str], what: str) -> Iterator[None]:
    try:
        yield
    except (Unfit, RuntimeError, ValueError, TypeError, IndexError) as error:
        skipped[what] = " ".join(str(error).split())[:200]


# --- the data ------------------------------------------------------------------------------------------------------


def column(name: str, tensors: Sequence[Tensor]) -> Column:
    joined = torch.cat([tensor.detach() for tensor in tensors]).cpu()
    values = joined.double()
    finite = bool(values.isfinite().all())
    still = (joined == joined[:1]).all(0)
    return Column(
        name=name,
        shape=tuple(tensors[0].shape),
        dtype=str(joined.dtype).removeprefix("torch."),
        mean=float(values.mean()),
        std=float(values.std(unbiased=False)),
        least=float(values.min()),
        most=float(values.max()),
        finite=finite,
        constant=bool(still.all()),
        constant_places=int(still.sum()) if still.ndim else 0,
    )


def argument_columns(calls: Sequence[Mapping[str, object]], rows: int) -> Iterator[Column]:
    """The network's arguments over all its calls, as far as they are tensors with a row for each example."""
    by_name: dict[str, list[Tensor]] = {}
    for arguments in calls:
        for name, tensor in tensors_of(arguments, rows).items():
            by_name.setdefault(name, []).append(tensor)
    for name, tensors in by_name.items():
        if len({tensor.shape for tensor in tensors}) == 1:
            yield column(name, tensors)


def repeated(batch: Batch) -> float:
    """Share of the rows that occur more than once."""
    table = torch.cat([tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in batch.values()], 1)
    _, counts = table.double().unique(dim=0, return_counts=True)
    return float(counts[counts > 1].sum()) / len(table)


def _where_not_finite(bench: Bench, model: nn.Module, held: Sequence[Batch]) -> dict:
    model.eval()
    bad, seen = [], 0
    for batch in held:
        seen += len(next(iter(batch.values())))
        bad += [{name: tensor[row] for name, tensor in batch.items()} for row in _bad_rows(bench, model, batch)]
    ranges = {}
    for name, tensor in held[0].items():
        if tensor.ndim == 1 and bad:
            values = [float(row[name]) for row in bad]
            ranges[name] = (min(values), max(values))
    return {"bad_rows": ranges, "bad_count": (len(bad), seen)}


def _bad_rows(bench: Bench, model: nn.Module, batch: Batch) -> list[int]:
    """Rows whose loss is not finite, by halving."""

    def search(rows: range) -> list[int]:
        part = {name: tensor[rows.start : rows.stop] for name, tensor in batch.items()}
        if math.isfinite(bench.value(model, [part])):
            return []
        if len(rows) == 1:
            return [rows.start]
        middle = rows.start + len(rows) // 2
        return search(range(rows.start, middle)) + search(range(middle, rows.stop))

    return search(range(len(next(iter(batch.values())))))


# --- the loss ------------------------------------------------------------------------------------------------------


def constants(bench: Bench, model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """The loss when the network's output is 0, and when it is the same best value for every row.

    The second is the variance of the targets for a mean squared error, and the entropy of the labels for a cross-entropy. It is
    found by L-BFGS from the fresh network's mean output, so that no knowledge of the loss is needed.
    """
    outputs = []
    with torch.no_grad(), outputs_replaced(model, lambda out: outputs.append(out) or out):
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

    search.step(closure)
    with torch.no_grad():
        best = float(loss_of(value))
    if not math.isfinite(best) or float(value.detach().abs().max()) > 1e8:
        raise Unfit("no constant output has the least loss: it falls without end")
    return zero, best


def row_test(bench: Bench, model: nn.Module, batch: Batch) -> Rows:
    """How the loss treats rows whose outputs differ: noise is added, since a network may begin with the same output for all."""
    count = min(ROW_TEST, len(next(iter(batch.values()))))
    some = {name: tensor[:count] for name, tensor in batch.items()}
    noise = torch.randn(count, 4096, generator=generator("rows"))

    def loss(rows: slice, shift: int = 0, draw: str = "rows") -> float:
        def disturbed(out: Tensor) -> Tensor:
            if out.ndim == 0 or len(out) != rows.stop - rows.start:
                raise Unfit(f"the network's output {tuple(out.shape)} has not one row per example")
            own = noise[rows, torch.arange(max(1, out[0].numel())) % noise.shape[1]].view(out.shape).to(out)
            return (out + scale * own).roll(shift, 0)

        with outputs_replaced(model, disturbed):
            return float(bench.loss(model, {name: tensor[rows] for name, tensor in some.items()}, draw))

    whole = slice(0, count)
    model.eval()
    try:
        with torch.no_grad():
            out: list[Tensor] = []
            with outputs_replaced(model, lambda o: out.append(o) or o):
                bench.loss(model, some)
            scale = float(out[0].float().square().mean().sqrt()) or 1.0
            with Pairings(count) as tables:
                bench.loss(model, some)
            together = loss(whole)
            random = together != loss(whole, draw="other rows")
            if random or not together:
                return Rows(count, None, None, tuple(dict.fromkeys(tables.found)), random)
            unpaired = abs(loss(whole, shift=1) - together) / abs(together)
            alone = sum(loss(slice(k, k + 1)) for k in range(count)) / count
            return Rows(
                count, together / alone if alone else None, unpaired, tuple(dict.fromkeys(tables.found)), random
            )
    finally:
        without_dropout(model)


# --- the network ---------------------------------------------------------------------------------------------------


def flatness(bench: Bench, model: nn.Module, batch: Batch) -> tuple[Flatness, ...]:
    with torch.no_grad(), Activations(model) as activations:
        bench.loss(model, batch)
    return tuple(activations.found)


def use_of_arguments(bench: Bench, model: nn.Module, batch: Batch) -> tuple[tuple[str, ...], int | None]:
    """Arguments that change nothing when they change places among the rows; layers of a network that is only affine."""
    rows = len(next(iter(batch.values())))
    model.eval()
    try:
        with torch.no_grad(), calls_recorded(model) as calls:
            bench.loss(model, batch)
        arguments = calls.arguments[0]
        tensors = tensors_of(arguments, rows)
        with torch.no_grad():
            seed_global_generators(0)
            out = call(model, arguments)
            if not isinstance(out, Tensor):
                raise Unfit(f"the network gives a {type(out).__name__}, not a tensor")

            def changed(new: Mapping[str, Tensor]) -> float:
                seed_global_generators(0)
                return float((call(model, {**arguments, **new}) - out).abs().max())

            ignored = tuple(
                name
                for name, tensor in tensors.items()
                if not column(name, [tensor]).constant and changed({name: tensor.roll(1, 0)}) == 0
            )
            if bool((out == out[:1]).all()):
                ignored = ()  # a network that died ignores everything: other findings say why
            layers = sum(p.ndim > 1 for p in model.parameters())
            if layers < 2 or not tensors or not all(tensor.is_floating_point() for tensor in tensors.values()):
                return ignored, None
            middle = {name: (tensor + tensor.roll(1, 0)) / 2 for name, tensor in tensors.items()}
            bend = (call(model, {**arguments, **middle}) - (out + out.roll(1, 0)) / 2).abs().max()
            spread = (out - out.roll(1, 0)).abs().max()
            return ignored, layers if spread > 0 and bend < 1e-4 * spread else None
    finally:
        without_dropout(model)


def unused_columns(bench: Bench, model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Columns whose values do not matter to the loss."""
    with torch.no_grad():
        loss = float(bench.loss(model, batch))
        return tuple(
            name
            for name, tensor in batch.items()
            if not column(name, [tensor]).constant and float(bench.loss(model, {**batch, name: _other(tensor)})) == loss
        )


def _other(tensor: Tensor) -> Tensor:
    """Other values in the same range."""
    if tensor.is_floating_point():
        return tensor.max() + tensor.min() - tensor
    return (tensor.max() + tensor.min() - tensor).to(tensor.dtype) if tensor.dtype != torch.bool else ~tensor


# --- training ------------------------------------------------------------------------------------------------------


def faster(bench: Bench, held: Sequence[Batch], steps: int) -> float:
    """Where training ends with FASTER times the learning rate; inf when it breaks."""
    model = bench.model()
    return math.inf if _train(bench, model, steps, None, None, FASTER) is not None else bench.value(model, held)


def fit(bench: Bench, batch: Batch, steps: int, at_other_rates: bool = False) -> Fit:
    """Fits a few fixed rows, at other learning rates too when asked, or where the configured one does not do it."""
    model = bench.model()
    outputs: list[Tensor] = []
    with torch.no_grad(), outputs_replaced(model, lambda out: outputs.append(out) or out):
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
    stepper, _ = bench.stepper(model, factor)
    losses = []
    for step in progress(range(steps), f"{bench.phase.name} fit"):
        loss = bench.loss(model, batch)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return math.inf
        stepper.step(loss, step)
    return median(losses[-max(1, steps // 10) :])


def learn(bench: Bench, held: Sequence[Batch], steps: int) -> tuple[nn.Module, Parameters, Learning]:
    model = bench.model()
    watch = _Watch(model)
    broke_at = _train(bench, model, steps, watch, None)
    true = bench.value(model, held)
    shuffled = None
    other = bench.model()
    try:
        if _train(bench, other, steps, None, _paired_at_random(bench)) is None:
            shuffled = bench.value(other, held)
    except Unfit:
        pass
    return model, watch.parameters(), Learning(steps, true, shuffled, broke_at)


def _train(
    bench: Bench, model: nn.Module, steps: int, watch: _Watch | None, change: Callable | None, factor: float = 1.0
) -> int | None:
    """Trains in place. Returns the step whose loss was not finite, None when all were."""
    stepper, optimiser = bench.stepper(model, factor)
    for step in progress(range(steps), f"{bench.phase.name} training"):
        batch = bench.minibatch(step, "draws")
        if change is None:
            loss = bench.loss(model, batch, "step", step)
        else:
            with outputs_replaced(model, change(step, len(next(iter(batch.values()))))):
                loss = bench.loss(model, batch, "step", step)
        if not math.isfinite(float(loss.detach())):
            return step
        if watch is not None and step >= steps // 2:
            watch.before_step()
        stepper.step(loss, step)
        if watch is not None:
            watch.after_step(optimiser, first=step == 0)
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

    def before_step(self) -> None:
        self._last = {name: p.detach().clone() for name, p in self._named.items() if p.ndim > 1}

    def after_step(self, optimiser: torch.optim.Optimizer, first: bool) -> None:
        if first:
            self._given = {id(p) for group in optimiser.param_groups for p in group["params"]}
            self._gradients = {n: float(p.grad.norm()) for n, p in self._named.items() if p.grad is not None}
        for name, before in self._last.items():
            size, change = (
                float(before.square().mean().sqrt()),
                float((self._named[name] - before).square().mean().sqrt()),
            )
            if size > 0 and change > 0:
                self._ratios.setdefault(name, []).append(math.log10(change / size))
        self._last = {}

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
            updates={name: median(ratios) for name, ratios in self._ratios.items()},
        )


def by_time(bench: Bench, model: nn.Module, held: Sequence[Batch]) -> tuple[tuple[float, float | None] | None, ...]:
    """The loss, and that of the best constant, of the rows in each tenth of [0, 1], when the minibatch has a column `t` of times."""
    times = held[0].get("t")
    if times is None or not times.is_floating_point() or times.ndim > 2 or times[0].numel() != 1:
        return ()
    joined = {name: torch.cat([batch[name] for batch in held]) for name in held[0]}
    t = joined["t"].flatten()
    if float(t.min()) < 0 or float(t.max()) > 1 or float(t.min()) == float(t.max()):
        return ()
    bins = (t * BINS).long().clamp(0, BINS - 1)
    size = len(times)
    losses = []
    for number in range(BINS):
        index = (bins == number).nonzero().flatten()
        parts = [{name: tensor[part] for name, tensor in joined.items()} for part in index.split(size)]
        parts = [part for part in parts if len(part["t"]) > 1]
        if not parts:
            losses.append(None)
            continue
        try:
            constant = constants(bench, model, parts)[1]
        except Unfit:
            constant = None
        losses.append((bench.value(model, parts), constant))
    return tuple(losses)
