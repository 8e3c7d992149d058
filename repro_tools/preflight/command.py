"""`repro preflight`: all that can be known before a run, as one table: every experiment through every phase, killed and resumed.

Training and evaluation are at the method's tiny size, on the CPU and on stand-in data. Only the rows of the machine, the room
and the memory are about an experiment as it is configured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from repro import __main__ as command_line
from repro.config import load
from repro.errors import EXIT_OK, EXIT_RUN_FAILED, BadInput
from repro.method import Project, find_project
from repro.rounds import gib
from repro.run import git_commit
from repro.runtime import Runtime, progress
from repro_tools.check.findings import PLACEHOLDER, Finding
from repro_tools.failure import describe
from repro_tools.memory import devices
from repro_tools.memory.devices import Device
from repro_tools.memory.estimate import Planned, estimate
from repro_tools.memory.footprint import needed
from repro_tools.own_loop import EXIT_NOT_MEASURED, own_loops
from repro_tools.parts import WHOLE, require_phases
from repro_tools.placeholders import FEW
from repro_tools.preflight.checks import CHECKS, Findings, Row, in_order
from repro_tools.preflight.inspection import Question, inspect
from repro_tools.preflight.trial import OWN_LOOP
from repro_tools.probe import probe
from repro_tools.report.markup import plural
from repro_tools.spec import load_spec
from repro_tools.table import in_patterns, listed, table, wrapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Goes through the checklist before a run: every experiment, every phase, two steps each, killed and resumed.\n"
        "Exit code 0 when nothing failed, 3 when nothing failed and a row could not be measured."
    )
    parser.epilog = "example: repro preflight '2d-*' --json"
    command_line.add(parser, "experiments", **command_line.EVERY)
    command_line.add(parser, "--data-root")
    parser.set_defaults(data_root=None)  # data must lie in a folder that was named
    command_line.add(parser, "--runs")
    command_line.add(parser, "--micro-batches", help="those of the runs that are meant: parts must then give the same")
    parser.add_argument(
        "--on",
        metavar="DEVICE",
        help="the device that a run is for, as repro memory names it, or `this` for the machine at hand (default: budget.device)",
    )
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs",
        type=command_line.positive,
        default=cores,
        metavar="N",
        help=f"experiments at a time (default: {cores})",
    )
    command_line.add(parser, "--json")


def command(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    project = find_project(Path.cwd())
    names = command_line.names(project, options.experiments)
    divided = options.micro_batches
    if divided:
        require_phases(divided, _phase_names(project, names))
    question = Question(options.data_root or Path("data"), options.data_root is not None, options.runs, divided)
    device = _device(project, options.on)
    tasks = [Task(name, "training", partial(of_experiment, name, question)) for name in names]
    tasks.append(Task(None, "probes", partial(of_probes, names, question)))
    if isinstance(device, Device):
        tasks += [Task(name, "memory", partial(of_memory, name, device, divided), alone=True) for name in names]
    jobs = 1 if len(names) == 1 else min(options.jobs, len(tasks))
    found = list(of_project(project, question))
    found += [] if isinstance(device, Device) else [Row("memory", "not applicable", device, name) for name in names]
    found += _here(tasks) if jobs == 1 else _in_processes(tasks, jobs)
    rows, seconds = in_order(found), time.perf_counter() - began
    failed, left_open, unmeasured = (_count(rows, status) for status in ("fail", "open", "not measured"))
    if options.json:
        told = {"rows": [asdict(row) | {"fix": row.fix} for row in rows], "failed": failed, "open": left_open}
        told |= {"not measured": unmeasured}
        print(json.dumps(told | {"seconds": round(seconds, 1), "jobs": jobs}, indent=1))
    else:
        print(
            page(
                rows,
                list(project.experiments()),
                f"{len(names)} experiment{'s' * (len(names) > 1)}, {seconds:.0f} s, {jobs} at a time",
            )
        )
    if failed:
        return EXIT_RUN_FAILED
    return EXIT_NOT_MEASURED if unmeasured else EXIT_OK


def _phase_names(project: Project, names: Sequence[str]) -> set[str]:
    """Of all experiments whose configuration can be used."""
    found = set[str]()
    for name in names:
        with suppress(BadInput):
            found.update(phase.name for phase in Planned.read(project, name, []).phases())
    return found


def of_project(project: Project, question: Question) -> list[Row]:
    """Rows about what all experiments share."""
    findings = Findings()
    try:
        spec = load_spec(project.spec)
    except BadInput as error:
        findings.failed("spec", describe(error))
        findings.leave_out_all(("placeholders", "seeds"), "the spec cannot be read")
    else:
        _check_spec(project, question, findings)
        twice = sorted({seed for seed in spec.seeds if spec.seeds.count(seed) > 1})
        problem = f"found {listed([str(seed) for seed in twice])} more than once" if twice else None
        findings.judge("seeds", problem, f"a full run: --seeds {' '.join(map(str, spec.seeds))}")
    commit = git_commit(project.root)
    if commit == "none":
        findings.left_out("commit", "this is no git repository: a record names no commit")
    else:
        changed = commit.endswith("+changes")
        problem = f"found changes since {commit.removesuffix('+changes')[:12]} that are not committed"
        findings.judge("commit", problem if changed else None, commit)
    return findings.rows


def _check_spec(project: Project, question: Question, findings: Findings) -> None:
    """The rows of what `repro check` finds: what is to be filled in keeps nothing from running, the rest are faults."""
    from repro_tools.check.command import check_project

    try:
        found = check_project(project, None, question.runs).findings
    except BadInput as error:
        findings.failed("spec", describe(error))
        findings.left_out("placeholders", "see the row of the spec")
        return
    faults = [one for one in found if one.kind != PLACEHOLDER]
    findings.judge("spec", _first_of(faults) if faults else None, str(project.spec))
    places = [one.place for one in found if one.kind == PLACEHOLDER]
    if places:
        findings.left_open(
            "placeholders",
            f"found {plural(len(places), 'place')}, expected none before a run that counts: {listed(places, FEW)}; repro check lists them",
        )
    else:
        findings.passed("placeholders")


def _first_of(faults: Sequence[Finding]) -> str:
    first, more = faults[0], f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{first.kind}: {first.place}: found {first.found}, expected {first.expected}{more}"


def of_experiment(name: str, question: Question) -> list[Row]:
    """Rows of one experiment, but for its probes and its memory."""
    return inspect(find_project(Path.cwd()), name, question)


def of_probes(names: Sequence[str], question: Question) -> list[Row]:
    """A row for each experiment. Probes that experiments share are called once."""
    project, configs = find_project(Path.cwd()), {}
    for name in names:
        try:
            configs[name] = load(project.config_class(name), project.experiments()[name])[0]
        except BadInput:
            continue  # said in the row of its configuration
    found = probe(project, configs, Runtime(torch.device("cpu"), question.data_root, stand_in_data=True))
    rows = []
    for name in names:
        findings, own = Findings(name), [one for one in found if name in one.experiments]
        broken = [f"{', '.join(filter(None, [one.name, one.shapes]))}: {one.error}" for one in own if one.error]
        if name not in configs:
            findings.left_out("probes", "the configuration cannot be used")
        elif not own:
            findings.left_out("probes", "the Method has no probes for it (repro/method.py, Probe)")
        else:
            findings.judge("probes", "; ".join(broken) or None, f"{len(own)} calls")
        rows += findings.rows
    return rows


def _device(project: Project, asked: str | None) -> Device | str:
    """The device that runs are for, the one that is named or that of the spec's budget, or why there is none to hold them against.

    Raises BadInput for an unknown `asked`.
    """
    if asked is not None:
        return _at_hand() if asked == devices.HERE else devices.find(asked)
    try:
        budget = load_spec(project.spec).budget
    except BadInput:
        budget = None
    if budget is None:
        return "no device was named: --on DEVICE, or budget.device in the spec"
    try:
        return _at_hand() if budget.device == devices.HERE else devices.find(budget.device)
    except BadInput as error:
        return f"budget.device of the spec: {describe(error)}"


def _at_hand() -> Device | str:
    """The GPU of this machine. The estimate is of a GPU's memory, so a machine without one has none to hold it against."""
    if not torch.cuda.is_available():
        return "the device is this machine, which has no GPU"
    try:
        return devices.find(torch.cuda.get_device_name())
    except BadInput as error:
        return f"the device is this machine: {describe(error)}"


