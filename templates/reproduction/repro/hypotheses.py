"""What the measurements of `repro.diagnostics` may mean: findings, each with three explanations and the cheapest test between them.

A finding says what was measured. Its explanations are opinions, each with where it comes from. The order of the findings is that
of cause: those that make the later ones meaningless come first.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from repro.diagnostics import FASTER, Column, Measured
from repro.instruments import Flatness

Evidence = Literal["exact", "measured", "cited", "folklore"]
"""exact: the test decides it on this machine. measured: `benchmarks/diagnose.py` planted it and it looked like this. cited: by
authors who measured or documented it. folklore: what practitioners say."""

# How far each measurement goes on sound phases, and so where a finding begins, is in benchmarks/results/diagnose.json.
SCALE = 20.0
OFFSET = 20.0
INITIAL_OVER_CONSTANT = 10.0
INITIAL_OFF_THEORY = 1.5
DEAD_SHARE = 0.5
LEARNED_SHARE = 0.05
FASTER_SHARE = 0.9
FEWEST_STEPS = 50
REACHED_CONSTANT = 1.25
BY_TIME_OVER_MEDIAN, BY_TIME_OVER_CONSTANT = 10.0, 3.0
UPDATE_BAND = (-6.0, 0.0)
EQUAL = 1e-3


@dataclass(frozen=True)
class Hypothesis:
    """An explanation, what the finding's test shows if it is the right one, and where it comes from."""

    says: str
    then: str
    evidence: Evidence


@dataclass(frozen=True)
class Finding:
    kind: str
    title: str
    measured: str
    likely: Hypothesis
    subtle: Hypothesis
    null: Hypothesis
    test: str


@dataclass(frozen=True)
class Place:
    """Where the measurements were made, for the commands of the tests."""

    experiment: str
    phase: str
    seed: int
    steps: int
    overrides: tuple[str, ...] = ()
    options: str = ""
    """Further options of the command, as they are typed."""

    def again(self, **changed: int | str) -> str:
        seed, steps = changed.get("seed", self.seed), changed.get("steps", self.steps)
        extra = f" {changed['extra']}" if "extra" in changed else ""
        sets = "".join(f" --set {shlex.quote(override)}" for override in self.overrides)
        where = f"{self.experiment} --phase {self.phase} --seed {seed} --steps {steps}"
        return f"repro diagnose {where}{sets}{self.options}{extra}"

    def code(self, line: str) -> str:
        changes = f", {list(self.overrides)}" if self.overrides else ""
        return f'phase, model, batch = open_phase("{self.experiment}", "{self.phase}", {self.seed}{changes})\n{line}'


def findings(m: Measured, place: Place) -> list[Finding]:
    """What is wrong by these measurements, the likeliest cause of the rest first."""
    if m.lengths_differ or m.raised is not None:
        return [_raised(m, place)]
    if m.initial is not None and not math.isfinite(m.initial):
        return [*_bad_columns(m, place), _not_finite(m, place)]
    return [
        *_bad_columns(m, place),
        *_constant_columns(m, place),
        *_tables(m, place),
        *_summed(m, place),
        *_scale(m, place),
        *_parameters(m, place),
        *_dead(m, place),
        *_inputs(m, place),
        *_affine(m, place),
        *_rate(m, place),
        *_initial(m, place),
        *_relation(m, place),
        *_updates(m, place),
        *_still(m, place),
        *_by_time(m, place),
    ]


