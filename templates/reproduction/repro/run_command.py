"""`repro run`: trains every phase of an experiment and evaluates it, once per seed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from repro import arguments
from repro.distributed import world_of_this_process
from repro.errors import EXIT_OK, EXIT_RUN_FAILED, BadInput
from repro.method import find_project
from repro.run import Plan, execute, execute_many, holds_run, plan, run_folder
from repro.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains every phase of each experiment and evaluates it, once per seed."
    parser.epilog = "example: repro run '2d-*' --seeds 0 1 2 --jobs 2 --resume"
    arguments.add_experiments(parser, default_all=False)
    parser.add_argument(
        "--seeds", nargs="+", type=arguments.seed, default=[0], metavar="SEED", help="one run per seed (default: 0)"
    )
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
        "--dry-run", action="store_true", help="print the resolved configuration and what would run, write nothing"
    )
    arguments.add_json(parser)


def command(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    overrides = arguments.overrides(options)
    plans = [plan(project, name, overrides) for name in arguments.names(project, options.experiments)]
    with world_of_this_process() as world:
        device = arguments.device(options.device, world)
        if world.first:
            for one in plans:
                for change in one.changes:
                    print(f"{one.experiment}: {change}", file=sys.stderr)
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
            return _run_here(options, plans, runtime)
    return _run_in_processes(options, plans, overrides)


def _run_here(options: argparse.Namespace, plans: list[Plan], runtime: Runtime) -> int:
    """In this process, one run after the other."""
    if options.jobs > 1 and runtime.world.size > 1:
        raise BadInput(f"--jobs: found {options.jobs}, expected 1 with {runtime.world.size} processes on one run")
    folders = []
    for seed in options.seeds:
        for one in plans:
            folders.append(execute(one, seed, options.runs, runtime, options.resume, options.resume_phase))
            if runtime.world.first and not options.json:
                print(folders[-1])
    if runtime.world.first and options.json:
        _print_json(folders, [])
    return EXIT_OK


def _run_in_processes(options: argparse.Namespace, plans: list[Plan], overrides: list[str]) -> int:
    """Each run in a process of its own, --jobs at a time."""
    if not options.resume and options.resume_phase is None:
        taken = [run_folder(options.runs, one.experiment, seed) for one in plans for seed in options.seeds]
        taken = [str(folder) for folder in taken if holds_run(folder)]
        if taken:
            raise BadInput(
                f"{taken[0]}: found a run, expected none; continue with --resume or choose another folder with --runs"
            )
    passed = [*(f"--set={override}" for override in overrides), "--device", options.device]
    passed += ["--data-root", str(options.data_root), "--pool-storage", options.pool_storage]
    passed += ["--resume"] if options.resume else []
    passed += ["--resume-phase", str(options.resume_phase)] if options.resume_phase else []
    failures = execute_many(plans, options.seeds, options.runs, options.jobs, passed)
    for failure in failures:
        print(f"repro: {failure}", file=sys.stderr)
    if options.json:
        _print_json(
            [run_folder(options.runs, one.experiment, seed) for seed in options.seeds for one in plans], failures
        )
    else:
        print(options.runs)
    return EXIT_RUN_FAILED if failures else EXIT_OK


def _print_json(folders: list[Path], failures: list[str]) -> None:
    print(json.dumps({"runs": [str(folder) for folder in folders], "failures": failures}, indent=1))
