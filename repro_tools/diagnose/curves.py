"""The loss curves of a run that is there, finished or not: do they plateau, diverge, oscillate, or still fall?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

from repro_tools.diagnose.explanation import Finding, Hypothesis, Place

Curve = list[tuple[int, float]]

# Sound runs reach less: at most 2.1 (end over least), 4.8 (highest over median, last quarter) and 1.6 (third quarter over last) over
# the 99 curves of the reference implementation's records. tests/nsgf/test_diagnose_nsgf.py holds these limits to them.
ENDS_ABOVE_LEAST = 4.0
PEAK_OVER_MEDIAN = 10.0
STILL_FALLS, FALLS_MUCH = 1.1, 2.0
AT_CONSTANT = 0.05
FEWEST = 8


def curves_of(folder: Path) -> dict[str, Curve]:
    """The loss curves of the run in `folder`, by phase: those of its record, else what the phases have logged so far."""
    try:
        curves = json.loads((folder / "record.json").read_text(encoding="utf-8"))["curves"]
        losses = {name: curve["loss"] if isinstance(curve, dict) else curve for name, curve in curves.items()}
        return {name: [(int(step), float(loss)) for step, loss in curve] for name, curve in losses.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    found = {}
    for log in sorted(folder.glob("*/log.jsonl")):
        curve: Curve = []
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                point = json.loads(line)
                curve.append((int(point["step"]), float(point["loss"])))
            except (ValueError, KeyError, TypeError):
                break  # a kill may have cut the last line short
        found[log.parent.name.partition("-")[2]] = curve
    return found


def shape(curve: Curve) -> Mapping[str, float] | None:
    """Ratios that say what a curve does at its end; None for one of too few points, or a loss that is not above zero."""
    losses = [loss for _, loss in curve]
    count = len(losses)
    if count < FEWEST or min(losses) <= 0:
        return None
    width = max(2, count // 10)
    least = min(median(losses[start : start + width]) for start in range(count - width + 1))
    third, last = losses[count // 2 : 3 * count // 4], losses[3 * count // 4 :]
    return {
        "end": median(losses[-width:]),
        "end_over_least": median(losses[-width:]) / least,
        "peak_over_median": max(last) / median(last),
        "third_over_last": median(third) / median(last),
        "last": median(last),
    }


def curve_findings(
    curve: Curve, where: str, constant: float | None, zero: float | None, place: Place
) -> Iterator[Finding]:
    """`constant` and `zero` are the losses of the best constant output and of 0, where they are known."""
    now = shape(curve)
    if now is None:
        return
    start = f"{where}: {len(curve)} points to step {curve[-1][0]}; "
    if now["end_over_least"] > ENDS_ABOVE_LEAST:
        yield Finding(
            "curve-rises",
            "the loss ends far above where it has been",
            f"{start}ends at {now['end']:.3g}, {now['end_over_least']:.1f} times its least",
            Hypothesis("the learning rate is too large for this stage of training", "a third of the rate holds it down", "folklore"),
            Hypothesis("one bad minibatch, after which Adam's second moment is far off", "the rise is at one step", "folklore"),
            Hypothesis("the data change on purpose from step to step (rounds, a curriculum)", "the rise is where they change", "folklore"),
            place.again(),
        )  # fmt: skip
    elif now["peak_over_median"] > PEAK_OVER_MEDIAN:
        yield Finding(
            "curve-spikes",
            "the loss leaps near the end",
            f"{start}highest {now['peak_over_median']:.0f} times the median of the last quarter",
            Hypothesis("no clipping where single rows have huge gradients", "gone with clipping", "folklore"),
            Hypothesis("a few bad rows in the data", "the same rows each time", "folklore"),
            Hypothesis("small minibatches of a loss with heavy tails", "less with larger minibatches", "folklore"),
            place.again(),
        )
    if constant and constant > 1e-3 * (zero or 0) and abs(now["last"] / constant - 1) < AT_CONSTANT:
        yield Finding(
            "plateau",
            "the loss has stopped at that of the best constant",
            f"{start}{now['last']:.4g} over the last quarter; best constant {constant:.4g}",
            Hypothesis("the network's output does not depend on its input as the target does: see the findings above", "training here ends there too", "measured"),
            Hypothesis("a dead or saturated network, after a good start", "the curve was lower once", "folklore"),
            Hypothesis("nothing more can be learned: the noise of the target is as large", "the paper's own loss is as high", "folklore"),
            place.again(steps=4 * place.steps),
        )  # fmt: skip
    elif now["third_over_last"] > FALLS_MUCH:
        yield Finding(
            "still-falls",
            "the loss still falls fast at the end",
            f"{start}the third quarter has {now['third_over_last']:.1f} times the loss of the last",
            Hypothesis("the run was shortened, or has not ended", "the record lists what was shortened", "exact"),
            Hypothesis(
                "the paper counts epochs, or another batch size", "steps x batch size of both differ", "folklore"
            ),
            Hypothesis("the rate is low", "see the fit at other rates", "folklore"),
            place.again(),
        )


def in_words(curve: Curve) -> str:
    """What a curve does, in one line."""
    now = shape(curve)
    if now is None:
        return f"{len(curve)} points: too few to judge, or a loss that is not above zero"
    falls = "; still falling slowly" if now["third_over_last"] > STILL_FALLS else ""
    return (
        f"{len(curve)} points to step {curve[-1][0]}, ends at {now['end']:.3g}: "
        f"{now['end_over_least']:.2f} x its least, peaks {now['peak_over_median']:.1f} x the median{falls}"
    )