def notes(m: Measured) -> list[str]:
    """What is worth knowing and no fault by itself."""
    lines = []
    if m.same_minibatch:
        lines.append(
            "steps 0 and 1 draw the same minibatch: training on the whole set, or a generator that is seeded in the loop"
        )
    for name in m.unused:
        lines.append(f"the loss does not depend on column {name} of the minibatch")
    if m.rows is not None:
        if m.rows.random:
            lines.append(
                "the loss draws random numbers of its own: `minibatch` should make every draw, or several processes share none"
            )
        elif m.rows.ratio is not None and not m.rows.tables and not _near(m.rows.ratio, 1, m.rows.rows):
            lines.append(
                f"the loss of {m.rows.rows} rows is {m.rows.ratio:.3g} times the mean of their losses: the rows are compared with each other"
            )
    if m.affine_layers == 2:
        lines.append("the network is affine: its two layers with weights do the work of one")
    if m.constant is not None and m.zero and 0 <= m.constant <= 1e-3 * m.zero:
        lines.append("a constant output fits the targets: whether the network uses its input cannot be asked here")
    gain = _gain(m)
    if gain is not None and gain < LEARNED_SHARE and m.learning.true > REACHED_CONSTANT * m.constant:
        lines.append(
            f"{m.learning.steps} steps are too few to tell whether the input is used: the loss has not come down to the best constant's; --steps {4 * m.learning.steps}"
        )
    if m.fit is not None and m.fit.steps < FEWEST_STEPS and not m.fit.fitted():
        lines.append(
            f"{m.fit.steps} steps are too few to tell whether a few rows can be fitted; --steps {FEWEST_STEPS} or more"
        )
    for what, why in m.skipped.items():
        if not (what == "training" and "does not require grad" in why):
            lines.append(f"not measured: {what}: {why}")
    for text in m.warnings:
        lines.append(f"PyTorch warned: {text[:160]}")
    return lines


def _near(ratio: float, *values: float) -> bool:
    return any(abs(ratio / value - 1) < EQUAL for value in values)


def _gain(m: Measured) -> float | None:
    """How much lower training on true pairs ends than training on pairs at random, as a share of the best constant's loss."""
    if m.learning is None or m.learning.shuffled is None or not m.constant or m.constant <= 1e-3 * (m.zero or 0):
        return None
    return (m.learning.shuffled - m.learning.true) / m.constant


# --- one function for each finding ---------------------------------------------------------------------------------


def _raised(m: Measured, place: Place) -> Finding:
    columns = ", ".join(f"{column.name} {column.shape}" for column in m.columns)
    test = place.code("print({name: column.shape for name, column in batch.items()}); phase.loss(model, batch)")
    if m.lengths_differ:
        return Finding(
            "column-lengths",
            "the columns of a minibatch have not the same number of rows",
            columns,
            Hypothesis("a loader, iterator or cache that was made for another phase's batch size", "one length is that of another phase", "measured"),
            Hypothesis("a last batch that is cut short, or a draw with a size of its own", "the lengths differ at some steps only", "folklore"),
            Hypothesis("a column that has no row per example, such as one time for all", "it has one row, or the paper says so", "folklore"),
            test,
        )  # fmt: skip
    return Finding(
        "loss-raises",
        "the first loss raises an error",
        f"{m.raised} | the minibatch: {columns}",
        Hypothesis("prediction and target have other shapes, or the network was made for another size of example", "the traceback ends in the network or the loss", "measured"),
        Hypothesis("a batch size that a loader shared with another phase has put in place of this one's", "the rows are not phases.<name>.batch_size", "measured"),
        Hypothesis("an override that does not fit the others", "the error is gone without --set", "folklore"),
        test,
    )  # fmt: skip


def _not_finite(m: Measured, place: Place) -> Finding:
    bad, seen = m.bad_count
    ranges = "; ".join(f"{name} from {low:.4g} to {high:.4g}" for name, (low, high) in (m.bad_rows or {}).items())
    return Finding(
        "not-finite",
        "the loss of a fresh network is not finite",
        f"{bad} of {seen} rows" + (f", those with {ranges}" if ranges else ""),
        Hypothesis(
            "a division, root or logarithm at one end of a range, such as 1 / (1 - t)",
            "the rows named above have one value in common",
            "measured",
        ),
        Hypothesis("the data hold the value already", "isfinite is False in a column before any network", "folklore"),
        Hypothesis(
            "overflow of half precision, which float32 does not have",
            "gone with precision float32",
            "folklore",
        ),
        place.code(
            "print({name: column.isfinite().all() for name, column in batch.items()}, phase.loss(model, batch))"
        ),
    )


