"""Findings about what goes into a phase: its minibatch, its loss, the numbers that are not finite. One function for each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from repro_tools.diagnose.explanation import Finding, Hypothesis, Place, some
from repro_tools.diagnose.measured import Column, Measured

SCALE = 20.0
OFFSET = 20.0
EQUAL = 1e-3


def raised(m: Measured, place: Place) -> Finding:
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
    assert m.raised is not None  # else nothing would call this
    return Finding(
        "loss-raises",
        "the first minibatch or its loss raises an error",
        m.raised + (f"; the minibatch: {columns}" if columns else ""),
        Hypothesis("prediction and target have other shapes, or the network was made for another size of example", "the traceback ends in the network or the loss", "measured"),
        Hypothesis("a batch size that a loader shared with another phase has put in place of this one's", "the rows are not phases.<name>.batch_size", "measured"),
        Hypothesis("an override that does not fit the others", "the error is gone without --set", "folklore"),
        test,
    )  # fmt: skip


def not_finite(m: Measured, place: Place) -> Finding:
    bad, seen = m.bad_count
    ranges = "; ".join(f"{name} from {low:.4g} to {high:.4g}" for name, (low, high) in (m.bad_rows or {}).items())
    return Finding(
        "not-finite",
        "there are rows for which the loss of a fresh network is not finite",
        f"{bad} of {seen} rows of minibatches" + (f", those with {ranges}" if ranges else ""),
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


def bad_columns(m: Measured, place: Place) -> Iterator[Finding]:
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


def bad_gradients(m: Measured, place: Place) -> Iterator[Finding]:
    gradients = m.parameters.gradients if m.parameters else {}
    bad = [name for name, norm in gradients.items() if not math.isfinite(norm)]
    if not bad:
        return
    yield Finding(
        "gradient-not-finite",
        "the loss is finite and its gradient is not",
        f"{some(bad)}, at the first step",
        Hypothesis("a root, norm, division or logarithm at exactly 0: finite forward, infinite backward", "detect_anomaly names the line", "measured"),
        Hypothesis("torch.where around such a value: the branch not taken still sends its NaN back", "the line named is under a where", "cited"),
        Hypothesis("overflow of half precision, which the scaler is there to skip", "gone with precision float32", "folklore"),
        place.code("import torch\nwith torch.autograd.detect_anomaly(): phase.loss(model, batch).backward()"),
    )  # fmt: skip


def constant_columns(m: Measured, place: Place) -> Iterator[Finding]:
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


def tables(m: Measured, place: Place) -> Iterator[Finding]:
    rows = m.rows
    if rows is None:
        return
    apart = rows.ratio is not None and not near(rows.ratio, 1, rows.rows)
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


def summed(m: Measured, place: Place) -> Iterator[Finding]:
    rows = m.rows
    if rows is None or rows.ratio is None or rows.rows == 1 or not near(rows.ratio, rows.rows):
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


def scale(m: Measured, place: Place) -> Iterator[Finding]:
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
                    "raw values reach the network, such as bytes from 0 to 255", as_in_source(column), "measured"
                ),
                Hypothesis(
                    "normalised with numbers of another set, or twice", "mean and deviation are no round numbers", "folklore"
                ),
                Hypothesis("the method works in these units, and scales inside the network", "see make_model", "folklore"),
                place.code('print({k: (v.float().mean(), v.float().std()) for k, v in batch.items()})'),
            )  # fmt: skip


def as_in_source(column: Column) -> str:
    return f"the range, {column.least:.4g} to {column.most:.4g}, is that of the source"


def near(ratio: float, *values: float) -> bool:
    return any(abs(ratio / value - 1) < EQUAL for value in values)
