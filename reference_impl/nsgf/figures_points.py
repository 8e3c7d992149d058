"""What NSGF adds to the results page: Table 1 under its four readings, and the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullFormatter
from torch import Tensor

from nsgf.evaluate_points import CURVE_STEPS
from nsgf.figures_common import COLOURS, load_tensors, running_median, save, show
from repro_tools.report.judge import Judgement

METHODS = {"nsgf": "NSGF", "fm": "FM", "ot_cfm": "OT-CFM"}
READINGS = {"w2": "W2", "w2_squared": "W2²", "half_w2_squared": "½ W2²", "sinkhorn_divergence": "Sinkhorn divergence"}
EXTENT = 7.5


def report_sections(judgements: Sequence[Judgement], records: Sequence[dict], runs: Path, reports: Path) -> str:
    """Markdown of the readings and the figures. Figures of sample points need the runs' tensors; without them the
    files that already lie in `reports`/figures are kept."""
    records = [record for record in records if record["experiment"].startswith("2d-")]
    if not records:
        return ""
    folder = reports / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    save(_distance_by_steps(records), folder / "w2-by-steps.png")
    save(_loss_curves(records), folder / "loss-curves.png")
    tensors = _tensors(records, runs)
    if tensors:
        save(_particle_paths(tensors), folder / "particle-paths.png")
        save(_samples(tensors), folder / "samples.png")
        save(_handover(tensors), folder / "hand-over.png")
    return "\n".join([_readings(judgements, records), _plus_plus(records), _gallery(folder)])


def _readings(judgements: Sequence[Judgement], records: Sequence[dict]) -> str:
    """Table 1's numbers beside each distance that "2-Wasserstein" could mean."""
    rows, ratios = [], {(method, reading): [] for method in METHODS for reading in READINGS}
    for judgement in judgements:
        method, _, rest = judgement.metric.partition(".")
        steps, _, metric = rest.partition(".")
        own = [record["metrics"] for record in records if record["experiment"] == judgement.experiment]
        if judgement.kind != "equal" or metric != "w2" or not own or f"{method}.{steps}.w2" not in own[0]:
            continue
        cells = []
        for reading in READINGS:
            values = [metrics[f"{method}.{steps}.{reading}"] for metrics in own]
            floors = [metrics[f"floor.{reading}"] for metrics in own]
            ratios[method, reading].append(math.log(mean(values) / judgement.reported))
            cells.append(f"{show(values)} ({mean(floors):.3g})")
        name = judgement.experiment.removeprefix("2d-")
        rows.append(f"| {name} | {METHODS[method]} | {steps} | {judgement.reported:.3g} | {' | '.join(cells)} |")
    if not rows:
        return ""
    header = " | ".join(READINGS.values())
    summary = [
        f"| {METHODS[method]} | "
        + " | ".join(f"{math.exp(mean(ratios[method, reading])):.2f}" for reading in READINGS)
        + " |"
        for method in METHODS
        if ratios[method, "w2"]
    ]
    return "\n".join(
        [
            "## Table 1 under four readings\n",
            "The paper names one distance and does not say whether it is squared or halved. Each cell is ours, mean ± standard "
            "deviation over the seeds, and in brackets the floor: the same distance between two independent samples of the target.\n",
            f"| set | method | steps | reported | {header} |",
            f"|---|---|---|---|{'---|' * len(READINGS)}",
            *rows,
            "\nOurs divided by the reported value, geometric mean over the rows of a method. A reading that fits gives 1 in every row.\n",
            f"| method | {header} |",
            f"|---|{'---|' * len(READINGS)}",
            *summary,
            "",
        ]
    )


