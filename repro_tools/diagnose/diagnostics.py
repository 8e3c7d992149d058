"""What can be measured of a phase that does not train, without knowing its method. Judges nothing: see `repro_tools.diagnose.hypotheses`.

All of it goes by three things that every phase has: a minibatch with one row per example, a network, and a loss that is the mean
over the rows. Nothing here writes a file, and the phase's own step, optimiser and precision are used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from repro.errors import BadInput, RunFailed
from repro.phases import SingleLossPhase
from repro.randomness import generator, seed_global_generators
from repro.runtime import arithmetic
from repro_tools.diagnose.bench import Batch, Bench, constants, without_dropout
from repro_tools.diagnose.instruments import (
    Activations,
    Flatness,
    Pairings,
    Unfit,
    call,
    calls_recorded,
    outputs_recorded,
    outputs_replaced,
    tensors_of,
)
from repro_tools.diagnose.measured import Column, Measured, Rows
from repro_tools.diagnose.short_training import faster, fit, learn, train_in_place

BINS = 10
HELD_ROWS = 1024
ROW_TEST = 7


def measure(phase: SingleLossPhase, seed: int, device: torch.device, steps: int) -> tuple[Measured, nn.Module]:
    """Measures a prepared phase with `steps` steps each of fitting, training and training on shuffled pairs.

    Returns the measurements and the network that was trained.
    """
    with arithmetic(phase.precision), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, model = _measure(Bench(phase, seed, device), steps)
    return Measured(**found), model


def train(phase: SingleLossPhase, seed: int, device: torch.device, steps: int) -> nn.Module:
    """A prepared phase's network after some steps of its training."""
    bench = Bench(phase, seed, device)
    model = bench.model()
    with arithmetic(phase.precision):
        train_in_place(bench, model, steps, None, None)
    return model


def _measure(bench: Bench, steps: int) -> tuple[dict, nn.Module]:
    model = bench.model()
    found: dict = {"phase": bench.phase.name, "seed": bench.seed}
    try:
        first, second = bench.minibatch(0, "draws"), bench.minibatch(1, "draws")
        rows = len(next(iter(first.values())))
        numbers = range(min(32, max(4, math.ceil(HELD_ROWS / rows))))
        held = [bench.minibatch(0, "held", k, rows_of=bench.phase.steps + k) for k in numbers]
    except BadInput:
        raise
    except Exception as error:  # whatever a method's code may raise is the finding
        return found | {"raised": f"{type(error).__name__}: {error} (in minibatch)"}, model
    found["batch_rows"] = rows
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
    except BadInput:
        raise
    except Exception as error:
        return found | {"raised": f"{type(error).__name__}: {error} (in loss)"}, model
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
        if learning.broke_at is not None:
            # The rate, or a row that no earlier minibatch had? A fresh network tells.
            broke = _where_not_finite(bench, bench.model(), [bench.minibatch(learning.broke_at, "draws")])
            found |= broke if broke["bad_count"][0] else {}
        with _skipping(skipped, "fit"):
            worse = learning.worse_than(initial, found.get("constant"))
            found["fit"] = fit(bench, held[0], steps, at_other_rates=worse)
            if not worse and found["fit"].losses[1.0] > 1e-3 * found["fit"].begun and learning.true > 0.1 * initial:
                found["learning"] = replace(learning, faster=faster(bench, held, steps))
        with _skipping(skipped, "inputs"):
            found["ignored"], found["affine_layers"] = use_of_arguments(bench, model, held[0])
        found["unused"] = unused_columns(bench, model, held[0])
        found["flat_after"] = flatness(bench, model, held[0])
        with _skipping(skipped, "loss by time"):
            found["times"] = by_time(bench, model, held)
    return found, model


@contextmanager
def _skipping(skipped: dict[str, str], what: str) -> Iterator[None]:
    try:
        yield
    except (Unfit, RunFailed, RuntimeError, ValueError, TypeError, IndexError) as error:
        skipped[what] = " ".join(str(error).split())[:200]


# --- the data ------------------------------------------------------------------------------------------------------


def column(name: str, tensors: Sequence[Tensor]) -> Column:
    if len({tensor.shape[1:] for tensor in tensors}) > 1:  # sequences of any length
        tensors = [tensor.flatten() for tensor in tensors]
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
            with outputs_recorded(model) as out:
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


# --- time -----------------------------------------------------------------------------------------------------------


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
    losses: list[tuple[float, float | None] | None] = []
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
