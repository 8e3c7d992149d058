"""What NSGF++ on images adds to the results page: per experiment a table, three checks in words, four figures.

The text follows from the records alone, so that the page can be written again without the runs. Pictures are drawn in
whole pixels: every pixel of an image is a square of the same size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from nsgf.figures_common import COLOURS, DPI, load_tensors, number, running_median, save, show
from repro.config import digest
from repro_tools.report.judge import SHORTENED, Judgement

SETS = {
    "digits": "scikit-learn's digits",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar10_jpeg": "CIFAR-10 (JPEG q75)",
}
METRICS = {
    "nfe": "NFE",
    "classifier_frechet": "Fréchet distance in the classifier's features",
    "confidence": "classifier's confidence",
    "fid": "FID",
    "inception_score": "IS",
}
PHASES = {
    "velocity_field": (COLOURS["nsgf"], "velocity field"),
    "straight_flow": (COLOURS["fm"], "straight flow"),
    "time_predictor": (COLOURS["nsgf_plus_plus"], "time predictor"),
    "feature_classifier": ("0.35", "feature classifier"),
}
WIDTH = 7.2  # inches of every figure here: at the width of the page, text has the size of the page's text
SMALL = 7.5
STYLE = {"font.size": 9, "axes.titlesize": 9, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": 8}
TITLE = {"x": 0, "ha": "left", "fontsize": 8, "color": "0.35"}
PARTICLES, PAIRS, PANEL = 10, 20, 8  # particles followed, pairs shown, images along a side of a panel


def report_sections(judgements: Sequence[Judgement], records: Sequence[dict], runs: Path, reports: Path) -> str:
    """Markdown of every experiment on images. Figures of pictures need the run's tensors; without them the files that
    already lie in `reports`/figures are kept."""
    groups = _by_configuration([record for record in records if not record["experiment"].startswith("2d-")])
    if not groups:
        return ""
    folder = reports / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, own in groups.items():
        save(_losses(own), folder / f"{stem}-losses.png", 2 * DPI)
        tensors = load_tensors(own[0], runs)
        if tensors:
            save(_samples(own[0], tensors), folder / f"{stem}-samples.png", "figure")
            save(_nearest(own[0], tensors), folder / f"{stem}-nearest.png", "figure")
            save(_handover(own[0], tensors), folder / f"{stem}-handover.png", 2 * DPI)
    return "\n".join([_introduction(), *(_section(stem, own, folder) for stem, own in groups.items())])


def _introduction() -> str:
    return (
        "## NSGF++ on images\n\n"
        "NFE is the number of network evaluations that a sample takes, as counted. The Fréchet distance is that between samples and "
        "the real images of one split, in the features of a small classifier that each run trains; it is not FID, and it compares "
        "the methods of one experiment only. The classifier's confidence is the probability that it gives to the likeliest class, on average. The floor is "
        "real images of the other split, as many as there are samples, or all of them where they are fewer. ± is the standard deviation over the seeds.\n"
    )


def _section(stem: str, own: Sequence[dict], folder: Path) -> str:
    parts = [
        f"### `{own[0]['experiment']}`: {_set(own[0])}\n",
        _protocol(own),
        _table(own),
        _classifier(own),
        _copies(own),
        _times(own),
        _gallery(stem, own, folder),
    ]
    return "\n".join(part for part in parts if part)


def _protocol(own: Sequence[dict]) -> str:
    protocol = own[0]["config"]["evaluation"]
    text = f"{_seeds(own)}. {protocol['samples']:,} samples of each method against the {protocol['reference']} split."
    if own[0]["departures"]:
        changes = "; ".join(f"`{change}`" for change in own[0]["departures"])
        text += f" **{SHORTENED.capitalize()}**: {changes}."
    return text + "\n"


def _table(own: Sequence[dict]) -> str:
    methods = _methods(own[0]["config"])
    shown = [metric for metric in METRICS if any(_values(own, f"{method}.{metric}") for method in methods)]
    rows = [
        f"| {label} | {' | '.join(_cell(own, f'{method}.{metric}') for metric in shown)} |"
        for method, label in methods.items()
        if any(_values(own, f"{method}.{metric}") for metric in shown)
    ]
    header = " | ".join(METRICS[metric] for metric in shown)
    return "\n".join([f"| method | {header} |", f"|---|{'---|' * len(shown)}", *rows, ""])


def _methods(config: Mapping) -> dict[str, str]:
    """The rows of the table: how the evaluation names a method, and how the page does."""
    protocol, steps = config["evaluation"], config["nsgf_plus_plus"]["sinkhorn_steps"]
    return {
        "nsgf_plus_plus": "NSGF++",
        **{f"fm.{k}": f"FM, {k} steps" for k in sorted(protocol["euler_steps"], reverse=True)},
        "nsgf": f"NSGF after its {steps} steps",
        **{f"handover_{100 * t:.0f}": f"NSGF++, every hand-over at {t:g}" for t in protocol["handover_times"]},
        "floor": f"floor: real images, {'train' if protocol['reference'] == 'test' else 'test'} split",
    }


def _cell(own: Sequence[dict], metric: str) -> str:
    values = _values(own, metric)
    if not values:
        return ""
    return show(values) + (f" ({len(values)} of {len(own)} seeds)" if len(values) < len(own) else "")


def _classifier(own: Sequence[dict]) -> str:
    reference = own[0]["config"]["evaluation"]["reference"]
    return (
        f"The classifier is right about {100 * mean(_values(own, 'classifier.accuracy')):.1f}% of the test images; its confidence "
        f"in the real images of the {reference} split is {show(_values(own, f'{reference}.confidence'))}.\n"
    )


def _copies(own: Sequence[dict]) -> str:
    """The distances to the nearest training image in words: copies would lie closer to it than unseen images do."""
    samples, test = (_values(own, f"{name}.nearest_train") for name in ("nsgf_plus_plus", "test"))
    ratio = mean(samples) / mean(test)
    meaning = (
        f"{number(100 * (ratio - 1), 2)}% farther from the training set than the median test image: as a whole the samples are no copies of it."
        if ratio >= 1
        else f"{number(100 * (1 - ratio), 2)}% closer to the training set than the median test image, as copies would, and as images with less detail would too."
    )
    closest = [_values(own, f"{name}.nearest_train_min") for name in ("nsgf_plus_plus", "test")]
    smallest = " The smallest distances are {:.3g} and {:.3g}.".format(*map(min, closest)) if all(closest) else ""
    mirrored = ", mirrored or not" if own[0]["config"]["data"]["flip"] else ""
    return (
        f"Nearest training image{mirrored}: the median Euclidean distance, with pixels from −1 to 1, is {show(samples)} for NSGF++ samples "
        f"and {show(test)} for test images. The median sample lies {meaning}{smallest}\n"
    )


def _times(own: Sequence[dict]) -> str:
    config = own[0]["config"]
    steps, eta = config["nsgf_plus_plus"]["sinkhorn_steps"], config["phases"]["velocity_field"]["flow"]["step_size"]
    time, spread, expected = (
        mean(_values(own, f"nsgf_plus_plus.handover_time.{kind}")) for kind in ("mean", "std", "expected")
    )
    return (
        f"Predicted hand-over time: {time:.3f} ± {spread:.3f} over the samples. If each of the {steps} steps covered {eta:g} of the way "
        f"that is left, it would be 1 − (1 − {eta:g})<sup>{steps}</sup> = {expected:.3f}.\n"
    )


def _gallery(stem: str, own: Sequence[dict], folder: Path) -> str:
    config, name = own[0]["config"], _set(own[0])
    protocol, steps = config["evaluation"], config["nsgf_plus_plus"]["sinkhorn_steps"]
    particles, panel = min(PARTICLES, protocol["pictures"]), _side(protocol["pictures"]) ** 2
    candidates = min(protocol["pictures"], protocol["nearest"])
    which = f" Pictures are of the lowest seed, {own[0]['seed']}." if len(own) > 1 else ""
    smoothed = any(_is_smoothed(losses) for _, _, losses in _curves(own))
    pictures = {
        "samples": (
            f"{name}: {particles} particles as noise, after {steps} Sinkhorn steps and as NSGF++ samples, FM samples from the same noise, "
            f"and three panels of {panel} NSGF++ samples, real images and FM samples",
            f"Above, the same {particles} particles in each row; the number is the time at which each is handed over. Below, the first {panel} "
            f"of each. Values beyond black and white are clipped.{which}",
        ),
        "nearest": (
            f"{name}: pairs of an NSGF++ sample and the training image nearest to it, and histograms of the distances of samples and of test images",
            f"Of the first {candidates} samples the {min(PAIRS, candidates)} that are closest to a training image, each with that image "
            f"{'as it is stored ' if config['data']['flip'] else ''}and the distance. Below, the distances of {protocol['nearest']:,} samples and as many test images.",
        ),
        "handover": (
            f"{name}: histogram of the predicted hand-over times, with their mean and the time that the theory gives",
            "Predicted time at which each sample leaves the Sinkhorn flow.",
        ),
        "losses": (
            f"{name}: training loss of the {len(own[0]['curves'])} phases against the step",
            "Loss of one minibatch at each logged step"
            + (", faint, and its running median over eleven of them" if smoothed else ", not smoothed")
            + (", one line per seed." if len(own) > 1 else "."),
        ),
    }
    return "\n".join(
        f"![{alt}](figures/{stem}-{kind}.png)\n\n{caption}\n"
        for kind, (alt, caption) in pictures.items()
        if (folder / f"{stem}-{kind}.png").exists()
    )


def _samples(record: Mapping, tensors: Mapping[str, Tensor]) -> plt.Figure:
    """Particles on their way in rows, then panels of samples beside real images."""
    evaluation, steps = record["config"]["evaluation"], record["config"]["nsgf_plus_plus"]["sinkhorn_steps"]
    kept = {name: tensors[f"pictures.{name}"] for name in ("noise", "nsgf", "nsgf_plus_plus", "fm", "real")}
    sheet = Sheet(record, size=kept["real"].shape[-1], panels=3, side=_side(len(kept["real"])))
    fm = f"FM, {max(evaluation['euler_steps'])} steps"
    rows = {
        "noise": "noise",
        "nsgf": f"after {steps}\nSinkhorn steps",
        "nsgf_plus_plus": "NSGF++",
        "fm": f"{fm},\nsame noise",
    }
    for name, label in rows.items():
        sheet.row(label, kept[name])
        if name == "nsgf":
            sheet.numbers("hand-over time", [f"{t:.2f}" for t in tensors["handover.t"].tolist()])
    sheet.skip(0.12)
    sheet.panels({"NSGF++": kept["nsgf_plus_plus"], f"real: {_set(record)}": kept["real"], fm: kept["fm"]})
    return sheet.figure()


def _nearest(record: Mapping, tensors: Mapping[str, Tensor]) -> plt.Figure:
    """Pairs of a sample and the training image nearest to it, the closest first, above all the distances."""
    samples, images = tensors["pictures.nsgf_plus_plus"], tensors["pictures.nearest"]
    distances = tensors["nearest.nsgf_plus_plus"]
    closest = distances[: len(images)].argsort(stable=True)[:PAIRS]
    sheet = Sheet(record, size=images.shape[-1], panels=3, side=_side(len(samples)))
    for band in closest.split(PARTICLES):
        sheet.row("NSGF++", samples[band])
        sheet.row("nearest\ntraining image", images[band])
        sheet.numbers("distance", [f"{value:.2f}" for value in distances[band].tolist()])
        sheet.skip(0.06)
    figure = sheet.figure(below=1.75)
    height = figure.get_figheight()
    left = sheet.left / sheet.width
    values = {"NSGF++ samples": distances, "test images": tensors["nearest.test"]}
    bins = np.linspace(0, max(float(v.max()) for v in values.values()) * 1.02, 61)
    with plt.rc_context(STYLE):
        axis = figure.add_axes((left, 0.4 / height, 0.998 - left, 1.2 / height))
        for (label, v), colour in zip(values.items(), (COLOURS["nsgf_plus_plus"], "0.35"), strict=True):
            axis.hist(v.numpy(), bins=bins, color=colour, alpha=0.35)
            axis.hist(v.numpy(), bins=bins, color=colour, histtype="step", lw=1.2)
            axis.axvline(
                float(v.median()), color=colour, lw=1.2, ls="--", label=f"{label}, median {float(v.median()):.3g}"
            )
        axis.set(xlabel="distance to the nearest training image", ylabel="images", xlim=(0, bins[-1]))
        axis.legend(frameon=False, loc="upper left")
    return figure


def _handover(record: Mapping, tensors: Mapping[str, Tensor]) -> plt.Figure:
    config, t = record["config"], tensors["handover.t"]
    steps, eta = config["nsgf_plus_plus"]["sinkhorn_steps"], config["phases"]["velocity_field"]["flow"]["step_size"]
    expected = record["metrics"]["nsgf_plus_plus.handover_time.expected"]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 2.2), layout="constrained")
        axis.hist(t.numpy(), bins=np.linspace(0, 1, 101), color=COLOURS["nsgf_plus_plus"])
        axis.axvline(float(t.mean()), color="k", lw=1.2, label=f"mean {float(t.mean()):.3f}")
        axis.axvline(
            expected, color=COLOURS["nsgf"], lw=1.2, ls="--", label=f"1 − (1 − {eta:g})$^{{{steps}}}$ = {expected:.3f}"
        )
        axis.set(xlabel="predicted time", ylabel="samples", xlim=(0, 1))
        figure.suptitle(_title(record), **TITLE)
        axis.legend(frameon=False, loc="upper left")
    return figure


def _losses(own: Sequence[dict]) -> plt.Figure:
    phases = list(own[0]["curves"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(-(-len(phases) // 2), 2, figsize=(WIDTH, 3.6), squeeze=False, layout="constrained")
        for axis, phase in zip(axes.flat, phases, strict=False):
            colour, title = PHASES[phase]
            for _, steps, losses in (curve for curve in _curves(own) if curve[0] == phase):
                smoothed = _is_smoothed(losses)
                axis.plot(steps, losses, color=colour, lw=0.6 if smoothed else 1, alpha=0.35 if smoothed else 1)
                if smoothed:
                    axis.plot(steps, running_median(losses), color=colour, lw=1)
            axis.set(title=title, yscale="log")
            low, high = axis.get_ylim()
            narrow = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else narrow)
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3, which="both", lw=0.4)
        for axis in axes[:, 0]:
            axis.set_ylabel("loss")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        figure.suptitle(_title(own[0], _seeds(own)), **TITLE)
    return figure


class Sheet:
    """A figure made of images in whole pixels, filled from the top: rows of particles with their labels, panels.

    Its resolution follows from the panels, so that three of them span the width of the page whatever an image's size is.
    """

    GAP, BETWEEN, PANEL_PIXELS = 4, 30, 540  # between images, between panels, of a panel's side at most
    LABELS = 1.1  # inches, at least, left of a row

    def __init__(self, record: Mapping, *, size: int, panels: int, side: int):
        self.side = side
        self.small = max(1, ((self.PANEL_PIXELS + self.GAP) // side - self.GAP) // size)
        panel = side * (size * self.small + self.GAP) - self.GAP
        self.width = panels * panel + (panels - 1) * self.BETWEEN
        self.dpi = round(self.width / WIDTH)
        room = (self.width - self.LABELS * self.dpi + self.GAP) / PARTICLES - self.GAP
        self.large = max(1, int(room) // size)
        self.tile = size * self.large
        self.left = self.width - PARTICLES * (self.tile + self.GAP) + self.GAP
        self.y = 0
        self.images: list[tuple[int, int, np.ndarray]] = []
        self.texts: list[tuple[float, float, str, dict]] = []
        self.skip(0.1)
        self.text(text=_title(record), va="center", **TITLE)
        self.skip(0.16)

    def skip(self, inches: float) -> None:
        self.y += round(inches * self.dpi)

    def text(self, x: float, text: str, **style) -> None:
        self.texts.append((x, self.y, text, style))

    def row(self, label: str, x: Tensor) -> None:
        """Up to ten images (n, c, s, s) side by side, the label left of them."""
        strip = _mosaic(x[:PARTICLES], PARTICLES, self.large, self.GAP)
        self.images.append((self.left, self.y, strip))
        self.texts.append((0, self.y + len(strip) / 2, label, {"va": "center"}))
        self.y += len(strip) + self.GAP

    def numbers(self, label: str, numbers: Sequence[str]) -> None:
        """A number under each image of the row above."""
        self.skip(0.06)
        self.text(0, label, va="center", fontsize=SMALL)
        for k, text in enumerate(numbers[:PARTICLES]):
            x = self.left + k * (self.tile + self.GAP) + self.tile / 2
            self.text(x, text, va="center", ha="center", fontsize=SMALL)
        self.skip(0.1)

    def panels(self, named: Mapping[str, Tensor]) -> None:
        """Squares of images side by side, the name above each."""
        self.skip(0.07)
        grids = [_mosaic(x[: self.side**2], self.side, self.small, self.GAP) for x in named.values()]
        for k, name in enumerate(named):
            self.text(k * (grids[0].shape[1] + self.BETWEEN), name, va="center")
        self.skip(0.11)
        for k, grid in enumerate(grids):
            self.images.append((k * (grid.shape[1] + self.BETWEEN), self.y, grid))
        self.y += len(grids[0])

    def figure(self, below: float = 0) -> plt.Figure:
        """The figure, with so many inches left empty below."""
        height = self.y + round(below * self.dpi)
        canvas = np.full((height, self.width, 3), 255, dtype=np.uint8)
        for x, y, image in self.images:
            canvas[y : y + len(image), x : x + image.shape[1]] = image
        with plt.rc_context(STYLE):
            # Half a pixel more, because the size in pixels is cut off, not rounded.
            figure = plt.figure(figsize=((self.width + 0.5) / self.dpi, (height + 0.5) / self.dpi), dpi=self.dpi)
            figure.figimage(canvas, origin="upper", zorder=-1)
            for x, y, text, style in self.texts:
                figure.text(x / self.width, 1 - y / height, text, **style)
        return figure


def _mosaic(x: Tensor, columns: int, factor: int, gap: int) -> np.ndarray:
    """Images (n, c, s, s) uint8 in rows of `columns`, each pixel a square of `factor` pixels, on white: (h, w, 3) uint8."""
    tiles = x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy().repeat(factor, 1).repeat(factor, 2)
    side = tiles.shape[1] + gap
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * side - gap, columns * side - gap, 3), 255, dtype=np.uint8)
    for k, tile in enumerate(tiles):
        top, left = k // columns * side, k % columns * side
        sheet[top : top + side - gap, left : left + side - gap] = tile
    return sheet


def _by_configuration(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Records that differ in nothing but the seed, lowest seed first, by the beginning of their figures' file names:
    that of the experiment, and for a second configuration of it also a hash."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in sorted(records, key=lambda record: (record["experiment"], record["seed"])):
        shaping = {key: value for key, value in record["config"].items() if key != "pace"}
        groups.setdefault((record["experiment"], digest(shaping)), []).append(record)
    stems: dict[str, list[dict]] = {}
    for (experiment, found), own in groups.items():
        stems[experiment if experiment not in stems else f"{experiment}-{found}"] = own
    return stems


def _values(own: Sequence[dict], metric: str) -> list[float]:
    return [record["metrics"][metric] for record in own if metric in record["metrics"]]


def _curves(own: Sequence[dict]) -> Iterator[tuple[str, list[int], list[float]]]:
    """Phase, steps and losses of each curve of each seed."""
    for record in own:
        for phase, curves in record["curves"].items():
            steps, losses = zip(*curves["loss"], strict=True)
            yield phase, list(steps), list(losses)


def _is_smoothed(losses: Sequence[float]) -> bool:
    """Whether there are so many points that single ones hide the curve."""
    return len(losses) > 50


def _side(pictures: int) -> int:
    return min(PANEL, isqrt(pictures))


def _set(record: Mapping) -> str:
    return SETS[record["config"]["data"]["set"]]


def _seeds(own: Sequence[dict]) -> str:
    *others, last = (str(record["seed"]) for record in own)
    return f"Seeds {', '.join(others)} and {last}" if others else f"Seed {last}"


def _title(record: Mapping, seeds: str | None = None) -> str:
    parts = [f"{record['experiment']}: {_set(record)}", (seeds or f"seed {record['seed']}").lower()]
    return ", ".join(parts + ["shortened or altered run"] * bool(record["departures"]))