def _plus_plus(records: Sequence[dict]) -> str:
    lines = [
        "## NSGF++ in two dimensions\n",
        "The paper reports no number for this; it shows the three phases at work. The floor of W2 is in brackets.\n",
        "| set | W2 | network evaluations | predicted hand-over time |",
        "|---|---|---|---|",
    ]
    for experiment, own in _by_experiment(records).items():
        w2 = [metrics["nsgf_plus_plus.w2"] for metrics in own]
        nfe = [metrics["nsgf_plus_plus.nfe"] for metrics in own]
        time, std = (
            mean(metrics[f"nsgf_plus_plus.handover_time.{kind}"] for metrics in own) for kind in ("mean", "std")
        )
        floor = mean(metrics["floor.w2"] for metrics in own)
        lines.append(
            f"| {experiment.removeprefix('2d-')} | {show(w2)} ({floor:.3g}) | {show(nfe)} | {time:.2f} ± {std:.2f} over the samples |"
        )
    return "\n".join(lines) + "\n"


def _gallery(folder: Path) -> str:
    pictures = {
        "samples.png": ("Samples against targets", "1,024 samples of each method (colour) on the test set (grey), first seed."),
        "particle-paths.png": ("Particle paths", "From source points (black) along the flow, blue to red, first seed."),
        "w2-by-steps.png": ("W2 against number of Euler steps", "Lines are means, bands the range over the seeds, grey the floor. "
                            "NSGF is drawn twice: each field at the steps of its own pool (squares), and the 100-step field at other numbers of steps."),
        "hand-over.png": ("NSGF++ hand-over times", "Predicted time at which each sample leaves the Sinkhorn flow, first seed."),
        "loss-curves.png": ("Loss curves", "Loss of each phase, running median over eleven logged steps, one line per seed."),
    }  # fmt: skip
    present = {name: text for name, text in pictures.items() if (folder / name).exists()}
    return "## Figures\n\n" + "\n".join(
        f"### {title}\n\n![{title}](figures/{name})\n\n{caption}\n" for name, (title, caption) in present.items()
    )


def _distance_by_steps(records: Sequence[dict]) -> plt.Figure:
    groups = _by_experiment(records)
    figure, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups), 3.4), squeeze=False, layout="constrained")
    for axis, (experiment, own) in zip(axes[0], groups.items(), strict=True):
        for method, label in {"fm": "FM", "ot_cfm": "OT-CFM", "nsgf_resampled": "NSGF, one field"}.items():
            steps = [k for k in CURVE_STEPS if f"{method}.{k}.w2" in own[0]]
            values = [[metrics[f"{method}.{k}.w2"] for metrics in own] for k in steps]
            axis.plot(steps, [mean(v) for v in values], "o-", ms=3, color=COLOURS[method], label=label)
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=COLOURS[method], alpha=0.2, lw=0
            )
        for key in sorted(key for key in own[0] if key.startswith("nsgf.") and key.endswith(".w2")):
            values = [metrics[key] for metrics in own]
            axis.plot(int(key.split(".")[1]), mean(values), "s", ms=6, color=COLOURS["nsgf"], label="NSGF, own field")
        axis.axhline(mean(metrics["floor.w2"] for metrics in own), color="0.5", ls="--", lw=1, label="floor")
        axis.set(title=experiment.removeprefix("2d-"), xlabel="Euler steps", xscale="log", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_locator(FixedLocator(CURVE_STEPS))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(FormatStrFormatter("%g"))
            ticks.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0][0].set_ylabel("W2 to the test set")
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5 if axes.size > 2 else 2, frameon=False
    )
    return figure


def _loss_curves(records: Sequence[dict]) -> plt.Figure:
    experiments = sorted({record["experiment"] for record in records})
    phases = list(records[0]["curves"])
    figure, axes = plt.subplots(1, len(phases), figsize=(3.4 * len(phases), 3.2), squeeze=False, layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for axis, phase in zip(axes[0], phases, strict=True):
        for record in records:
            steps, losses = zip(*record["curves"].get(phase, {"loss": [(1, math.nan)]})["loss"], strict=True)
            colour = colours[experiments.index(record["experiment"])]
            axis.plot(
                steps, running_median(losses), color=colour, lw=0.8, label=record["experiment"].removeprefix("2d-")
            )
        axis.set(title=phase, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0][0].set_ylabel("loss")
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5 if axes.size > 2 else 2, frameon=False
    )
    return figure


