"""Findings about what a network does with what it is given: gradients, units, inputs, steps. One function for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from repro_tools.diagnose.explanation import Evidence, Finding, Hypothesis, Place, some
from repro_tools.diagnose.instruments import Flatness
from repro_tools.diagnose.measured import FASTER, Fit, Measured
from repro_tools.diagnose.suspects_data import bad_gradients

# How far sound phases go, and so where a finding begins: benchmarks/results/diagnose.json.
INITIAL_OVER_CONSTANT = 10.0
INITIAL_OFF_THEORY = 1.5
DEAD_SHARE = 0.5
LOST_DECADES = 4.0
LEARNED_SHARE = 0.05
REACHED_CONSTANT = 1.25
FASTER_SHARE = 0.9
FEWEST_STEPS = 50
PARTLY = 0.9
BY_TIME_OVER_MEDIAN, BY_TIME_OVER_CONSTANT = 10.0, 3.0
UPDATE_BAND = (-6.0, 0.0)


def parameters(m: Measured, place: Place) -> Iterator[Finding]:
    if "does not require grad" in m.skipped.get("training", ""):
        yield _without_gradient("no parameter", "the loss depends on no trainable parameter", "exact", place)
    p = m.parameters
    if p is None:
        return
    if p.frozen:
        yield _without_gradient(some(p.frozen), "given to the optimiser with requires_grad False", "exact", place)
    if p.outside:
        yield _without_gradient(some(p.outside), "trainable, and not given to the optimiser", "exact", place)
    if p.none:
        yield _without_gradient(some(p.none), "trainable, and the loss sends no gradient there", "exact", place)


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


def dead(m: Measured, place: Place) -> Iterator[Finding]:
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


def spread(m: Measured, place: Place) -> Iterator[Finding]:
    pulls = {name: pull for name, pull in (m.parameters.pulls if m.parameters else {}).items() if 0 < pull < math.inf}
    if not pulls:
        return
    most = max(pulls, key=pulls.__getitem__)
    lost = sorted((name for name in pulls if pulls[name] * 10**LOST_DECADES < pulls[most]), key=pulls.__getitem__)
    if not lost:
        return
    least = lost[0]
    yield Finding(
        "gradient-spread",
        "the gradient vanishes or explodes on its way through the network",
        f"gradient x weight is {pulls[least]:.1g} at {least} and {pulls[most]:.1g} at {most}, a factor of {pulls[most] / pulls[least]:.0e}; "
        f"{len(lost)} of {len(pulls)} matrices are 10^{LOST_DECADES:g} times or more below the largest",
        Hypothesis("saturating activations or an initialisation that shrinks or grows from layer to layer, with no normalisation or skip", "it changes steadily with depth; gone with fewer layers", "measured"),
        Hypothesis("a later operation cancels what these layers add, such as a normalisation of single channels", "the output does not change with their weights", "measured"),
        Hypothesis("a gate that starts near 0 by design", "it opens with more steps; the paper says so", "folklore"),
        place.code(
            "optimiser = phase.make_optimiser(model)\nfor _ in range(10): optimiser.zero_grad(); phase.loss(model, batch).backward(); optimiser.step()\n"
            "for n, p in model.named_parameters():\n    if p.ndim > 1: print(n, (p.grad.norm() * p.norm()).item())"
        ),
    )  # fmt: skip


def inputs(m: Measured, place: Place) -> Iterator[Finding]:
    for column in m.arguments:
        if column.constant and m.batch_rows > 1 and math.prod(column.shape) > 0:
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


def affine(m: Measured, place: Place) -> Iterator[Finding]:
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


def rate(m: Measured, place: Place) -> Iterator[Finding]:
    fit, learning = m.fit, m.learning
    broken = m.bad_rows is not None or any(bad_gradients(m, place))
    if (
        fit is None
        or learning is None
        or m.initial is None
        or broken
        or (fit.steps < FEWEST_STEPS and learning.broke_at is None)
    ):
        return
    worse = learning.worse_than(m.initial, m.constant)
    slower = any(fit.fitted(factor) for factor in fit.losses if factor < 1)
    told = fit_in_words(fit)
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


def not_fitted(m: Measured, place: Place) -> Iterator[Finding]:
    fit = m.fit
    if (
        fit is None
        or fit.steps < FEWEST_STEPS
        or any(fit.fitted(factor) for factor in fit.losses)
        or any(rate(m, place))
    ):
        return
    yield Finding(
        "not-fitted",
        "a few rows cannot be fitted at any learning rate",
        fit_in_words(fit),
        Hypothesis("gradient, network or loss is broken: see the findings above", "gone once those are mended", "measured"),
        Hypothesis("the same input occurs with two targets", "repeated rows, or a network without time", "folklore"),
        Hypothesis("the network is too small for these rows, or the steps too few", "fits with ten times the steps", "folklore"),
        place.again(steps=10 * place.steps),
    )  # fmt: skip


def fit_in_words(fit: Fit) -> str:
    rates = (
        f"{loss:.3g}" + ("" if factor == 1 else f" at {factor:g} x the rate") for factor, loss in fit.losses.items()
    )
    return f"{fit.rows} fixed row{'s' * (fit.rows > 1)}, {fit.steps} steps: from {fit.begun:.3g} to " + ", ".join(rates)


def initial(m: Measured, place: Place) -> Iterator[Finding]:
    if m.initial is None:
        return
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


def relation(m: Measured, place: Place) -> Iterator[Finding]:
    gain = gain_of(m)
    if gain is None or gain >= LEARNED_SHARE or m.fit is None or not min(m.fit.losses.values()) < PARTLY * m.fit.begun:
        return
    assert m.learning is not None and m.constant is not None  # else there is no gain
    if m.learning.true > REACHED_CONSTANT * m.constant:
        return
    yield Finding(
        "no-relation",
        "inputs say nothing about targets",
        f"after {m.learning.steps} steps {m.learning.true:.4g} on other minibatches, {m.learning.shuffled:.4g} with pairs at random, "
        f"best constant {m.constant:.4g}; a few rows alone can be fitted, at least in part",
        Hypothesis("input and target were shuffled apart, or joined in another order", "a pair looked at does not belong together", "measured"),
        Hypothesis("the relation is weaker than the noise, or needs more steps", "it parts from the shuffled run with more steps", "folklore"),
        Hypothesis("there is none to learn: the targets are independent of the inputs by design", "the paper's loss says so", "folklore"),
        place.again(steps=4 * place.steps),
    )  # fmt: skip


def updates(m: Measured, place: Place) -> Iterator[Finding]:
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


def still(m: Measured, place: Place) -> Iterator[Finding]:
    if m.parameters and m.parameters.still:
        yield Finding(
            "still",
            "parameters have not moved at all",
            f"{some(m.parameters.still)}: to the last bit as before {m.learning.steps if m.learning else 0} steps",
            Hypothesis("their gradient is exactly 0: dead units or a saturated output before them", "the gradient is 0", "measured"),
            Hypothesis("a rate of 0 for their group", "the gradient is not 0", "folklore"),
            Hypothesis("steps lost to rounding: weights of low precision", "they move in float32", "folklore"),
            place.code("phase.loss(model, batch).backward(); print({n: p.grad.abs().max() for n, p in model.named_parameters()})"),
        )  # fmt: skip


def by_time(m: Measured, place: Place) -> Iterator[Finding]:
    seen = [(number, *pair) for number, pair in enumerate(m.times) if pair is not None]
    bins = [(number, loss, constant) for number, loss, constant in seen if constant is not None]
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


def gain_of(m: Measured) -> float | None:
    """How much lower training on true pairs ends than training on pairs at random, as a share of the best constant's loss."""
    if m.learning is None or m.learning.shuffled is None or not m.constant or m.constant <= 1e-3 * (m.zero or 0):
        return None
    return (m.learning.shuffled - m.learning.true) / m.constant
