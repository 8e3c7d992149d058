"""`repro run`: holds the configurations against the specification, then has the engine train and evaluate."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from repro import __main__ as command_line
from repro.errors import EXIT_OK, EXIT_RUN_FAILED, BadInput, Terminated
from repro.run import RECORD, Plan, holds_run, make_folder, run_folder
from repro.runtime import progress, say, world_of_this_process
from repro_tools.gate import against_spec, gate, unmeasured
from repro_tools.placeholders import FEW, of_claim
from repro_tools.report.markup import number, plural
from repro_tools.report.results import read_record
from repro_tools.spec import Spec, load_spec
from repro_tools.table import listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_run(parser)
    parser.epilog = "example: repro run '2d-*' --seeds 0 1 2 --jobs 2 --resume"
    told = "runs at a time (default: 1)"
    parser.add_argument("--jobs", type=command_line.positive, default=1, metavar="N", help=told)


def command(options: argparse.Namespace) -> int:
    plans = command_line.planned(options)
    spec = load_spec(plans[0].project.spec)
    for one in plans:
        against_spec(one, spec)
    gates = {one.experiment: gate(one, spec) for one in plans}
    with world_of_this_process() as world:
        runtime = command_line.prepared(options, plans, world)
        if world.first:
            for line in _placeholders(plans, spec, gates):
                say(line)
        if runtime is None:
            return EXIT_OK
        if options.jobs > 1 and world.size > 1:
            raise BadInput(f"--jobs: found {options.jobs}, expected 1 with {world.size} processes on one run")
        if len(plans) * len(options.seeds) == 1 or world.size > 1:
            command_line.run_here(options, plans, runtime, gates, _tell)
            if world.first:
                say(_next(options))
            return EXIT_OK
    failures = _run_in_processes(options, plans)
    if not failures:
        say(_next(options))
    return EXIT_RUN_FAILED if failures else EXIT_OK


def _next(options: argparse.Namespace) -> str:
    where = "" if options.runs == Path("runs") else f" --runs {shlex.quote(str(options.runs))}"
    return f"next: repro report{where}"


def _run_in_processes(options: argparse.Namespace, plans: list[Plan]) -> list[str]:
    """Each run in a process of its own, --jobs at a time. Returns a line per run that failed."""
    folders = {
        (one.experiment, seed): run_folder(options.runs, one.experiment, seed)
        for seed in options.seeds
        for one in plans
    }
    if not options.resume and options.resume_phase is None:
        taken = [str(folder) for folder in folders.values() if holds_run(folder)]
        if taken:
            raise BadInput(
                f"{taken[0]}: found a run, expected none; continue with --resume or choose another folder with --runs"
            )
    again = options.resume_phase is None
    there = {run for run, folder in folders.items() if (folder / RECORD).exists() and again}
    passed = [*(f"--set={override}" for override in command_line.overrides(options)), "--device", options.device]
    passed += ["--data-root", str(options.data_root), "--determinism", options.determinism]
    passed += [*_micro_batches(options), "--workers", str(options.workers)]
    passed += ["--resume"] if options.resume else []
    passed += ["--resume-phase", str(options.resume_phase)] if options.resume_phase else []

    def finished(one: Plan, seed: int) -> None:
        run = one.experiment, seed
        for line in _tell(one, seed, folders[run], run in there):
            say(line)

    failures = execute_many(plans, options.seeds, options.runs, options.jobs, passed, finished)
    for failure in failures:
        print(f"repro: {failure}", file=sys.stderr)
    if options.json:
        print(json.dumps({"runs": [str(folder) for folder in folders.values()], "failures": failures}, indent=1))
    else:
        print(options.runs)
    return failures


def _micro_batches(options: argparse.Namespace) -> list[str]:
    given = [f"{name}={count}" for name, count in options.micro_batches.items()]
    return ["--micro-batches", *given] if given else []


def execute_many(
    plans: list[Plan],
    seeds: list[int],
    runs: Path,
    jobs: int,
    arguments: list[str],
    finished: Callable[[Plan, int], None] = lambda plan, seed: None,
) -> list[str]:
    """Runs every (experiment, seed) in `jobs` processes at a time. Returns a line per run that failed.

    Each process is `python -m repro_tools run`; `arguments` are the options that it gets besides its experiment and seed. The processes
    share the cores, unless OMP_NUM_THREADS says otherwise. `finished` is called for each run that did not fail, as it ends. A
    SIGTERM is passed on to them, and Terminated raised after they have ended.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    tasks = [(plan, seed) for seed in seeds for plan in plans]
    running: list[subprocess.Popen] = []
    ending, starts = False, threading.Lock()  # a run must not start unseen while the others are being ended

    def one(task: tuple[Plan, int]) -> str | None:
        experiment, seed = task[0].experiment, task[1]
        folder = run_folder(runs, experiment, seed)
        make_folder(folder)
        command = [sys.executable, "-m", "repro_tools", "run", experiment, "--seeds", str(seed), "--runs", str(runs)]
        log = folder / "output.log"
        with log.open("ab") as output:
            with starts:
                if ending:
                    return None
                process = subprocess.Popen(
                    [*command, *arguments],
                    stdout=output,
                    stderr=output,
                    env={"OMP_NUM_THREADS": str(threads)} | os.environ,
                )
                running.append(process)
            code = process.wait()
            running.remove(process)
        if code == EXIT_OK:
            finished(*task)
            return None
        if code < 0:  # it could say nothing itself; what it printed last is about something else
            by = f"killed by {signal.Signals(-code).name}"
            return f"{experiment} seed {seed}: {by}; the same command with --resume goes on (see {log})"
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        return f"{experiment} seed {seed}: exit code {code}: {last} (see {log})"

    with ThreadPoolExecutor(jobs) as workers:
        try:
            outcomes: Iterator[str | None] = workers.map(one, tasks)
            return [outcome for outcome in progress(outcomes, "runs", total=len(tasks)) if outcome]
        except (KeyboardInterrupt, Terminated):
            workers.shutdown(wait=False, cancel_futures=True)
            with starts:
                ending = True
            for process in list(running):
                process.terminate()
            raise


