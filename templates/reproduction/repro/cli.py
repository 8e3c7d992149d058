"""The command line: `repro list`, `repro run`, `repro report`. Data on standard output, progress on standard error.

Exit codes: 0 done, 1 a run failed, 2 bad input (nothing written), 130 interrupted by Ctrl-C, 143 ended by SIGTERM after
saving. Runs that were interrupted or ended go on with --resume.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from repro.config import load
from repro.distributed import World, world_of_this_process
from repro.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RUN_FAILED,
    EXIT_TERMINATED,
    BadInput,
    RunFailed,
    Terminated,
)
from repro.method import Project, find_project
from repro.report import VERDICTS, write_report
from repro.run import Plan, execute, execute_many, holds_run, plan, run_folder
from repro.runtime import Runtime
from repro.termination import termination


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        with termination():
            return options.command(options)
    except BadInput as error:
        for problem in error.problems:
            print(f"repro: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunFailed as error:
        print(f"repro: {error}", file=sys.stderr)
        return EXIT_RUN_FAILED
    except KeyboardInterrupt:
        print("repro: interrupted; go on with the same command and --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Terminated:
        print("repro: ended by SIGTERM; go on with the same command and --resume", file=sys.stderr)
        return EXIT_TERMINATED


def _parser() -> _Parser:
    parser = _Parser(prog="repro", description="Reproduce a paper: run its experiments, judge its claims.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "list", help="the experiments and their phases", description="Lists the experiments and their phases."
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(command=_list)

    run = commands.add_parser(
        "run",
        help="train every phase of an experiment and evaluate it",
        description="Trains every phase of each experiment and evaluates it, once per seed.",
        epilog="example: repro run '2d-*' --seeds 0 1 2 --jobs 2 --resume",
    )
    run.add_argument("experiments", nargs="+", metavar="NAME", help="experiment, or a pattern such as '2d-*'")
    run.add_argument(
        "--seeds", nargs="+", type=_seed, default=[0], metavar="SEED", help="one run per seed (default: 0)"
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override every field that KEY matches; '*' is any one name",
    )
    run.add_argument("--train-iters", type=_positive, metavar="N", help="short for --set 'phases.*.iterations=N'")
    run.add_argument("--resume", action="store_true", help="go on with runs that exist, skip finished ones")
    run.add_argument("--resume-phase", type=_positive, metavar="N", help="start phase N over, keep the earlier ones")
    run.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)"
    )
    run.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default: 1)")
    run.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, or auto: cuda if there is one (default: auto)",
    )
    run.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where data sets lie; nothing is downloaded (default: data)",
    )
    run.add_argument(
        "--pool-storage",
        choices=["auto", "memory", "disk"],
        default="auto",
        help="where pools are kept; the result is the same (default: auto, by what is free)",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and what would run, write nothing"
    )
    run.set_defaults(command=_run)

    report = commands.add_parser(
        "report",
        help="judge every claim and write the results page",
        description="Judges every claim of spec.yaml and writes results.json, README.md and figures.",
        epilog="example: repro report --runs runs",
    )
    report.add_argument("--runs", type=Path, metavar="DIR", help="where the runs are (default: runs, if it is there)")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: the project's reports folder)"
    )
    report.add_argument("--title", default="Results", help="title of the page")
    report.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    report.set_defaults(command=_report)
    return parser


def _list(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    experiments = {}
    for name, path in project.experiments().items():
        config, _ = load(project.config_class(name), path)
        phases = project.method.phases(config, Runtime(torch.device("cpu")))
        experiments[name] = {phase.name: phase.iterations for phase in phases}
    if options.json:
        print(json.dumps(experiments, indent=1))
    else:
        for name, phases in experiments.items():
            print(
                f"{name}: "
                + ", ".join(
                    f"{number} {phase} ({steps} steps)" for number, (phase, steps) in enumerate(phases.items(), start=1)
                )
            )
    return EXIT_OK


def _run(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    overrides = list(options.overrides)
    if options.train_iters is not None:
        overrides.append(f"phases.*.iterations={options.train_iters}")
    plans = [plan(project, name, overrides) for name in _names(project, options.experiments)]
    with world_of_this_process() as world:
        device = _device(options.device, world)
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
    for seed in options.seeds:
        for one in plans:
            folder = execute(one, seed, options.runs, runtime, options.resume, options.resume_phase)
            if runtime.world.first:
                print(folder)
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
    print(options.runs)
    return EXIT_RUN_FAILED if failures else EXIT_OK


def _report(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    out = options.out or project.reports
    if options.runs is not None and not options.runs.is_dir():
        raise BadInput(f"--runs: found no folder {options.runs}, expected one that `repro run` wrote")
    judgements = write_report(project, options.runs or Path("runs"), out, options.title)
    if options.json:
        print(json.dumps({judgement.id: judgement.verdict for judgement in judgements}, indent=1))
    else:
        for verdict in VERDICTS:
            print(f"{sum(judgement.verdict == verdict for judgement in judgements):4d} {verdict}")
        print(out / "README.md")
    return EXIT_OK


def _names(project: Project, patterns: list[str]) -> list[str]:
    known = list(project.experiments())
    names: list[str] = []
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            raise BadInput(
                f"{project.root / 'configs'}: found no experiment '{pattern}', expected one of: {', '.join(known)}"
            )
        names += [name for name in found if name not in names]
    return names


def _device(name: str, world: World) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and world.size > 1:
        if name != "cuda":
            raise BadInput(f"--device: found '{name}', expected cuda, auto or cpu with {world.size} processes")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    refusal = f"--device: found '{name}', expected {', '.join(devices)} or auto"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(refusal) from None
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= (
        torch.cuda.device_count() if device.type == "cuda" else 1
    ):
        raise BadInput(refusal)
    return device


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number of at least {least}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as everywhere else; no abbreviated options."""

    def __init__(self, **arguments):
        super().__init__(**arguments, allow_abbrev=False)

    def error(self, message: str):
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")
