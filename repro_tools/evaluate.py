"""`repro evaluate`: judges the finished networks of runs anew, without training.

The new record takes the place of the old one, which is kept in a folder `superseded-N` of the run. What was fixed before the run
stays fixed: the new record keeps the hashes of the claims that the run was made with, and every departure of its training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from repro import __main__ as command_line
from repro.checkpoint import flush
from repro.config import Change, differences, digest, load, shaping
from repro.errors import EXIT_OK, BadInput
from repro.method import Project, find_project
from repro.run import (
    CONFIG,
    RECORD,
    TENSORS,
    Plan,
    alone_in,
    describe,
    holds_run,
    measure,
    networks,
    next_archive,
    run_folder,
    save_tensors,
    versions,
    write_record,
)
from repro.runtime import Runtime, World, arithmetic, deterministic, find_device
from repro_tools.gate import checked_plan, unmeasured
from repro_tools.report.results import read_record

PROTOCOL = "evaluation."
"""What the keys of a configuration begin with that may differ between a run and its new evaluation."""


@dataclass(frozen=True)
class Finished:
    """A finished run: `trained` is the plan its networks were trained by, `now` the one they are to be judged by."""

    folder: Path
    seed: int
    trained: Plan
    now: Plan
    record: dict

    @property
    def changed(self) -> list[Change]:
        """What of the protocol differs between the training and now."""
        return differences(shaping(self.trained.config), shaping(self.now.config))


@dataclass(frozen=True)
class Outcome:
    """A new evaluation: where the old record lies, and (before, after) of each metric that moved; None where there is none."""

    folder: Path
    superseded: Path
    metrics: int
    moved: dict[str, tuple[float | None, float | None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Judges the finished networks of each experiment anew, without training. The new record takes the place of the old one, "
        "which is kept beside it. Give the options that the run was made with; --set may change evaluation.* besides, as a departure."
    )
    parser.epilog = "example: repro evaluate digits --seeds 0 1 2 --data-root data"
    command_line.add(parser, "experiments")
    command_line.add(parser, "--seeds", default=None, help="which runs (default: all that are in --runs)")
    command_line.add(parser, "--set", "--train-iters", "--runs", "--device", "--data-root", "--json")


def command(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput(
            f"WORLD_SIZE: found {os.environ['WORLD_SIZE']} processes, expected one: an evaluation is not shared"
        )
    experiments = command_line.names(project, options.experiments)
    runs = find_runs(project, experiments, options.seeds, command_line.overrides(options), options.runs)
    runtime = Runtime(find_device(options.device, World()), options.data_root)
    outcomes = []
    for run in runs:
        outcomes.append(evaluate_anew(run, runtime))
        if not options.json:
            print("\n".join(_lines(outcomes[-1])), flush=True)
    if options.json:
        print(json.dumps([_plain(outcome) for outcome in outcomes], indent=1))
    return EXIT_OK


def find_runs(
    project: Project, experiments: list[str], seeds: list[int] | None, overrides: list[str], runs: Path
) -> list[Finished]:
    """The finished runs that are to be judged anew. Raises BadInput, a line per run that cannot be, before anything is done."""
    found, problems = [], []
    for experiment in experiments:
        now = checked_plan(project, experiment, overrides)
        folders = {seed: run_folder(runs, experiment, seed) for seed in seeds} if seeds else _folders(runs, experiment)
        if not folders:
            problems.append(f"{runs / experiment}: found no run, expected one that `repro run {experiment}` wrote")
        for seed, folder in folders.items():
            try:
                found.append(_finished(now, seed, folder))
            except BadInput as error:
                problems += error.problems
    if problems:
        raise BadInput(*problems)
    return found


def evaluate_anew(run: Finished, runtime: Runtime) -> Outcome:
    """Evaluates a finished run and replaces its record.

    Raises BadInput when its networks cannot be had, or another process is at work in its folder; nothing is written then.
    """
    with alone_in(run.folder):
        return _evaluate_anew(run, runtime)


def _evaluate_anew(run: Finished, runtime: Runtime) -> Outcome:
    with _threads_of(run.record, runtime), deterministic(runtime.device), arithmetic("float32"):
        origin = describe(run.now.project.root, runtime)
        phases = networks(run.trained, run.seed, run.folder, runtime)
        models = {name: phase.networks for name, phase in phases.items()}
        evaluation, seconds = measure(run.now, run.seed, models, runtime)
        origin["versions"] = versions()
    metrics = {name: float(value) for name, value in evaluation.metrics.items()}
    archive = next_archive(run.folder)
    record = run.record | {
        "config": run.now.config.model_dump(mode="json"),
        "config_hash": digest(run.now.config),
        "departures": _departures(run),
        "wall_s": run.record.get("wall_s", {}) | {"evaluate": round(seconds, 2)},
        "metrics": metrics,
        "evaluated_later": {
            **{key: origin[key] for key in ("command", "commit", "versions", "machine", "started")},
            "changed": [str(change) for change in run.changed],
            "supersedes": archive.name,
        },
    }

    # Copies, not moves: the run has a record at every moment.
    archive.mkdir()
    for name in (RECORD, TENSORS):
        if (run.folder / name).exists():
            shutil.copy2(run.folder / name, archive / name)
            flush(archive / name)
    partial = run.folder / f"{TENSORS}.partial"
    save_tensors(partial, evaluation)
    os.replace(partial, run.folder / TENSORS)
    write_record(run.folder / RECORD, record)

    for line in unmeasured(run.now, record):
        print(f"repro: warning: {line}", file=sys.stderr)
    before = run.record["metrics"]
    names = dict.fromkeys([*before, *metrics])
    moved = {name: (before.get(name), metrics.get(name)) for name in names if not _same(before, metrics, name)}
    return Outcome(run.folder, archive, len(metrics), moved)


def _folders(runs: Path, experiment: str) -> dict[int, Path]:
    """Every folder of the experiment that holds a run, by seed."""
    seeds = (path.name.removeprefix("seed-") for path in (runs / experiment).glob("seed-*"))
    folders = {
        seed: run_folder(runs, experiment, seed) for seed in sorted(int(seed) for seed in seeds if seed.isdecimal())
    }
    return {seed: folder for seed, folder in folders.items() if holds_run(folder)}


def _finished(now: Plan, seed: int, folder: Path) -> Finished:
    if not holds_run(folder):
        raise BadInput(f"{folder}: found no run, expected one that `repro run {now.experiment} --seeds {seed}` wrote")
    if not (folder / RECORD).exists():
        raise BadInput(
            f"{folder}: found no {RECORD}, expected a finished run; finish it with `repro run {now.experiment} --seeds {seed} --resume`"
        )
    record = read_record(folder / RECORD)
    config, _ = load(now.project.config_class(now.experiment), folder / CONFIG)
    changed = differences(shaping(config), shaping(now.config))
    other = [change for change in changed if not change.key.startswith(PROTOCOL)]
    if other:
        raise BadInput(
            f"{folder / CONFIG}: found another configuration, {'; '.join(map(str, other))}, expected that of the run in all but {PROTOCOL}*; "
            "repeat the options of the run"
        )
    return Finished(folder, seed, replace(now, config=config), now, record)


def _departures(run: Finished) -> list[str]:
    """Those of the training stay, whatever the shipped configuration has become since; those of the protocol are the ones now."""
    training = [line for line in run.record["departures"] if not line.startswith(PROTOCOL)]
    return list(dict.fromkeys([*training, *(str(change) for change in run.now.departures)]))


@contextmanager
def _threads_of(record: dict, runtime: Runtime) -> Iterator[None]:
    """Within this block a CPU adds up with as many threads as it did in the run: another number rounds otherwise."""
    before = torch.get_num_threads()
    threads = record["machine"].get("threads", before) if runtime.device.type == "cpu" else before
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _same(before: dict[str, float], after: dict[str, float], name: str) -> bool:
    """Whether a metric is the same number; a NaN is the same as another."""
    one, other = before.get(name), after.get(name)
    return one == other or (one != one and other != other)


def _lines(outcome: Outcome) -> list[str]:
    held = outcome.metrics - sum(after is not None for _, after in outcome.moved.values())
    lines = [
        f"{outcome.folder}: {held} of {outcome.metrics} metrics as before; the old record is in {outcome.superseded.name}"
    ]
    width = max((len(name) for name in outcome.moved), default=0)
    for name, (before, after) in outcome.moved.items():
        shown = ("not measured" if value is None else f"{value:.6g}" for value in (before, after))
        lines.append(f"  {name:<{width}}  {' -> '.join(shown)}")
    return lines


def _plain(outcome: Outcome) -> dict:
    return {
        "run": str(outcome.folder),
        "superseded": str(outcome.superseded),
        "metrics": outcome.metrics,
        "moved": {name: {"before": before, "after": after} for name, (before, after) in outcome.moved.items()},
    }
