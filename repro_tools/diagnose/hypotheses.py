"""What the measurements of `repro_tools.diagnose.diagnostics` may mean: findings, each with three explanations and the cheapest test between them.

A finding says what was measured. Its explanations are opinions, each with where it comes from. The order of the findings is that
of cause: those that make the later ones meaningless come first.
"""

from __future__ import annotations

import math

from repro_tools.diagnose import suspects_data as data
from repro_tools.diagnose import suspects_training as training
from repro_tools.diagnose.explanation import Finding, Place
from repro_tools.diagnose.measured import Measured


def findings(m: Measured, place: Place) -> list[Finding]:
    """What is wrong by these measurements, the likeliest cause of the rest first."""
    if m.lengths_differ or m.raised is not None:
        return [data.raised(m, place)]
    if m.initial is not None and not math.isfinite(m.initial):
        return [*data.bad_columns(m, place), data.not_finite(m, place)]
    return [
        *data.bad_columns(m, place),
        *([data.not_finite(m, place)] if m.bad_rows is not None else []),
        *data.bad_gradients(m, place),
        *data.constant_columns(m, place),
        *data.tables(m, place),
        *data.summed(m, place),
        *data.scale(m, place),
        *training.parameters(m, place),
        *training.dead(m, place),
        *training.spread(m, place),
        *training.inputs(m, place),
        *training.affine(m, place),
        *training.rate(m, place),
        *training.initial(m, place),
        *training.relation(m, place),
        *training.not_fitted(m, place),
        *training.updates(m, place),
        *training.still(m, place),
        *training.by_time(m, place),
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
        elif m.rows.ratio is not None and not m.rows.tables and not data.near(m.rows.ratio, 1, m.rows.rows):
            lines.append(
                f"the loss of {m.rows.rows} rows is {m.rows.ratio:.3g} times the mean of their losses: the rows are compared with each other"
            )
    if m.affine_layers == 2:
        lines.append("the network is affine: its two layers with weights do the work of one")
    if m.constant is not None and m.zero and 0 <= m.constant <= 1e-3 * m.zero:
        lines.append("a constant output fits the targets: whether the network uses its input cannot be asked here")
    gain = training.gain_of(m)
    if gain is not None and gain < training.LEARNED_SHARE:
        assert m.learning is not None and m.constant is not None  # else there is no gain
        if m.learning.true > training.REACHED_CONSTANT * m.constant:
            lines.append(
                f"{m.learning.steps} steps are too few to tell whether the input is used: the loss has not come down to the best constant's; --steps {4 * m.learning.steps}"
            )
    if m.fit is not None and m.fit.steps < training.FEWEST_STEPS and not m.fit.fitted():
        lines.append(
            f"{m.fit.steps} steps are too few to tell whether a few rows can be fitted; --steps {training.FEWEST_STEPS} or more"
        )
    for what, why in m.skipped.items():
        if not (what == "training" and "does not require grad" in why):
            lines.append(f"not measured: {what}: {why}")
    for text in m.warnings:
        lines.append(f"PyTorch warned: {text[:160]}")
    return lines
