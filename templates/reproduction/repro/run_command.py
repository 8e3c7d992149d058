"""`python -m repro run`: trains every phase of an experiment and evaluates it, once per seed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repro import arguments
from repro.errors import EXIT_OK, EXIT_RUN_FAILED, BadInput
from repro.method import find_project
from repro.run import RECORD, Plan, execute, execute_many, holds_run, plan, run_folder
from repro.runtime import Runtime, say, world_of_this_process

LINE = 120
"""The longest line about a finished run, in signs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains every phase of each experiment and evaluates it, once per seed."
    parser.epilog = f"example: {parser.prog} '2d-*' --seeds 0 1 2 --jobs 2 --resume"
    arguments.add_experiments(parser, default_all=False)
    arguments.add_seeds(parser, default=[0], told="one run per seed (default: 0)")
    arguments.add_overrides(parser)
    parser.add_argument("--resume", action="store_true", help="go on with runs that exist, skip finished ones")
    parser.add_argument(
        "--resume-phase", type=arguments.positive, metavar="N", help="start phase N over, keep the earlier ones"
    )
    arguments.add_runs(parser)
    parser.add_argument("--jobs", type=arguments.positive, default=1, metavar="N", help="runs at a time (default: 1)")
    arguments.add_device(parser)
    arguments.add_data_root(parser)
    parser.add_argument(
        "--pool-storage",
        choices=["auto", "memory", "disk"],
        default="auto",
        help="where pools are kept; the result is the same (default: auto, by what is free)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and what would run, write nothing",
    )
    arguments.add_json(parser)


def command(options: argparse.Namespace) -> int:
    return carry_out(options, planned(options), Around())


def planned(options: argparse.Namespace) -> list[Plan]:
    """The plan of every experiment that the options name."""
    project, overrides = find_project(Path.cwd()), arguments.overrides(options)
    return [plan(project, name, overrides) for name in arguments.names(project, options.experiments)]


def finished_line(one: Plan, seed: int, record: Mapping[str, Any], was_there: bool, metrics: Sequence[str]) -> str:
    """Experiment, seed, seconds and the metrics, as many as fit into a line."""
    seconds = sum(record.get("wall_s", {}).values())
    decimals = 0 if seconds >= 10 else 1
    told = f"{one.experiment} seed {seed}: {'was finished, ' * was_there}{seconds:.{decimals}f} s"
    for index, metric in enumerate(metrics):
        left = len(metrics) - index - 1
        more = f" and {left} more" if left else ""
        if len(f"{told}, {metric}{more}") > LINE:
            return f"{told} and {left + 1} more"
        told += f", {metric}"
    return told


def tell(one: Plan, seed: int, folder: Path, was_there: bool) -> list[str]:
    """What is said of a finished run: a line with all its metrics."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        metrics = [f"{name} {value:.3g}" for name, value in record["metrics"].items()]
        return [finished_line(one, seed, record, was_there, metrics)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # damaged since: the others go on
        return [f"repro: warning: {folder / RECORD}: found no run record ({error}), expected one"]


@dataclass(frozen=True)
class Around:
    """What surrounds the runs of a command.

    program: the module whose `run` a child process carries out (--jobs).
    warnings: lines that are said before anything is trained.
    gates: what `repro.run.execute` puts into the records, by experiment.
    tell: (plan, seed, run folder, whether the run was finished before) -> lines about a finished run.
    after: a line that is said when all runs have ended well.
    """

    program: str = "repro"
    warnings: Sequence[str] = ()
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tell: Callable[[Plan, int, Path, bool], list[str]] = tell
    after: str | None = None


def carry_out(options: argparse.Namespace, plans: list[Plan], around: Around) -> int:
    """Does what the options say with the plans. Returns the exit code."""
    with world_of_this_process() as world:
        device = arguments.device(options.device, world)
        if world.first:
            for one in plans:
                for change in one.changes:
                    print(f"{one.experiment}: {change}", file=sys.stderr)
            for line in around.warnings:
                say(line)
        if options.dry_run:
            if world.first:
                print(json.dumps({one.experiment: one.config.model_dump(mode="json") for one in plans}, indent=1))
            return EXIT_OK
        if options.pool_storage == "memory" and world.size > 1:
            raise BadInput(
                f"--pool-storage: found memory, expected auto or disk with {world.size} processes, which share one file"
            )
        runtime = Runtime(device, options.data_root, options.pool_storage, world)
        if len(plans) * len(options.seeds) == 1 or world.size > 1:
            return _run_here(options, plans, runtime, around)
    return _run_in_processes(options, plans, around)


def _run_here(options: argparse.Namespace, plans: list[Plan], runtime: Runtime, around: Around) -> int:
    """In this process, one run after the other."""
    first = runtime.world.first
    if options.jobs > 1 and runtime.world.size > 1:
        raise BadInput(f"--jobs: found {options.jobs}, expected 1 with {runtime.world.size} processes on one run")
    folders, finished = [], _narrator(options, plans, around)
    for seed in options.seeds:
        for one in plans:
            gate = around.gates.get(one.experiment)
            folders.append(execute(one, seed, options.runs, runtime, options.resume, options.resume_phase, gate))
            if first:
                finished(one, seed)
                if not options.json:
                    print(folders[-1])
    if first and options.json:
        _print_json(folders, [])
    if first and around.after:
        say(around.after)
    return EXIT_OK


def _run_in_processes(options: argparse.Namespace, plans: list[Plan], around: Around) -> int:
    """Each run in a process of its own, --jobs at a time."""
    folders = [run_folder(options.runs, one.experiment, seed) for seed in options.seeds for one in plans]
    if not options.resume and options.resume_phase is None:
        taken = [str(folder) for folder in folders if holds_run(folder)]
        if taken:
            raise BadInput(
                f"{taken[0]}: found a run, expected none; continue with --resume or choose another folder with --runs"
            )
    passed = [*(f"--set={override}" for override in arguments.overrides(options)), "--device", options.device]
    passed += ["--data-root", str(options.data_root), "--pool-storage", options.pool_storage]
    passed += ["--resume"] if options.resume else []
    passed += ["--resume-phase", str(options.resume_phase)] if options.resume_phase else []
    failures = execute_many(
        around.program,
        plans,
        options.seeds,
        options.runs,
        options.jobs,
        passed,
        _narrator(options, plans, around),
    )
    for failure in failures:
        print(f"repro: {failure}", file=sys.stderr)
    if options.json:
        _print_json(folders, failures)
    else:
        print(options.runs)
    if not failures and around.after:
        say(around.after)
    return EXIT_RUN_FAILED if failures else EXIT_OK


def _narrator(options: argparse.Namespace, plans: list[Plan], around: Around) -> Callable[[Plan, int], None]:
    """What says on standard error that a run has finished. Made before the runs: it remembers which were there already."""
    folders = {run_folder(options.runs, one.experiment, seed) for one in plans for seed in options.seeds}
    there = {folder for folder in folders if (folder / RECORD).exists() and options.resume_phase is None}

    def finished(one: Plan, seed: int) -> None:
        folder = run_folder(options.runs, one.experiment, seed)
        for line in around.tell(one, seed, folder, folder in there):
            say(line)

    return finished


def _print_json(folders: list[Path], failures: list[str]) -> None:
    print(json.dumps({"runs": [str(folder) for folder in folders], "failures": failures}, indent=1))