def of_memory(name: str, device: Device, divided: Mapping[str, int] = WHOLE) -> list[Row]:
    """Whether each phase of an experiment, and its evaluation, fit on the device."""
    findings = Findings(name)
    try:
        planned = Planned.read(find_project(Path.cwd()), name, [])
    except BadInput:
        findings.left_out("memory", "the configuration cannot be used")
        return findings.rows
    found = own_loops(planned.phases())
    for phase in found:
        findings.not_measured_all(["memory"], OWN_LOOP, phase)
    if found:
        return findings.rows
    estimated = estimate(planned, micro_batches=divided)
    for failure in estimated.failures:
        findings.failed("memory", failure)
    for one in estimated.footprints:
        most = max(needed(one, part) for part in one.parts)
        parts = f" in {one.micro_batches} micro-batches" if one.micro_batches > 1 else ""
        sizes = f"{gib(most)} needed of {gib(device.room_bytes)} on {device.name}{parts}"
        findings.judge("memory", f"found {sizes}" if most > device.room_bytes else None, sizes, one.name)
    return findings.rows


@dataclass(frozen=True)
class Task:
    """What makes rows; `check` is the one that fails when it ends without an answer.

    alone: it has a process of its own also where the others share one. A rehearsal is such a task: data that a method read and kept
    are real after training and fake after a rehearsal, and either would answer for the other.
    """

    experiment: str | None
    check: str
    call: Callable[[], list[Row]]
    alone: bool = False


