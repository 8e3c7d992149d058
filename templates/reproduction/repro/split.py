"""Whether the parts of a minibatch give the gradient of the whole: tried before a run in several parts.

A step is done twice with the same few rows: by one process in one go, and by all processes in their
micro-batches; in float32, on a state of its own, without moving an optimiser. A loss that couples rows, as
with batch norm, or that weighs parts by another count than it is a mean over, gives another gradient.

What could hide that is taken away: random draws of the whole are handed to the parts row by row, and weights
are moved off zeros behind which no gradient comes through. What cannot be decided is said to be not measured.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Mapping, Sequence
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
from repro.phases import Batch, Networks, Phase
from repro.randomness import generator, seed_global_generators
from repro.runtime import Runtime, World, arithmetic
from repro.update import Update, rows_of

OFF, ROUNDING = 1e-3, 1e-5
"""By how much two gradients of a weight may differ: relatively, and relatively to that of all weights, since
one that is zero in theory is rounding."""
ROWS = 2
"""In each part, where the minibatch has so many: of one row there are no statistics."""
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
    phase: Phase[Any], batch: Batch, step: int, seed: int, runtime: Runtime, earlier: Mapping[str, Networks]
) -> Verdict:
    """Tries a step of a prepared phase on rows of its minibatch, in the parts of a run with this runtime.

    All processes call it, and all get the same answer. Raises RunFailed for what no run in parts can do.
    """
    world, micro_batches = runtime.world, runtime.micro_batches_of(phase.name)

    def verdict(outcome: Outcome, why: str, draws: bool = False) -> Verdict:
        return Verdict(outcome, why, world.size, micro_batches, draws)

    if phase.parts_define:
        return verdict("per part", f"the paper means {phase.parts_define}")
    rows = _rows_to_try(batch, runtime.parts_of(phase.name))
    few = {name: column[:rows] for name, column in batch.items()}
    own = copy.copy(phase)  # what `setup` keeps on it is not the run's
    whole = _Trial(own, seed, replace(runtime, world=World(), micro_batches={}))
    try:
        seed_global_generators(seed, phase.stream, "split")
        state = own.setup(earlier)
        checkpoint.move(state, runtime.device)
        _move_weights(state, seed)
        before = copy.deepcopy(checkpoint.saved(state))
        whole.do(state, few, step)
        checkpoint.restore(state, before)
    except (BadInput, RunFailed):  # such as for weights that only sum to 1 over a certain number of parts
        raise
    except Exception as error:  # of the method, on fewer rows than a run has
        return verdict("not measured", f"on {rows} rows alone the step raises {_line(error)}")
    parts = _Trial(own, seed, runtime, whole, rows)
    try:
        parts.do(state, few, step)
    except (BadInput, RunFailed):
        raise
    except Exception as error:
        found = f"found {_line(error)} in a step with {runtime.parts_of(phase.name)} parts of {rows} rows"
        raise RunFailed(f"phase {phase.name}: {found}, expected what it does with all {rows}") from error

    draws = world.any(bool(parts.draws), "split test, draws")
    unclear = next(filter(None, world.texts(parts.unclear, "split test, unclear")), "")
    fault, nothing = _fault(whole.gradients, parts.gradients, checkpoint.parameters(state))
    if world.any(bool(fault), "split test, fault"):
        if unclear:
            return verdict("not measured", unclear, draws)
        return verdict("refused", f"{fault or 'another gradient'}; {_cause(state)}", draws)
    if not whole.gradients and not whole.went_through_parts:
        return verdict("same", "each process does the whole minibatch", draws)
    if nothing:
        return verdict("not measured", nothing, draws)
    others = [name for name, value in whole.told.items() if not _near(value, parts.told.get(name))]
    return verdict("same", f"but for the numbers logged as {', '.join(others)}" if others else "", draws)


def require_same(phase: Phase[Any], verdict: Verdict) -> None:
    """Raises BadInput, with what to do, for a verdict that refuses the parts."""
    if verdict.outcome == "refused":
        count = verdict.processes * verdict.micro_batches
        found = f"found another gradient in {count} parts of a minibatch than for the whole"
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
        self._at, place = at, (at[0], at[1] >= 0, self._count if at == self._at else 0)
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


def _rows_to_try(batch: Batch, parts: int) -> int:
    """As many as one part has, so that they fit, but ROWS for each part where there are so many."""
    rows = max((len(column) for column in batch.values()), default=0)
    return max(-(-rows // parts), min(rows, ROWS * parts))


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


def _cause(state: Any) -> str:
    networks = checkpoint.modules(state).values()
    if any(isinstance(one, _BatchNorm) and one.training for network in networks for one in network.modules()):
        return "its batch norm takes the statistics of a part"
    what = "couples rows, is a mean over another count than rows"
    return f"the loss {what}, or uses what each pass changes, as spectral norm does"


def _near(one: tuple[int, float], other: tuple[int, float] | None) -> bool:
    return other is not None and abs(one[1] - other[1]) <= OFF * abs(one[1]) + ROUNDING


def _elsewhere() -> tuple[Any, ...]:
    """The state of the generators that are not torch's."""
    name, keys, position, *_ = np.random.get_state()
    return random.getstate(), name, bytes(keys), position  # type: ignore[arg-type]


def _line(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