def _bad_columns(m: Measured, place: Place) -> Iterator[Finding]:
    for column in m.columns:
        if not column.finite:
            yield Finding(
                "column-not-finite",
                f"column {column.name} of the minibatch holds NaN or infinity",
                f"{column.shape} {column.dtype}",
                Hypothesis("the source has missing values", "the count is the same in the source", "folklore"),
                Hypothesis("a scaling divides by a standard deviation of zero", "whole places are bad", "folklore"),
                Hypothesis(
                    "a value that marks padding and is masked later", "the loss is finite on such rows", "folklore"
                ),
                place.code(f'print((~batch["{column.name}"].isfinite()).sum(0))'),
            )


def _constant_columns(m: Measured, place: Place) -> Iterator[Finding]:
    for column in m.columns:
        if column.constant and m.batch_rows > 1:
            yield Finding(
                "constant-column",
                f"column {column.name} of the minibatch is the same in every row",
                f"{column.least:.4g} to {column.most:.4g} over all rows of several minibatches",
                Hypothesis(
                    "a bug where the column is made: one row repeated, a placeholder, labels of one class",
                    "the source has other values",
                    "measured",
                ),
                Hypothesis(
                    "a draw of its own generator that is seeded anew each time", "it changes with the seed", "folklore"
                ),
                Hypothesis("it is a constant of the method", "the paper says so", "folklore"),
                place.again(seed=place.seed + 1),
            )


def _tables(m: Measured, place: Place) -> Iterator[Finding]:
    rows = m.rows
    if rows is None:
        return
    apart = rows.ratio is not None and not _near(rows.ratio, 1, rows.rows)
    unpaired = rows.unpaired is not None and rows.unpaired < 1e-5
    if rows.tables and (apart or unpaired):
        yield Finding(
            "broadcast",
            "the loss compares every prediction with every target",
            f"{'; '.join(rows.tables)} on {rows.rows} rows; "
            + ("swapping predictions among the rows changes nothing" if unpaired else f"the loss is {rows.ratio:.3g} times the rows' mean"),
            Hypothesis("(n,) and (n, 1) are broadcast to (n, n)", "the shapes differ", "exact"),
            Hypothesis("a table of pairs is meant", "the paper's loss has a sum over pairs", "folklore"),
            Hypothesis("rounding", "the shapes agree", "exact"),
            place.code("print({name: column.shape for name, column in batch.items()})  # and the output's shape in loss"),
        )  # fmt: skip


def _summed(m: Measured, place: Place) -> Iterator[Finding]:
    rows = m.rows
    if rows is None or rows.ratio is None or rows.rows == 1 or not _near(rows.ratio, rows.rows):
        return
    yield Finding(
        "summed",
        "the loss is a sum over the rows, not their mean",
        f"{rows.rows} rows together have {rows.ratio:.4g} times the mean of their losses",
        Hypothesis('reduction="sum", or sum() for mean()', "the loss doubles with the rows", "exact"),
        Hypothesis(
            "the paper's loss is a sum: then its learning rate belongs to its batch size",
            "the paper's formula has no 1/n",
            "folklore",
        ),
        Hypothesis(
            "harmless under Adam, whose step does not scale with the loss; not under clipping or several processes",
            "updates as before with the mean",
            "folklore",
        ),
        place.code("two = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in batch.items()}; print(phase.loss(model, two) / phase.loss(model, batch))"),
    )  # fmt: skip


def _scale(m: Measured, place: Place) -> Iterator[Finding]:
    for column in m.arguments:
        if len(column.shape) < 2 or not column.dtype.startswith(("float", "bfloat")) or not column.finite:
            continue
        size = math.hypot(column.mean, column.std)
        shifted = column.std > 0 and abs(column.mean) > OFFSET * column.std
        if size > SCALE or shifted:
            yield Finding(
                "input-scale",
                f"argument {column.name} of the network is not normalised",
                f"mean {column.mean:.4g}, standard deviation {column.std:.4g}, from {column.least:.4g} to {column.most:.4g}",
                Hypothesis(
                    "raw values reach the network, such as bytes from 0 to 255", _bytes(column), "measured"
                ),
                Hypothesis(
                    "normalised with numbers of another set, or twice", "mean and deviation are no round numbers", "folklore"
                ),
                Hypothesis("the method works in these units, and scales inside the network", "see make_model", "folklore"),
                place.code('print({k: (v.float().mean(), v.float().std()) for k, v in batch.items()})'),
            )  # fmt: skip