def _here(tasks: Sequence[Task]) -> Iterator[Row]:
    """The rows of all tasks, one after the other in this process, but for those that are `alone`."""
    context, threads = _processes(), torch.get_num_threads()
    for task in progress(tasks, "preflight"):
        yield from _in_a_process(task, context, threads) if task.alone else _answer(task)


def _in_processes(tasks: Sequence[Task], jobs: int) -> Iterator[Row]:
    """The rows of all tasks, `jobs` at a time, each in a process of its own: what kills one leaves the others' rows."""
    context, threads = _processes(), max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as waiting:
        answers = waiting.map(partial(_in_a_process, context=context, threads=threads), tasks)
        for rows in progress(answers, "preflight", total=len(tasks)):
            yield from rows


def _processes() -> BaseContext:
    """How processes begin: as copies of one that has imported the kit and the method, where the system can: it takes seconds."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["repro_tools.preflight.ready"])
    return context


def _in_a_process(task: Task, context: BaseContext, threads: int) -> list[Row]:
    """The rows of a task from a new process, which ends with it: nothing that another task left behind decides them."""
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as process:
        try:
            return process.submit(_answer, task).result()
        except BrokenProcessPool:
            return _no_answer(task, "its process was killed: out of memory, or a crash in a library")


def _answer(task: Task) -> list[Row]:
    try:
        with redirect_stdout(sys.stderr):  # what a method or a library prints is no data
            return task.call()
    except Exception as error:
        return _no_answer(task, describe(error))


def _no_answer(task: Task, why: str) -> list[Row]:
    findings = Findings(task.experiment)
    findings.failed(task.check, why)
    return findings.rows


def page(rows: Sequence[Row], known: Sequence[str], tally: str) -> str:
    """The checklist with counts, then every failed row with what to do, what is open, then why others are not applicable."""
    lines = []
    for name, asked in CHECKS.items():
        own = [row.status for row in rows if row.check == name]
        if own:
            counts = [
                str(own.count(status) or "") for status in ("pass", "fail", "open", "not measured", "not applicable")
            ]
            lines.append([name, *counts, f"{asked.of}: {asked.asks}"])
    text = [table(["check", "pass", "FAIL", "open", "not measured", "n/a", "passes when"], lines), ""]
    failed = _merged(rows, "fail", known)
    for check, where, what in failed:
        text += wrapped(f"FAIL  {check}{where}: {what}", "      ") + wrapped(
            f"      fix: {CHECKS[check].fix}", "      "
        )
    left_open = _merged(rows, "open", known)
    for check, where, what in left_open:
        text += wrapped(f"OPEN  {check}{where}: {what}", "      ")
    unmeasured = _merged(rows, "not measured", known)
    for check, where, what in unmeasured:
        text += wrapped(f"NOT MEASURED  {check}{where}: {what}", "      ")
    text += [""] * bool(failed or left_open or unmeasured)
    for check, where, what in _merged(rows, "not applicable", known):
        text += wrapped(f"n/a   {check}{where}: {what}", "      ")
    told = f"{_count(rows, 'fail')} failed" + (f", {_count(rows, 'open')} open" if left_open else "")
    told += f", {_count(rows, 'not measured')} not measured" if unmeasured else ""
    return "\n".join([*text, "", f"{len(rows)} rows, {told}; {tally}"])


def _count(rows: Sequence[Row], status: str) -> int:
    return sum(row.status == status for row in rows)


def _merged(rows: Sequence[Row], status: str, known: Sequence[str]) -> list[tuple[str, str, str]]:
    """(check, where, text) of the rows of a status. Those that say the same of several phases or experiments are one."""
    phases: dict[tuple[str, str, str | None], list[str]] = {}
    for row in rows:
        if row.status == status:
            phases.setdefault((row.check, row.text, row.experiment), []).extend([row.phase] if row.phase else [])
    places: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (check, text, experiment), named in phases.items():
        places.setdefault((check, text, tuple(named)), []).extend([experiment] if experiment else [])
    merged = []
    for (check, text, of_phases), experiments in places.items():
        where = [in_patterns(experiments, known)] if experiments else []
        where += [f"phase {listed(of_phases)}"] if of_phases else []
        merged.append((check, f" ({'; '.join(where)})" if where else "", text))
    return merged
