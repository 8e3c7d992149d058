"""Whether the parts of a minibatch give what the whole does: tried before a run in several parts.

A step is done twice with the same few rows: by one process in one go, and by all processes in their
micro-batches; in float32, on a state of its own, without moving an optimiser. A loss that couples rows, as
with batch norm, or that weighs parts by another count than it is a mean over, gives another gradient; what is
changed in each part, as a running average is, leaves another state. It is tried piece by piece with all rows
of the first minibatch, and with a piece of a later one and of the last, for terms that come in later.

What could hide that is taken away: random draws of the whole are handed to the parts row by row, and weights
are moved off zeros behind which no gradient comes through. What cannot be decided is said to be not measured.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from repro import checkpoint
from repro.errors import BadInput, RunFailed
from repro.phases import Batch, Networks, Phase, SingleLossPhase
from repro.randomness import generator, seed_global_generators
from repro.runtime import Runtime, World, arithmetic
from repro.update import Update, rows_of

OFF, ROUNDING = 1e-3, 1e-5
"""By how much two gradients of a weight may differ: relatively, and relatively to that of all weights, since
one that is zero in theory is rounding."""
ROWS = 2
"""In each part, where the minibatch has so many: of one row there are no statistics."""
PIECES = 8
"""Of the first minibatch that are tried at most."""
MOVED, MOVED_RELATIVELY = 0.02, 0.1
"""Standard deviation of what is added to weights that are all zero, and to others, relative to their size."""

Outcome = Literal["same", "refused", "not measured", "per part"]


@dataclass(frozen=True)
class Verdict:
    """What came out of trying the parts, and why; `draws` where the step draws numbers, as dropout does: then
    parts give the same in distribution only."""

    outcome: Outcome
    why: str
    processes: int
    micro_batches: int
    draws: bool = False


def split_test(
    phase: Phase[Any],
    batches: Mapping[int, Batch],
    seed: int,
    runtime: Runtime,
    earlier: Mapping[str, Networks],
) -> Verdict:
    """Tries steps of a prepared phase, by their number, on rows of a minibatch each, in the parts of a run.

    All processes call it, and all get the same answer. Raises RunFailed for what no run in parts can do.
    """
    world, micro_batches = runtime.world, runtime.micro_batches_of(phase.name)

    def verdict(outcome: Outcome, why: str, draws: bool = False) -> Verdict:
        return Verdict(outcome, why, world.size, micro_batches, draws)

    if phase.parts_define:
        return verdict("per part", f"the paper means {phase.parts_define}")
    own = copy.copy(phase)  # what `setup` keeps on it is not the run's
    if isinstance(own, SingleLossPhase):
        own._sets_rates = lambda: False  # type: ignore[method-assign]  # of steps that nothing came before
    for step, batch in batches.items():
        asked = Update(own, seed, runtime)
        asked.begin(step)
        next(asked.parts(batch), None)  # which refuses a minibatch that has no parts
    seed_global_generators(seed, phase.stream, "split")
    state = own.setup(earlier)
    checkpoint.move(state, runtime.device)
    _move_weights(state, seed)
    before = copy.deepcopy(checkpoint.saved(state))
    draws, unclear, nothing, divided = False, "", "its gradient is zero", False
    others: dict[str, None] = {}
    for step, few in _pieces(batches, runtime.parts_of(phase.name)):
        rows = len(next(iter(few.values())))
        whole = _Trial(own, seed, replace(runtime, world=World(), micro_batches={}))
        try:
            whole.do(state, few, step)
            after = copy.deepcopy(checkpoint.saved(state))
            checkpoint.restore(state, copy.deepcopy(before))
        except (BadInput, RunFailed):  # such as for weights that only sum to 1 over a certain number of parts
            raise
        except Exception as error:  # of the method, on fewer rows than a run has
            return verdict("not measured", f"on {rows} rows alone the step raises {_line(error)}", draws)
        parts = _Trial(own, seed, runtime, whole, rows)
        try:
            parts.do(state, few, step)
        except (BadInput, RunFailed):
            raise
        except Exception as error:
            found = f"found {_line(error)} in a step with {runtime.parts_of(phase.name)} parts of {rows} rows"
            raise RunFailed(f"phase {phase.name}: {found}, expected what it does with all {rows}") from error
        draws = draws or world.any(bool(parts.draws), "split test, draws")
        unclear = unclear or next(filter(None, world.texts(parts.unclear, "split test, unclear")), "")
        fault, empty = _fault(whole.gradients, parts.gradients, checkpoint.parameters(state))
        fault = fault or _change(after, checkpoint.saved(state))
        if world.any(bool(fault), "split test, fault"):
            if unclear:
                return verdict("not measured", unclear, draws)
            return verdict("refused", f"{fault or 'another gradient'}; {_cause(state)}", draws)
        nothing, divided = nothing and empty, divided or whole.went_through_parts
        others |= {name: None for name, value in whole.told.items() if not _near(value, parts.told.get(name))}
        checkpoint.restore(state, copy.deepcopy(before))
    if not divided:
        return verdict("same", "each part does the whole minibatch: nothing is divided", draws)
    if nothing:
        return verdict("not measured", nothing, draws)
    if others:
        named = f"what is logged as {', '.join(others)} is not that of the whole minibatch"
        return verdict("same", f"{named}: log it within the loop over parts, or as a mean over rows", draws)
    return verdict("same", "", draws)


def require_same(phase: Phase[Any], verdict: Verdict) -> None:
    """Raises BadInput, with what to do, for a verdict that refuses the parts."""
    if verdict.outcome == "refused":
        count = verdict.processes * verdict.micro_batches
        found = f"found another gradient or state in {count} parts of a minibatch than for the whole"
        ways = (
            "use update.gather or a norm of single rows, give update.backward the weight, run it in one part"
        )
        paper = "or say in `parts_define` that the paper means it per part"
        raise BadInput(f"phase {phase.name}: {found}, expected the same: {verdict.why}; {ways}, {paper}")


class _Trial(Update):
    """Moves no optimiser: it notes the gradients. What is drawn at random is noted too, or is what `whole`
    drew for the same among its `rows`."""

    def __init__(
        self, phase: Phase[Any], seed: int, runtime: Runtime, whole: _Trial | None = None, rows: int = 0
    ):
        super().__init__(phase, seed, runtime)
        self.scaler, self._dtype = torch.amp.GradScaler(runtime.device.type, enabled=False), torch.float32
        self.gradients: list[list[tuple[Tensor, Tensor | None]]] = []
        self.told: Mapping[str, tuple[int, float]] = {}
        self.drawn: dict[tuple[int, bool, int], Tensor] = {}
        self.draws, self.unclear = 0, ""
        self.whole, self.rows = whole, rows

    @property
    def went_through_parts(self) -> bool:
        return self._passes > 0

    def do(self, state: Any, batch: Batch, step: int) -> None:
        seed_global_generators(self._seed, self._phase.stream, "split", step)
        elsewhere = _elsewhere()
        self.begin(step)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(arithmetic("float32"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others draw their dropout unseen
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # and so do other threads
            stack.enter_context(_Draws(self))
            self._phase.train_step(state, batch, self)
        if _elsewhere() != elsewhere:
            self.draws, self.unclear = self.draws + 1, "the step draws from NumPy or Python"
        for weight in checkpoint.parameters(state).values():
            weight.grad = None
        self.told = self.numbers()

    def move(self, optimiser: torch.optim.Optimizer, weights: list[Tensor], clip: float | None) -> None:
        self.gradients.append([(weight, weight.grad) for weight in weights])

    def move_by(self, optimiser: torch.optim.Optimizer, weights: list[Tensor], whole: Any) -> Tensor:
        loss: Tensor = whole()
        self.gradients.append([(weight, weight.grad) for weight in weights])
        return loss

    def gradient(self, weights: Any) -> list[Tensor | None]:
        found = super().gradient(weights)
        self.gradients.append([(one, one.clone()) for one in found if one is not None])
        return found

    def draw_apart(self, *names: str | int) -> None:
        """Nothing: the parts are given what the whole drew."""

    def place_of_draws(self) -> tuple[int, int]:
        """The loop over parts, and the part in it; -1 outside of it."""
        return self._passes, -1 if self._part is None else self._part.number

    def from_whole(self, drawn: Tensor, place: tuple[int, bool, int]) -> Tensor | None:
        """What the whole drew in this place, for the rows of this part; None where that cannot be said.

        That rows are not the first dimension, or are several numbers each, is a guess: then equal gradients
        say that the parts are right, and others nothing.
        """
        assert self.whole is not None
        of_whole = self.whole.drawn.get(place)
        if of_whole is None or of_whole.ndim != drawn.ndim:
            return None
        other = [
            d for d, (one, two) in enumerate(zip(of_whole.shape, drawn.shape, strict=True)) if one != two
        ]
        if not other and (self._part is None or drawn.numel() == 1):
            return of_whole
        if not other:
            self.unclear = _not_by_rows(drawn)
            return of_whole
        each, rest = divmod(of_whole.shape[other[0]], self.rows)
        if len(other) > 1 or rest or self._part is None:
            return None
        if (other[0], each) != (0, 1):
            self.unclear = _not_by_rows(drawn)
        rows = torch.arange(self.rows)[rows_of(self._part.number, self._part.of)]
        own = of_whole.unflatten(other[0], (self.rows, each)).index_select(other[0], rows.to(drawn.device))
        own = own.flatten(other[0], other[0] + 1)
        return own if own.shape == drawn.shape else None


def _not_by_rows(drawn: Tensor) -> str:
    return f"the step draws {tuple(drawn.shape)}, not by rows"


class _Draws(TorchDispatchMode):
    """Sees every operation that draws, attention's dropout too."""

    def __init__(self, trial: _Trial):
        super().__init__()
        self._trial, self._at, self._count = trial, (0, 0), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return found
        trial, name = self._trial, func.name()
        if name == "aten::native_dropout":
            output, drawn = found
        elif isinstance(found, Tensor) and "randperm" not in name:
            output, drawn = None, found
        else:
            trial.draws, trial.unclear = trial.draws + 1, f"the step draws by {name}"
            return found
        at = trial.place_of_draws()
        self._count = self._count + 1 if at == self._at else 0
        self._at, place = at, (at[0], at[1] >= 0, self._count)
        trial.draws += 1
        if trial.whole is None:
            trial.drawn[place] = drawn.clone()
        elif (own := trial.from_whole(drawn, place)) is None:
            trial.unclear = _not_by_rows(drawn)
        else:
            drawn.copy_(own)
            if output is not None:
                output.copy_(args[0] * drawn / (1 - args[1]) if args[1] < 1 else torch.zeros_like(output))
        return found


