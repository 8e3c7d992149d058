"""`repro notebook`: a Kaggle or Colab notebook, the same for every session, sized by what a step takes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from repro import __main__ as command_line
from repro.errors import EXIT_OK, BadInput
from repro.method import Project, find_project
from repro.runtime import Runtime
from repro_tools.arguments import above_zero, hours
from repro_tools.gate import checked_plan
from repro_tools.memory.words import count, in_hours
from repro_tools.notebook.cells import Session, notebook, project_folder, taken_names
from repro_tools.notebook.platforms import PLATFORMS, Platform
from repro_tools.notebook.sizing import schedule, timings
from repro_tools.parts import WHOLE, require_phases

LONG_WEEKS = 2
"""From here on a plan is worth a warning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a notebook that runs an experiment session by session: each session restores the runs of the one before, goes on,\n"
        "saves before the platform's limit and packs. Needs nbformat. The notebook is not run here."
    )
    parser.epilog = (
        "example: repro notebook cifar10 --platform kaggle --seeds 0 1 2 --source https://github.com/me/my-paper"
    )
    parser.add_argument("experiment", metavar="NAME", help="experiment")
    parser.add_argument("--platform", choices=list(PLATFORMS), required=True, help="where it will run")
    command_line.add(parser, "--seeds", "--set", "--train-iters", "--micro-batches")
    parser.add_argument(
        "--session-hours",
        type=hours,
        metavar="H",
        help="hours of a session (default: what was reported of the platform)",
    )
    parser.add_argument(
        "--source",
        metavar="URL-OR-ZIP",
        help="repository to clone, with #COMMIT behind it for that commit, or the name of a zip file that will be uploaded "
        "(default: the project's folder and .zip)",
    )
    parser.add_argument(
        "--data-cell",
        type=Path,
        metavar="FILE",
        help="Python that puts the data sets into the folder DATA; it becomes a cell",
    )
    parser.add_argument(
        "--seconds-per-step",
        nargs="+",
        type=_seconds_per_step,
        default=[],
        metavar="PHASE=S",
        help="seconds of a step, where you measured them",
    )
    parser.add_argument(
        "--device",
        default="cuda",
        metavar="NAME",
        help="device of the runs (default: cuda, so that no session runs without a GPU)",
    )
    command_line.add(parser, "--runs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the notebook (default: notebooks/NAME-PLATFORM.ipynb in the project)"
    )
    command_line.add(parser, "--json")


def command(options: argparse.Namespace) -> int:
    nbformat = _nbformat()
    project = find_project(Path.cwd())
    session = plan_session(
        project,
        options.experiment,
        PLATFORMS[options.platform],
        seeds=options.seeds,
        overrides=command_line.overrides(options),
        micro_batches=options.micro_batches,
        session_hours=options.session_hours,
        device=options.device,
        source=options.source,
        data_cell=options.data_cell,
        seconds_per_step=dict(options.seconds_per_step),
        runs=options.runs,
    )
    out = options.out or project.root / "notebooks" / f"{options.experiment}-{options.platform}.ipynb"
    _write(out, nbformat.writes(notebook(session)) + "\n")
    for line in warnings(session):
        print(f"repro: warning: {line}", file=sys.stderr)
    if options.json:
        print(json.dumps(_as_json(session, out), indent=1))
    else:
        print(out)
    return EXIT_OK


def plan_session(
    project: Project,
    experiment: str,
    platform: Platform,
    *,
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    micro_batches: Mapping[str, int] = WHOLE,
    session_hours: float | None = None,
    device: str = "cuda",
    source: str | None = None,
    data_cell: Path | None = None,
    seconds_per_step: Mapping[str, float] | None = None,
    runs: Path = Path("runs"),
) -> Session:
    """Everything that the notebook says. Raises BadInput; writes nothing."""
    planned = checked_plan(project, experiment, list(overrides))
    runtime = Runtime(torch.device("cpu"), micro_batches=micro_batches)
    phases = list(project.method.phases(planned.config, runtime))
    require_phases(micro_batches, [phase.name for phase in phases])
    timing = timings(project, experiment, planned.config, runtime, platform.device, runs, seconds_per_step or {})
    root = project_folder(project)
    address, _, commit = (source or f"{root.name}.zip").partition("#")
    session = Session(
        plan=planned,
        seeds=tuple(dict.fromkeys(seeds)),
        overrides=tuple(overrides),
        micro_batches=dict(micro_batches),
        platform=platform,
        hours=session_hours or platform.hours,
        device=device,
        source=address,
        commit=commit or None,
        data_cell=None if data_cell is None else _text(data_cell),
        timing=timing,
        steps={phase.name: phase.steps for phase in phases},
        parts=(),
        unplanned=None,
        storage={name: size for phase in phases for name, size in phase.storage().items()},
    )
    try:
        parts = tuple(schedule(list(session.steps.items()), timing, session.seeds, session.run_s))
        session = replace(session, parts=parts)
    except BadInput as error:
        session = replace(session, unplanned=str(error))
    if taken := taken_names(session):
        raise BadInput(
            f"--data-cell: {data_cell}: found {', '.join(taken)} assigned, expected other names: the notebook has a use for "
            f"{'it' if len(taken) == 1 else 'them'}"
        )
    return session


def warnings(session: Session) -> list[str]:
    """What the user should know before starting."""
    found, platform = [], session.platform
    if session.hours > platform.hours:
        found.append(
            f"sessions of {in_hours(session.hours)}: {platform.title} is known to end them after {platform.hours:g}"
        )
    if session.unplanned:
        found.append(f"the number of sessions is not known: {session.unplanned}")
    if (session.weeks or 0) > LONG_WEEKS:
        sessions = count(session.parts[-1].session, "session")
        found.append(
            f"{sessions}, {session.weeks} weeks of {platform.title}'s quota: another device or a smaller setting may be meant"
        )
    room = platform.memory_gib * 2**30
    found += [
        f"{name} takes {size / 2**30:.1f} GiB of the disk, more than the memory of {platform.title} ({platform.memory_gib} GiB): minibatches are read from the disk"
        for name, size in session.storage.items()
        if size > room
    ]
    return found


def _as_json(session: Session, out: Path) -> dict[str, Any]:
    return {
        "notebook": str(out),
        "platform": session.platform.name,
        "session_hours": session.hours,
        "sessions": session.parts[-1].session if session.parts else None,
        "parts": [asdict(part) for part in session.parts],
        "seconds_per_step": {name: asdict(one) for name, one in session.timing.items()},
        "unplanned": session.unplanned,
        "warnings": warnings(session),
    }


def _nbformat() -> Any:
    try:
        import nbformat
    except ImportError:
        raise BadInput("nbformat: found no such package, expected it installed: pip install nbformat") from None
    return nbformat


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--data-cell: found {path}, expected a file of Python text ({error})") from None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise BadInput(f"--out: found {path}, expected a file that can be written ({error.strerror})") from None


def _seconds_per_step(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"found '{text}', expected PHASE=SECONDS")
    return name, above_zero(value, "seconds above 0")