def _placeholders(plans: list[Plan], spec: Spec, gates: dict[str, dict[str, Any]]) -> list[str]:
    """Says in a line, before anything is trained, which claims the runs cannot decide and why."""
    claims = [(one, claim) for one in plans for claim in spec.claims_of(one.experiment)]
    undecided = {claim.id: [*gates[one.experiment]["placeholders"], *of_claim(spec, claim)] for one, claim in claims}
    undecided = {name: places for name, places in undecided.items() if places}
    places = list(dict.fromkeys(place for own in undecided.values() for place in own))
    if not places:
        return []
    verdict = "no verdict" if len(undecided) == len(claims) else f"no verdict on {listed(list(undecided), FEW)}"
    count = f"{plural(len(places), 'place')} {'is' if len(places) == 1 else 'are'} still to be filled in"
    named = ", ".join(places[:FEW]) + ", ..." * (len(places) > FEW)
    return [f"repro: warning: {verdict} can come of this run: {count}: {named}; repro check lists them"]


def _tell(one: Plan, seed: int, folder: Path, was_there: bool) -> list[str]:
    """What is said of a finished run: the metrics that its claims name and it did not give, and a line about those that it gave."""
    try:
        record = read_record(folder / RECORD)
    except BadInput as error:  # a record that was damaged since: the other runs go on
        return [f"repro: warning: {error}"]
    warnings = [] if was_there else [f"repro: warning: {line}" for line in unmeasured(one, record)]
    return [*warnings, _line(one, seed, record, was_there)]


def _line(one: Plan, seed: int, record: dict, was_there: bool) -> str:
    """Experiment, seed, seconds and the metrics that the experiment's claims are about, as many as fit into a line."""
    claims = load_spec(one.project.spec).claims_of(one.experiment)
    names = dict.fromkeys(name for claim in claims for name in claim.operands)
    metrics = [f"{name} {number(record['metrics'][name])}" for name in names if name in record["metrics"]]
    return command_line.finished_line(one, seed, record, was_there, metrics)
