"""What `repro memory --json` says over a grid of batch sizes and precisions, for the page refs/calculator.md, which only looks it up.

    python -m benchmarks.calculator                         every experiment (make calculator)
    python -m benchmarks.calculator --experiments digits    these anew, the others as committed

Every number is the command's own: a setting is one call of it. The file is a script that sets a variable, because a browser refuses to fetch
a file beside a page that was opened from disk.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from repro.config import load
from repro.errors import BadInput
from repro.method import Project, find_project
from repro.runtime import progress
from repro_tools import cli
from repro_tools.memory.devices import DEVICES

ROOT = Path(__file__).parents[1]
DATA = ROOT / "theme" / "assets" / "javascripts" / "calculator-data.js"
BEFORE = "const CALCULATOR = "

AS_CONFIGURED = "as configured"
PRECISIONS = ("bf16", "fp16")
BATCH_SIZES = (16, 32, 64, 128, 256, 512)
"""A call takes 4 to 20 s of one core, so the grid is coarse. float32 needs the memory of tf32, for which mnist and cifar10 are configured."""

DIGITS = 8
"""Digits of an hour that are kept: the page shows two."""


def main(arguments: Sequence[str] | None = None) -> None:
    project = find_project(ROOT)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calculator", description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", nargs="+", default=list(project.experiments()), metavar="NAME")
    options = parser.parse_args(arguments)
    for name in options.experiments:
        made = of_experiment(project, name)
        found = (read(DATA)["experiments"] if DATA.exists() else {}) | {name: made}
        write(DATA, page_data({one: found[one] for one in project.experiments() if one in found}))
    print(DATA)


def page_data(experiments: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page looks up: devices, experiments, and what it was made with."""
    return {
        "made": f"torch {torch.__version__}, {datetime.date.today().isoformat()}",
        "devices": {one.name: {"usable_bytes": one.room_bytes, "source": one.source} for one in DEVICES},
        "experiments": experiments,
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8").removeprefix(BEFORE).rstrip().removesuffix(";"))


def write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(f"{BEFORE}{json.dumps(data, separators=(',', ':'))};\n", encoding="utf-8")


def of_experiment(project: Project, name: str) -> dict[str, Any]:
    """Every setting of an experiment by batch size and precision, and the batch size and precisions of its configuration."""
    config, _ = load(project.config_class(name), project.experiments()[name])
    sections = list(config.phases.model_dump().values())
    sizes = {one["batch_size"] for one in sections}
    if len(sizes) > 1:
        raise BadInput(f"{project.experiments()[name]}: phases.*.batch_size: found {sorted(sizes)}, expected one size")
    configured = sorted({one.get("precision", "float32") for one in sections})
    has_precision = all("precision" in one for one in sections)
    precisions = [AS_CONFIGURED, *(one for one in PRECISIONS if has_precision and configured != [one])]
    settings = {
        f"{size} {precision}": of_setting(name, size, precision)
        for size in progress(sorted({*BATCH_SIZES, *sizes}), name)
        for precision in precisions
    }
    return {"batch_size": sizes.pop(), "configured": configured, "precisions": precisions, "settings": settings}


def of_setting(name: str, batch_size: int, precision: str = AS_CONFIGURED) -> dict[str, Any]:
    """Memory by phase, and hours by device and phase, of one setting."""
    words = ["memory", name, "--json", "--set", f"phases.*.batch_size={batch_size}"]
    if precision != AS_CONFIGURED:
        words += ["--set", f"phases.*.precision={precision}"]
    return shortened(name, asked(words))


def asked(words: Sequence[str]) -> dict[str, Any]:
    """What `repro` prints to these words. It exits with 1 where no device is large enough, which is an answer too."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(list(words))
    if not out.getvalue():
        raise BadInput(f"repro {' '.join(words)}: exit code {code}: {err.getvalue().strip()}")
    return json.loads(out.getvalue())


def shortened(name: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an answer of `repro memory --json` that the page shows.

    phases: name, rows of the minibatch, and (name, peak, needed) in bytes of the step and of what else is largest, as the command's table has
    them. hours: of each device, (low, likely, high) by phase, then in all for one seed and for the planned seeds; missing: what has no time.
    """
    found, time = said["experiments"][name], said["time"]
    phases = [
        [phase, one["rows"], [[part["name"], part["peak_bytes"], part["needed_bytes"]] for part in _shown(one)]]
        for phase, one in found["phases"].items()
    ]
    hours, missing = {}, {}
    for device, experiments in time["devices"].items():
        one = experiments[name]
        hours[device] = {
            "phases": {phase: _rounded(times["hours"]) for phase, times in one["phases"].items()},
            "seed": _rounded(one["hours_of_a_seed"]),
            "all": _rounded(one["hours"]),
        }
        if one["missing"]:
            missing[device] = one["missing"]
    return {"phases": phases, "failures": found["failures"], "seeds": time["seeds"], "hours": hours, "missing": missing}


def _shown(phase: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    step = phase["parts"][:1] if phase["rows"] else []
    others = phase["parts"][len(step) :]
    return step + ([max(others, key=lambda part: part["peak_bytes_in_blocks"])] if others else [])


def _rounded(hours: Sequence[float] | None) -> list[float] | None:
    return None if hours is None else [float(f"{one:.{DIGITS}g}") for one in hours]


if __name__ == "__main__":
    main()
