"""What this method adds to the results page: how the loss fell, what the layers see, and where they are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from torch import Tensor

from repro.run import TENSORS, run_folder
from repro_tools.report.judge import Judgement

from .data import CLASSES

matplotlib.use("Agg")

BLUE, RED = "#0072b2", "#d55e00"
TEXTS = {
    "loss": "Loss of each phase, a line for each seed.",
    "goodness": "Goodness over the width of a layer, for each image with its label (blue) and with the best of the wrong ones (red), "
    "first seed. The dashed line is the threshold.",
    "receptive-fields": "Weights of the first 64 units of the first layer, first seed: blue excites, red inhibits. The first ten pixels are the label.",
    "hardest": "The images with the smallest lead of their label over the others, first seed: true label, then the guess.",
    "confusion": "Wrong guesses by true label (row) and guess (column), first seed.",
}


def report_sections(judgements: Sequence[Judgement], records: Sequence[dict], runs: Path, reports: Path) -> str:
    """Markdown for the results page; the figures lie in `reports`/figures."""
    folder, lines = reports / "figures", []
    folder.mkdir(parents=True, exist_ok=True)
    for experiment in dict.fromkeys(record["experiment"] for record in records):
        own = [record for record in records if record["experiment"] == experiment]
        drawn = {"loss": loss_curves(own)}
        tensors = _tensors(own[0], runs)
        if tensors:
            drawn |= {
                "goodness": goodness_histograms(tensors["goodness"], own[0]["config"]["phases"]["layers"]["threshold"]),
                "receptive-fields": receptive_fields(tensors["receptive_fields"]),
                "hardest": hardest(tensors),
                "confusion": confusion(tensors["confusion"]),
            }
        lines.append(f"## {experiment}\n")
        for name, figure in drawn.items():
            path = folder / f"{experiment}-{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            plt.close(figure)
            lines.append(f"![{TEXTS[name]}]({folder.name}/{path.name})\n\n{TEXTS[name]}\n")
    return "\n".join(lines)


def loss_curves(records: Sequence[Mapping]) -> plt.Figure:
    """The loss of every phase against the step."""
    phases = list(records[0]["curves"])
    figure, row = plt.subplots(1, len(phases), figsize=(4 * len(phases), 3), layout="constrained", squeeze=False)
    for axes, phase in zip(row[0], phases, strict=True):
        for record in records:
            axes.plot(*zip(*record["curves"][phase]["loss"], strict=True), label=f"seed {record['seed']}", linewidth=1)
        axes.set(title=phase, xlabel="step", ylabel="loss", yscale="log")
    row[0][0].legend()
    return figure


def goodness_histograms(goodness: Tensor, threshold: float) -> plt.Figure:
    """(n, 2, layers): the goodness of the true label and of the best wrong one, in units of the width."""
    layers = goodness.shape[2]
    figure, row = plt.subplots(1, layers, figsize=(4 * layers, 3), layout="constrained", squeeze=False)
    for number, axes in enumerate(row[0]):
        of_layer = goodness[:, :, number]
        edges = torch.linspace(float(of_layer.min()), float(of_layer.max()) + 1e-6, 60).numpy()
        for side, colour, name in ((0, BLUE, "true label"), (1, RED, "best wrong label")):
            axes.hist(of_layer[:, side].numpy(), edges, color=colour, alpha=0.6, label=name)
        axes.axvline(threshold, color="0.3", linestyle="--", linewidth=1)
        axes.set(title=f"layer {number + 1}", xlabel="goodness / width", ylabel="images")
    row[0][0].legend()
    return figure


def receptive_fields(weights: Tensor) -> plt.Figure:
    """(units, s * s): a picture for each unit."""
    figure, axes = _tiles(len(weights), columns=16)
    for tile, field in zip(axes, weights, strict=False):
        reach = float(field.abs().max())
        tile.imshow(_square(field), cmap="RdBu", vmin=-reach, vmax=reach)
    return figure


def hardest(tensors: Mapping[str, Tensor]) -> plt.Figure:
    """Each image under its label and the guess."""
    figure, axes = _tiles(len(tensors["hardest.images"]), columns=10)
    columns = [tensors[f"hardest.{name}"] for name in ("images", "labels", "guesses")]
    for tile, image, label, guess in zip(axes, *columns, strict=False):
        tile.imshow(_square(image), cmap="gray_r")
        tile.set_title(f"{int(label)}, {int(guess)}", fontsize=8, color=BLUE if label == guess else RED)
    return figure


def confusion(counts: Tensor) -> plt.Figure:
    """(10, 10) counts, the true label by row; the diagonal is left out, for it would outshine the rest."""
    wrong = counts.clone().fill_diagonal_(0)
    figure, axes = plt.subplots(figsize=(4, 3.6), layout="constrained")
    figure.colorbar(axes.imshow(wrong, cmap="Reds"), label="images")
    axes.set(xlabel="guess", ylabel="true label", xticks=range(CLASSES), yticks=range(CLASSES))
    return figure


def _tiles(count: int, columns: int) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(0.7 * columns, 0.8 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, list(grid.flat)


def _square(pixels: Tensor) -> Tensor:
    side = round(len(pixels) ** 0.5)
    return pixels.view(side, side)


def _tensors(record: Mapping, runs: Path) -> dict[str, Tensor]:
    """What the evaluation of a run kept, or nothing when the run is not at hand."""
    path = run_folder(runs, record["experiment"], record["seed"]) / TENSORS
    return load_file(path) if path.exists() else {}