def _pieces(batches: Mapping[int, Batch], parts: int) -> Iterator[tuple[int, Batch]]:
    """Rows to try, with the number of their step: as many as one part has, so that they fit, but ROWS for
    each part where there are so many."""
    for number, (step, batch) in enumerate(batches.items()):
        rows = max((len(column) for column in batch.values()), default=0)
        few = max(-(-rows // parts), min(rows, ROWS * parts))
        starts = [*range(0, rows - few + 1, max(few, 1))][:PIECES]
        if number:
            starts = [starts[number % len(starts)]]
        elif rows % few:
            starts.append(rows - few)  # those at the end
        for start in starts:
            yield step, {name: column[start : start + few] for name, column in batch.items()}


def _move_weights(state: Any, seed: int) -> None:
    chance = generator(seed, "split")
    for weight in {id(one): one for one in checkpoint.parameters(state).values()}.values():
        if weight.requires_grad and weight.is_floating_point() and not is_lazy(weight):
            size = float(weight.detach().square().mean().sqrt()) if weight.numel() else 0.0
            noise = torch.randn(weight.shape, generator=chance).to(weight)
            with torch.no_grad():
                weight.add_(noise * (MOVED_RELATIVELY * size or MOVED))


def _fault(
    whole: Sequence[Sequence[tuple[Tensor, Tensor | None]]],
    parts: Sequence[Sequence[tuple[Tensor, Tensor | None]]],
    names: Mapping[str, Tensor],
) -> tuple[str, str]:
    """The weight whose gradients differ most, in words, where they do; or why they say nothing."""
    if len(whole) != len(parts):
        return f"{len(parts)} steps of optimisers for {len(whole)}", ""
    worst, told, nothing = 1.0, "", "its gradient is zero"
    for one, other in zip(whole, parts, strict=True):
        total = sum(float(slope.double().square().sum()) for _, slope in one if slope is not None) ** 0.5
        if len(one) != len(other):
            return "gradients of other weights", ""
        if not isfinite(total):
            return "", "its gradient is not finite"
        nothing = "" if total else nothing
        for (weight, expected), (_, found) in zip(one, other, strict=True):
            expected = torch.zeros_like(weight) if expected is None else expected
            found = torch.zeros_like(weight) if found is None else found
            off = float((found.double() - expected.double()).norm())
            size = float(expected.double().norm())
            ratio = off / (OFF * size + ROUNDING * total) if total or off else 0.0
            if not ratio <= worst:  # which NaN is not
                name = next((name for name, known in names.items() if known is weight), "a gradient")
                relative = f"off by {off / (size or total):.1%}" if size or total else "not zero"
                worst, told = ratio, f"that of {name.removeprefix('state.')} is {relative}"
    return told, nothing


def _change(whole: Any, parts: Any, name: str = "") -> str:
    """The first tensor or fraction that the step leaves otherwise, in words. Whole numbers, which may count,
    and the state of generators may differ."""
    if isinstance(whole, dict | list | tuple):
        pairs = whole.items() if isinstance(whole, dict) else enumerate(whole)
        others = parts if isinstance(parts, dict) else dict(enumerate(parts))
        found = (_change(one, others.get(key), f"{name}.{key}") for key, one in pairs)
        return next(filter(None, found), "")
    if isinstance(whole, float) and isinstance(parts, float):
        whole, parts = torch.tensor(whole), torch.tensor(parts)
    if not isinstance(whole, Tensor) or not isinstance(parts, Tensor) or not whole.is_floating_point():
        return ""
    if whole.shape != parts.shape:
        return f"{name.removeprefix('.')} has {tuple(parts.shape)} numbers for {tuple(whole.shape)}"
    off, size = float((parts.double() - whole.double()).norm()), float(whole.double().norm())
    if off <= OFF * size or not isfinite(size):
        return ""
    return f"the step leaves {name.removeprefix('.')} off by {off / (size or off):.1%}"


def _cause(state: Any) -> str:
    networks = checkpoint.modules(state).values()
    kinds = {type(one).__name__: one for network in networks for one in network.modules() if one.training}
    if any(isinstance(one, _BatchNorm) for one in kinds.values()):
        return "its batch norm takes the statistics of a part"
    if "_SpectralNorm" in kinds:
        return "its spectral norm takes an iteration in each part"
    return "the loss couples rows, is a mean over another count than rows, or each part changes what it uses"


def _near(one: tuple[int, float], other: tuple[int, float] | None) -> bool:
    return other is not None and abs(one[1] - other[1]) <= OFF * abs(one[1]) + ROUNDING


def _elsewhere() -> tuple[Any, ...]:
    """The state of the generators that are not torch's."""
    name, keys, position, *_ = np.random.get_state()
    return random.getstate(), name, bytes(keys), position  # type: ignore[arg-type]


def _line(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
