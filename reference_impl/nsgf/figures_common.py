"""What the figures of both kinds of experiments share: colours, the tensors of a run, numbers in text, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import matplotlib.pyplot as plt
from safetensors.torch import load_file
from torch import Tensor

from repro.run import RECORD, TENSORS, run_folder

matplotlib.use("Agg")

DPI = 110
COLOURS = {
    "nsgf": "#0072b2",
    "nsgf_resampled": "#56b4e9",
    "fm": "#d55e00",
    "ot_cfm": "#009e73",
    "nsgf_plus_plus": "#cc79a7",
}


def load_tensors(record: Mapping, runs: Path) -> dict[str, Tensor]:
    """The tensors of the run that a record is of, or nothing when that run is not at hand."""
    folder = run_folder(runs, record["experiment"], record["seed"])
    # A folder without a record holds a run that was not finished: its tensors are not those of `record`.
    if not ((folder / RECORD).exists() and (folder / TENSORS).exists()):
        return {}
    return load_file(folder / TENSORS)


def running_median(values: Sequence[float], width: int = 11) -> list[float]:
    """As many medians as values; near the ends those of fewer values."""
    half = width // 2
    windows = (sorted(values[max(0, k - half) : k + half + 1]) for k in range(len(values)))
    return [window[len(window) // 2] for window in windows]


def show(values: Sequence[float]) -> str:
    """Mean ± standard deviation. One value has none, and values that are all the same need none."""
    return number(mean(values), 3) + (f" ± {number(stdev(values), 1)}" if len(set(values)) > 1 else "")


def number(value: float, digits: int) -> str:
    """`value` at so many significant digits, from 0.0001 to 999,999 without an exponent."""
    return f"{float(f'{value:.{digits}g}'):g}"


def save(figure: plt.Figure, path: Path, dpi: float = DPI) -> None:
    """Writes a PNG whose bytes depend on nothing but the figure, and closes the figure."""
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)
