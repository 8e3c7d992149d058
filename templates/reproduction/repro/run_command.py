"""`repro run`: trains every phase of an experiment and evaluates it, once per seed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from repro import arguments
from repro.distributed import world_of_this_process
from repro.errors import EXIT_OK, EXIT_RUN_FAILED, BadInput
from repro.method import find_project
from repro.placeholders import FEW, of_claim
from repro.progress import say
from repro.report.markup import number, plural
from repro.report.results import read_record
from repro.run import RECORD, Plan, execute, execute_many, holds_run, plan, run_folder
from repro.runtime import Runtime
from repro.spec import Spec, load_spec
from repro.table import listed

LINE = 120
"""The longest line about a finished run, in signs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains every phase of each experiment and evaluates it, once per seed."
    parser.epilog = "example: repro run '2d-*' --seeds 0 1 2 --jobs 2 --resume"
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
            _warn_of_placeholders(plans, load_spec(project.spec))
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


def _warn_of_placeholders(plans: list[Plan], spec: Spec) -> None:
    """Says in a line, before anything is trained, which claims the runs cannot decide and why."""
    claims = [(one, claim) for one in plans for claim in spec.claims_of(one.experiment)]
    undecided = {claim.id: [*one.placeholders, *of_claim(spec, claim)] for one, claim in claims}
    undecided = {name: places for name, places in undecided.items() if places}
    places = list(dict.fromkeys(place for own in undecided.values() for place in own))
    if places:
        verdict = "no verdict" if len(undecided) == len(claims) else f"no verdict on {listed(list(undecided), FEW)}"
        count = f"{plural(len(places), 'place')} {'is' if len(places) == 1 else 'are'} still to be filled in"
        named = ", ".join(places[:FEW]) + ", ..." * (len(places) > FEW)
        say(f"repro: warning: {verdict} can come of this run: {count}: {named}; repro check lists them")


def _run_here(options: argparse.Namespace, plans: list[Plan], runtime: Runtime) -> int:
    """In this process, one run after the other."""
    if options.jobs > 1 and runtime.world.size > 1:
        raise BadInput(f"--jobs: found {options.jobs}, expected 1 with {runtime.world.size} processes on one run")
    folders, finished = [], _narrator(options, plans)
    for seed in options.seeds:
        for one in plans:
            folders.append(execute(one, seed, options.runs, runtime, options.resume, options.resume_phase))
            if runtime.world.first:
                finished(one, seed)
                if not options.json:
                    print(folders[-1])
    if runtime.world.first:
        if options.json:
            _print_json(folders, [])
        _say_what_is_next(options)
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
    failures = execute_many(plans, options.seeds, options.runs, options.jobs, passed, _narrator(options, plans))
    for failure in failures:
        print(f"repro: {failure}", file=sys.stderr)
    if options.json:
        _print_json(
            [run_folder(options.runs, one.experiment, seed) for seed in options.seeds for one in plans], failures
        )
    else:
        print(options.runs)
    if not failures:
        _say_what_is_next(options)
    return EXIT_RUN_FAILED if failures else EXIT_OK


def _narrator(options: argparse.Namespace, plans: list[Plan]) -> Callable[[Plan, int], None]:
    """What says on standard error that a run has finished. Made before the runs: it remembers which were there already."""
    folders = {run_folder(options.runs, one.experiment, seed) for one in plans for seed in options.seeds}
    there = {folder for folder in folders if (folder / RECORD).exists() and options.resume_phase is None}

    def finished(one: Plan, seed: int) -> None:
        folder = run_folder(options.runs, one.experiment, seed)
        try:
            say(_line(one, seed, read_record(folder / RECORD), folder in there))
        except BadInput as error:  # a record that was damaged since: the other runs go on
            say(f"repro: warning: {error}")

    return finished


def _line(one: Plan, seed: int, record: dict, was_there: bool) -> str:
    """Experiment, seed, seconds and the metrics that the experiment's claims are about, as many as fit into a line."""
    claims = load_spec(one.project.spec).claims_of(one.experiment)
    names = dict.fromkeys(name for claim in claims for name in claim.operands)
    metrics = [f"{name} {number(record['metrics'][name])}" for name in names if name in record["metrics"]]
    seconds = sum(record.get("wall_s", {}).values())
    told = f"{one.experiment} seed {seed}: {'was finished, ' * was_there}{seconds:.{0 if seconds >= 10 else 1}f} s"
    for index, metric in enumerate(metrics):
        left = len(metrics) - index - 1
        more = f" and {left} more" if left else ""
        if len(f"{told}, {metric}{more}") > LINE:
            return f"{told} and {left + 1} more"
        told += f", {metric}"
    return told


def _say_what_is_next(options: argparse.Namespace) -> None:
    where = "" if options.runs == Path("runs") else f" --runs {shlex.quote(str(options.runs))}"
    say(f"next: repro report{where}")


def _print_json(folders: list[Path], failures: list[str]) -> None:
    print(json.dumps({"runs": [str(folder) for folder in folders], "failures": failures}, indent=1))