def _bytes(column: Column) -> str:
    return f"the range, {column.least:.4g} to {column.most:.4g}, is that of the source"


def _parameters(m: Measured, place: Place) -> Iterator[Finding]:
    if "does not require grad" in m.skipped.get("training", ""):
        yield _without_gradient("no parameter", "the loss depends on no trainable parameter", "exact", place)
    p = m.parameters
    if p is None:
        return
    if p.frozen:
        yield _without_gradient(_some(p.frozen), "given to the optimiser with requires_grad False", "exact", place)
    if p.outside:
        yield _without_gradient(_some(p.outside), "trainable, and not given to the optimiser", "exact", place)
    if p.none:
        yield _without_gradient(_some(p.none), "trainable, and the loss sends no gradient there", "exact", place)


def _without_gradient(which: str, how: str, evidence: Evidence, place: Place) -> Finding:
    return Finding(
        "frozen",
        "part of the network is not trained",
        f"{which}: {how}",
        Hypothesis(
            "detach(), no_grad, .data or requires_grad_(False) where it is not meant", "it has no gradient", evidence
        ),
        Hypothesis("a layer that forward never calls: an old branch, a list that is cut", "forward runs without it", "folklore"),
        Hypothesis(
            "frozen on purpose; then give make_optimiser only what is trained", "the paper says so", "folklore"
        ),
        place.code("phase.loss(model, batch).backward(); print([n for n, p in model.named_parameters() if p.grad is None])"),
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _dead(m: Measured, place: Place) -> Iterator[Finding]:
    worst = [flat for flat in m.flat if _mostly_dead(flat)]
    if not worst:
        return
    after = [flat for flat in m.flat_after if _mostly_dead(flat)]
    what = "; ".join(
        f"{flat.operation} in {flat.place or 'the network'}: {flat.dead} of {flat.units}" for flat in worst[:3]
    )
    yield Finding(
        "dead-units",
        "units pass on no gradient, whatever the input",
        f"{what} before the first step"
        + (f"; {len(after)} such layers after training" if m.learning else ""),
        Hypothesis("biases or weights are initialised far off", "their means are far from 0", "measured"),
        Hypothesis("inputs that are all of one sign or far too large", "gone with normalised inputs", "cited"),
        Hypothesis("a few examples only; others wake the units", "fewer are dead in a larger minibatch", "folklore"),
        place.code("print({n: (p.mean().item(), p.std().item()) for n, p in model.named_parameters()})"),
    )  # fmt: skip


def _mostly_dead(flat: Flatness) -> bool:
    return flat.dead == flat.units or (flat.units >= 8 and flat.dead >= DEAD_SHARE * flat.units)


def _inputs(m: Measured, place: Place) -> Iterator[Finding]:
    for column in m.arguments:
        if column.constant and m.batch_rows > 1 and math.prod(column.shape):
            yield _unused(column.name, "it is the same in every row of every minibatch", place)
    for name in m.ignored:
        yield _unused(name, "giving a row the value of another row changes no output", place)


def _unused(name: str, how: str, place: Place) -> Finding:
    return Finding(
        "input-ignored",
        f"the network makes no use of its argument {name}",
        how,
        Hypothesis("it is not passed on, or overwritten, or a constant stands in its place", "see the call in loss, and forward", "exact"),
        Hypothesis("its weights are zero at the start and get no gradient", "their gradient is 0", "folklore"),
        Hypothesis("it is meant to be so: an interface kept for another network", "the paper's network lacks it", "folklore"),
        place.code("import inspect; print(inspect.getsource(type(model).forward), inspect.getsource(type(phase).loss))"),
    )  # fmt: skip


def _affine(m: Measured, place: Place) -> Iterator[Finding]:
    if m.affine_layers is None or m.affine_layers < 3:
        return
    yield Finding(
        "affine",
        "the network is an affine map of its input",
        f"{m.affine_layers} layers with weights; the output at the middle of two inputs is the middle of their outputs",
        Hypothesis("the activations are missing, or are made and not applied", "print(model) shows none", "exact"),
        Hypothesis("activations that never bend on these inputs (ReLU far above 0)", "the list shows them", "folklore"),
        Hypothesis("a linear network is meant, as in theory papers", "the paper says so", "folklore"),
        place.code("print(model)"),
    )


def _rate(m: Measured, place: Place) -> Iterator[Finding]:
    fit, learning = m.fit, m.learning
    if fit is None or learning is None:
        return
    worse = learning.worse_than(m.initial, m.constant)
    slower = any(fit.fitted(factor) for factor in fit.losses if factor < 1)
    told = f"{fit.rows} fixed rows, {fit.steps} steps: from {fit.begun:.3g} to " + ", ".join(
        f"{loss:.3g}" + ("" if factor == 1 else f" at {factor:g} x the rate") for factor, loss in fit.losses.items()
    )
    if worse:
        told = f"training ends at {learning.true:.3g} from {m.initial:.3g}; " + told
        if learning.broke_at is not None:
            told = f"the loss of step {learning.broke_at} is not finite; " + told
    if worse or (slower and not fit.fitted()):
        yield Finding(
            "rate-too-large",
            "the learning rate is too large",
            told,
            Hypothesis("a digit was lost, or the rate is that of another optimiser", "a tenth or a hundredth of it fits", "measured"),
            Hypothesis("loss or inputs are larger than the paper's (sums, units)", "the loss at the start is large", "folklore"),
            Hypothesis("the rate needs its warm-up, which is left out here", "the full run does not diverge", "folklore"),
            place.again(extra="--set 'KEY OF THE RATE=A HUNDREDTH OF IT'"),
        )  # fmt: skip
    elif learning.faster is not None and learning.faster < FASTER_SHARE * learning.true:
        yield Finding(
            "rate-too-small",
            "the learning rate is too small",
            f"{learning.steps} steps end at {learning.true:.3g}, and at {learning.faster:.3g} with {FASTER:g} times the rate; {told}",
            Hypothesis("a digit too many, or the rate of another optimiser", "ten or a hundred times it trains better and is stable", "measured"),
            Hypothesis("gradients are small and the optimiser is not Adam: scale of the loss", "the same rate trains with Adam", "folklore"),
            Hypothesis("only slow: the phase has many more steps than were tried", "as good with a hundred times the steps", "folklore"),
            place.again(extra="--set 'KEY OF THE RATE=A HUNDRED TIMES IT'"),
        )  # fmt: skip
    elif fit.steps >= FEWEST_STEPS and not any(fit.fitted(factor) for factor in fit.losses):
        yield Finding(
            "not-fitted",
            "a few rows cannot be fitted at any learning rate",
            told,
            Hypothesis("gradient, network or loss is broken: see the findings above", "gone once those are mended", "measured"),
            Hypothesis("the same input occurs with two targets", "repeated rows, or a network without time", "folklore"),
            Hypothesis("the network is too small for these rows, or the steps too few", "fits with ten times the steps", "folklore"),
            place.again(steps=10 * place.steps),
        )  # fmt: skip


def _initial(m: Measured, place: Place) -> Iterator[Finding]:
    if m.expected:
        ratio = m.initial / m.expected
        if 1 / INITIAL_OFF_THEORY < ratio < INITIAL_OFF_THEORY:
            return
        told = f"{m.initial:.4g}, where the phase expects {m.expected:.4g}"
    else:
        known = [value for value in (m.zero, m.constant) if value is not None]
        if not known or max(known) <= 0 or m.initial <= INITIAL_OVER_CONSTANT * max(known):
            return
        told = f"{m.initial:.4g}, where an output of 0 has {m.zero:.4g} and the best constant {m.constant:.4g}"
    yield Finding(
        "initial-loss",
        "the loss before the first step is not that of an ignorant network",
        told,
        Hypothesis("outputs too large: inputs not normalised, or the last layer's initialisation", "smaller with a last layer of 0", "cited"),
        Hypothesis("the loss sums over places, or has a weight", "smaller by a round factor", "folklore"),
        Hypothesis("the initialisation of this seed", "gone with another seed", "folklore"),
        place.again(seed=place.seed + 1),
    )  # fmt: skip


def _relation(m: Measured, place: Place) -> Iterator[Finding]:
    gain = _gain(m)
    if gain is None or gain >= LEARNED_SHARE or m.fit is None or not m.fit.fitted():
        return
    if m.learning.true > REACHED_CONSTANT * m.constant:
        return
    yield Finding(
        "no-relation",
        "inputs say nothing about targets",
        f"after {m.learning.steps} steps {m.learning.true:.4g} on other minibatches, {m.learning.shuffled:.4g} with pairs at random, "
        f"best constant {m.constant:.4g}; a few rows alone can be fitted",
        Hypothesis("input and target were shuffled apart, or joined in another order", "a pair looked at does not belong together", "measured"),
        Hypothesis("the relation is weaker than the noise, or needs more steps", "it parts from the shuffled run with more steps", "folklore"),
        Hypothesis("there is none to learn: the targets are independent of the inputs by design", "the paper's loss says so", "folklore"),
        place.again(steps=4 * place.steps),
    )  # fmt: skip


def _updates(m: Measured, place: Place) -> Iterator[Finding]:
    updates = m.parameters.updates if m.parameters else {}
    off = {name: v for name, v in updates.items() if not UPDATE_BAND[0] <= v <= UPDATE_BAND[1]}
    if not off:
        return
    yield Finding(
        "update-size",
        "a step changes weights by far too much or too little",
        "log10 of step over weights: " + ", ".join(f"{v:.1f} {name}" for name, v in list(off.items())[:4]),
        Hypothesis("the learning rate", "see the fit at other rates", "measured"),
        Hypothesis("weights that begin near 0, where the ratio means nothing", "their size is tiny", "folklore"),
        Hypothesis("the usual figure, about -3, is folklore of SGD on deep networks", "training is fine", "folklore"),
        place.again(steps=4 * place.steps),
    )


def _still(m: Measured, place: Place) -> Iterator[Finding]:
    if m.parameters and m.parameters.still:
        yield Finding(
            "still",
            "parameters have not moved at all",
            f"{_some(m.parameters.still)}: to the last bit as before {m.learning.steps if m.learning else 0} steps",
            Hypothesis("their gradient is exactly 0: dead units or a saturated output before them", "the gradient is 0", "measured"),
            Hypothesis("a rate of 0 for their group", "the gradient is not 0", "folklore"),
            Hypothesis("steps lost to rounding: weights of low precision", "they move in float32", "folklore"),
            place.code("phase.loss(model, batch).backward(); print({n: p.grad.abs().max() for n, p in model.named_parameters()})"),
        )  # fmt: skip


def _by_time(m: Measured, place: Place) -> Iterator[Finding]:
    bins = [(number, *pair) for number, pair in enumerate(m.times) if pair is not None and pair[1] is not None]
    if len(bins) < 3:
        return
    middle = median(loss for _, loss, _ in bins)
    for number, loss, constant in bins:
        if not loss <= BY_TIME_OVER_MEDIAN * middle and not loss <= BY_TIME_OVER_CONSTANT * constant:
            yield Finding(
                "one-time",
                f"the loss is made at times {number / 10:.1f} to {(number + 1) / 10:.1f}",
                f"{loss:.3g} there, {middle:.3g} in the middle one of ten bins; a constant would have {constant:.3g} there",
                Hypothesis("schedule, weight or sign is wrong at that end", "targets of those rows are out of range", "folklore"),
                Hypothesis("a weight such as 1 / (1 - t)^2 that the paper has too", "the paper's formula", "folklore"),
                Hypothesis("too few steps for the hardest times", "less so with more steps", "folklore"),
                place.again(steps=4 * place.steps),
            )  # fmt: skip