def _particle_paths(tensors: dict[str, dict[str, Tensor]]) -> plt.Figure:
    names = {
        "nsgf.10": "NSGF, 10 steps",
        "fm.10": "FM, 10 steps",
        "ot_cfm.10": "OT-CFM, 10 steps",
        "nsgf.100": "NSGF, 100 steps",
        "fm.100": "FM, 100 steps",
    }
    figure, panels = _grid(tensors, names, "path")
    for axis, name, run in panels:
        path = run[f"path.{name}"]
        steps, particles = len(path) - 1, path.shape[1]
        segments = torch.stack([path[:-1], path[1:]], dim=2).reshape(-1, 2, 2).numpy()  # (steps * particles, ends, xy)
        colours = plt.get_cmap("coolwarm")(np.repeat(np.linspace(0, 1, steps), particles))
        axis.add_collection(LineCollection(segments, colors=colours, linewidths=0.4))
        axis.plot(*path[0].T.numpy(), "k.", ms=2)
        axis.plot(*path[-1].T.numpy(), ".", color="#1a2b8f", ms=2)
    return figure


def _samples(tensors: dict[str, dict[str, Tensor]]) -> plt.Figure:
    names = {
        "nsgf.10": "NSGF, 10 steps",
        "nsgf.100": "NSGF, 100 steps",
        "fm.10": "FM, 10 steps",
        "ot_cfm.10": "OT-CFM, 10 steps",
        "nsgf_plus_plus": "NSGF++",
    }
    figure, panels = _grid(tensors, names, "samples")
    for axis, name, run in panels:
        axis.plot(*run["test"].T.numpy(), ".", color="0.75", ms=2)
        axis.plot(*run[f"samples.{name}"].T.numpy(), ".", color=COLOURS[name.split(".")[0]], ms=1.5)
    return figure


def _handover(tensors: dict[str, dict[str, Tensor]]) -> plt.Figure:
    figure, axes = plt.subplots(1, len(tensors), figsize=(3 * len(tensors), 2.6), squeeze=False, layout="constrained")
    for axis, (experiment, run) in zip(axes[0], tensors.items(), strict=True):
        axis.hist(run["handover.t"].numpy(), bins=[k / 40 for k in range(41)], color=COLOURS["nsgf_plus_plus"])
        axis.set(title=experiment.removeprefix("2d-"), xlabel="predicted time", xlim=(0, 1))
    axes[0][0].set_ylabel("samples")
    return figure


def _grid(tensors: dict, names: dict[str, str], kind: str) -> tuple[plt.Figure, list[tuple[plt.Axes, str, dict]]]:
    """A figure with a row per name and a column per experiment, and its panels: axes, name, the experiment's tensors."""
    rows = _drawn(tensors, names, kind)
    figure, axes = plt.subplots(
        len(rows), len(tensors), figsize=(2.6 * len(tensors), 2.6 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, name in enumerate(rows):
        axes[row][0].set_ylabel(names[name])
    for column, experiment in enumerate(tensors):
        axes[0][column].set_title(experiment.removeprefix("2d-"))
    for axis in axes.flat:
        axis.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xticks=[-6, 0, 6], yticks=[-6, 0, 6], aspect="equal")
        axis.tick_params(labelsize=7)
    return figure, [
        (axes[row][column], name, run) for row, name in enumerate(rows) for column, run in enumerate(tensors.values())
    ]


def _drawn(tensors: dict, names: dict[str, str], kind: str) -> list[str]:
    return [name for name in names if all(f"{kind}.{name}" in run for run in tensors.values())]


def _tensors(records: Sequence[dict], runs: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each experiment's first seed, or nothing unless every experiment has them."""
    first: dict[str, dict] = {}
    for record in records:
        first.setdefault(record["experiment"], record)
    found = {experiment: load_tensors(record, runs) for experiment, record in first.items()}
    return found if all(found.values()) else {}


def _by_experiment(records: Sequence[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["experiment"], []).append(record["metrics"])
    return groups
