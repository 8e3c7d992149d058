"""One run: an experiment with a seed, its phases, its evaluation, and the record of where it came from."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from repro import INTERFACE, rounds
from repro.checkpoint import Damaged, previous, replace, sweep, writing
from repro.config import Change, RunConfig, differences, digest, load, shaping
from repro.errors import BadInput
from repro.loop import FINISHED, RUNNING, Curve, PhaseResult, rounds_folder, run_phase
from repro.method import Evaluation, Project
from repro.phases import Networks, Phase
from repro.randomness import seed_global_generators
from repro.runtime import (
    Runtime,
    arithmetic,
    check_precision,
    deterministic,
    imported_versions,
    machine,
    peak_host_bytes,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCKS: set[int] = set()
"""Descriptors of the run folders that this process is at work in. Workers, which outlive a killed one by
seconds, do not keep them."""


def _release_locks() -> None:
    for descriptor in _LOCKS:
        os.close(descriptor)


if fcntl is not None:
    os.register_at_fork(after_in_child=_release_locks)

RECORD, CONFIG, SPEC, TENSORS = "record.json", "config.yaml", "spec.yaml", "tensors.safetensors"


@dataclass(frozen=True)
class Plan:
    """What is to be done for one experiment: its configuration was checked, nothing is written yet.

    `shipped` is the configuration as its file has it, `config` the one with the overrides. `changes` is what
    each override did, `departures` what of it shapes the result.
    """

    project: Project
    experiment: str
    shipped: RunConfig
    config: RunConfig
    changes: list[Change]
    departures: list[Change]


def plan(project: Project, experiment: str, overrides: list[str]) -> Plan:
    """Reads and checks the configuration. Raises BadInput; writes nothing."""
    known = project.experiments()
    if experiment not in known:
        expected = f"expected one of: {', '.join(known)}"
        raise BadInput(f"{project.root / 'configs'}: found no experiment '{experiment}', {expected}")
    path = known[experiment]
    shipped, _ = load(project.config_class(experiment), path)
    config, changes = load(project.config_class(experiment), path, overrides)
    for source, one in ((path, shipped), ("--set", config)):
        if one.experiment != experiment:
            expected = f"expected '{experiment}', the name of the file"
            raise BadInput(f"{source}: experiment: found '{one.experiment}', {expected}")
    return Plan(project, experiment, shipped, config, changes, differences(shaping(shipped), shaping(config)))


def run_folder(runs: Path, experiment: str, seed: int) -> Path:
    return runs / experiment / f"seed-{seed}"


def holds_run(folder: Path) -> bool:
    """Whether a run was started in `folder`."""
    return (folder / CONFIG).exists()


@dataclass(frozen=True)
class Run:
    """A plan with a seed, in its folder, on a machine; `phases` with their numbers and folders."""

    plan: Plan
    seed: int
    folder: Path
    runtime: Runtime
    phases: list[tuple[int, Phase[Any], Path]]


def _run(plan: Plan, seed: int, folder: Path, runtime: Runtime) -> Run:
    phases = enumerate(plan.project.method.phases(plan.config, runtime), start=1)
    return Run(plan, seed, folder, runtime, [(n, one, folder / f"{n}-{one.name}") for n, one in phases])


def execute(
    plan: Plan,
    seed: int,
    runs: Path,
    runtime: Runtime,
    resume: bool,
    resume_phase: int | None,
    gate: Mapping[str, Any] | None = None,
) -> Path:
    """Trains every phase and evaluates. Returns the run folder. An interrupted run goes on from its last
    saved state.

    The text of the project's spec.yaml, if it has one, is kept in the folder as it is now, unread. `gate` is
    what was fixed by it before the run, by whoever read it: its entries become the record's.

    Raises BadInput when the folder holds a run and `resume` is not set, or holds a run of another
    configuration, or when a phase asks for what the machine does not have; then nothing was written. Raises
    BadInput too while another process is at work in the folder.
    """
    run, world = _run(plan, seed, run_folder(runs, plan.experiment, seed), runtime), runtime.world
    folder = run.folder
    _check_micro_batches(run)
    _check_folder(run, resume, resume_phase)
    if (folder / RECORD).exists() and resume_phase is None:
        return folder
    messages = _check_machine(run, resume_phase)
    world.require_same(
        _facts(run), "processes of one run"
    )  # nothing is written until every process has looked
    if world.first:
        make_folder(folder)
    with alone_in(folder) if world.first else nullcontext():
        fixed: dict[str, Any] = {}
        if world.first:
            # Again: another process may have begun the run, or ended it, since.
            _check_folder(run, resume, resume_phase)
            if resume_phase is not None:
                _set_aside(run, resume_phase)
            _write_text(folder / CONFIG, yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False))
            fixed = _fixed_before(run, gate)
            for line in [_where(run)] * resume + messages:
                print(f"{folder}: {line}", file=sys.stderr)
        world.barrier()
        info = describe(plan.project.root, runtime)
        with deterministic(runtime.device, runtime.determinism), arithmetic("float32"):
            results = _trained(run)
            if world.first:
                _evaluate(run, results, fixed | info)
    return folder


def _facts(run: Run) -> dict[str, Any]:
    """What must be the same in all processes of a run: otherwise they draw or train apart."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "repro": INTERFACE,
        "OMP_NUM_THREADS": torch.get_num_threads(),
        "configuration": digest(run.plan.config),
        "seed": run.seed,
        "folder": str(run.folder.resolve()),
        "micro-batches": {phase.name: run.runtime.micro_batches_of(phase.name) for _, phase, _ in run.phases},
    }


def _trained(run: Run) -> dict[str, PhaseResult]:
    """Each phase's result by its name: trained after those before it, or read where it is finished."""
    results: dict[str, PhaseResult] = {}
    for number, phase, folder in run.phases:
        try:
            results[phase.name] = run_phase(
                phase,
                folder=folder,
                identity={"seed": run.seed, "config": shaping(run.plan.config)},
                seed=run.seed,
                runtime=run.runtime,
                pace=run.plan.config.pace,
                earlier={name: result.networks for name, result in results.items()},
            )
        except Damaged as error:
            raise BadInput(f"{error}; start phase {number} over with --resume-phase {number}") from None
    return results


def _evaluate(run: Run, results: Mapping[str, PhaseResult], info: Mapping[str, Any]) -> None:
    plan, models = run.plan, {name: result.networks for name, result in results.items()}
    evaluation, evaluation_s = measure(plan, run.seed, models, run.runtime)
    sweep(run.folder)
    save_tensors(run.folder / TENSORS, evaluation)
    wall_s = {name: result.wall_s for name, result in results.items()} | {"evaluate": evaluation_s}
    peaks = {name: result.peak_device_bytes for name, result in results.items()}
    record = {
        "experiment": plan.experiment,
        "seed": run.seed,
        "config": plan.config.model_dump(mode="json"),
        "config_hash": digest(plan.config),
        "departures": [str(change) for change in plan.departures],
        **info,
        "versions": versions(),
        "wall_s": {name: round(seconds, 2) for name, seconds in wall_s.items()},
        "prepare_s": {name: round(result.prepare_s, 2) for name, result in results.items()},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "peak_host_mib": round(peak_host_bytes() / 2**20, 1),
        "peak_device_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "metrics": {name: float(value) for name, value in evaluation.metrics.items()},
        "curves": {name: _rounded(result.curves) for name, result in results.items()},
    }
    divided = {phase.name: run.runtime.micro_batches_of(phase.name) for _, phase, _ in run.phases}
    if any(count > 1 for count in divided.values()):
        record["micro_batches"] = divided
    if run.runtime.workers:
        record["workers"] = run.runtime.workers
    if parts := {name: result.parts for name, result in results.items() if result.parts}:
        record["parts"] = parts
    if watched := {name: result.watched for name, result in results.items() if result.watched}:
        record["watched"] = watched
    if resumed := {name: result.sessions for name, result in results.items() if len(result.sessions) > 1}:
        record["sessions"] = resumed
    write_record(run.folder / RECORD, record)


def _rounded(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Six digits: a record is for readers."""
    return {name: [(step, float(f"{value:.6g}")) for step, value in curve] for name, curve in curves.items()}


def measure(
    plan: Plan, seed: int, models: Mapping[str, Networks], runtime: Runtime
) -> tuple[Evaluation, float]:
    """What the method's evaluation says of finished networks, and the seconds it took. Writes nothing."""
    began = time.perf_counter()
    seed_global_generators(seed, "evaluate")
    with torch.no_grad():
        evaluation = plan.project.method.evaluate(plan.config, models, seed, runtime)
    return evaluation, time.perf_counter() - began


def save_tensors(path: Path, evaluation: Evaluation) -> None:
    """Writes what figures are drawn from."""
    # Clones, because safetensors refuses tensors that share memory, as a path and its last point may.
    whole = torch.contiguous_format
    own = {name: tensor.clone(memory_format=whole) for name, tensor in evaluation.tensors.items()}
    with writing(path):
        save_file(own, path)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces a record as a whole. One key a line: it stays readable in a diff although it holds curves."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    _write_text(path, f"{{\n{lines}\n}}\n")


def networks(plan: Plan, seed: int, folder: Path, runtime: Runtime) -> dict[str, PhaseResult]:
    """The finished phases of the run in `folder`, in their order, trained with the configuration of `plan`.

    Raises BadInput when a phase is not finished, or its network is damaged or of another configuration.
    """
    run = _run(plan, seed, folder, runtime)
    for _, phase, own in run.phases:
        if not (own / FINISHED).exists():
            raise BadInput(f"{own}: found no {FINISHED}, expected phase {phase.name} to be finished")
    return _trained(run)


# Before a run.


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expected = f"expected a folder that can be made ({error.strerror})"
        raise BadInput(f"--runs: found {folder}, {expected}") from None


def _check_machine(run: Run, resume_phase: int | None) -> list[str]:
    """What the phases still to run say of this machine. Raises BadInput for what it does not have."""
    messages = []
    for number, phase, own in run.phases:
        starts_over = resume_phase is not None and number >= resume_phase
        if starts_over or not (own / FINISHED).exists():
            check_precision(phase.precision, phase.name, run.runtime.device)
            messages += [f"{number} {phase.name}: {line}" for line in phase.check(own)]
            needed, there = sum(phase.storage().values()), rounds.room(rounds_folder(phase, own))
            if needed > there:
                found = f"found {rounds.gib(needed)} of data of its rounds"
                expected = f"expected at most {rounds.DISK_SHARE:.0%} of the free disk, {rounds.gib(there)}"
                raise BadInput(f"{own}: {found}, {expected}")
    return messages


def _check_micro_batches(run: Run) -> None:
    names = [phase.name for _, phase, _ in run.phases]
    for name in run.runtime.micro_batches:
        if name not in ("*", *names):
            raise BadInput(f"--micro-batches: found the phase '{name}', expected one of: {', '.join(names)}")


def _check_folder(run: Run, resume: bool, resume_phase: int | None) -> None:
    plan, folder = run.plan, run.folder
    if resume_phase is not None:
        if not 1 <= resume_phase <= len(run.phases):
            names = ", ".join(f"{number} {phase.name}" for number, phase, _ in run.phases)
            raise BadInput(f"--resume-phase: found {resume_phase}, expected one of: {names}")
        for number, phase, own in run.phases[: resume_phase - 1]:
            if not (own / FINISHED).exists():
                expected = f"expected phase {number} ({phase.name}) to be finished"
                raise BadInput(f"--resume-phase {resume_phase}: found no {own / FINISHED}, {expected}")
    if not holds_run(folder):
        return
    if not resume and resume_phase is None:
        ways = "continue it with --resume or choose another folder with --runs"
        raise BadInput(f"{folder}: found a run, expected none; {ways}")
    before, _ = load(plan.project.config_class(plan.experiment), folder / CONFIG)
    if changed := differences(shaping(before), shaping(plan.config)):
        advice = "as configured now; repeat the options of the run, or choose another folder with --runs"
        found = [f"{one.key}: found {one.before!r}, expected {one.after!r} {advice}" for one in changed]
        raise BadInput(*(f"{folder / CONFIG}: {one}" for one in found))


def _fixed_before(run: Run, gate: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the record says of the specification. Keeps its text in the folder.

    Without a gate nobody has read it yet: the text is all that the claims can be held against later, and that
    the method was still a stand-in must be said here.
    """
    placeholder, spec = run.plan.project.method.placeholder, run.plan.project.spec
    fixed = dict(gate) if gate is not None else {"method_placeholder": placeholder} if placeholder else {}
    try:
        text = spec.read_bytes()
    except FileNotFoundError:
        return fixed
    except OSError as error:
        raise BadInput(f"{spec}: cannot be read ({error.strerror}), expected a file or none") from None
    replace(run.folder / SPEC, text)
    return fixed | {"spec_sha256": hashlib.sha256(text).hexdigest()}


def _where(run: Run) -> str:
    """At which phase a run goes on, in words."""
    for number, phase, own in run.phases:
        if not (own / FINISHED).exists():
            saved = (own / RUNNING).exists() or previous(own / RUNNING).exists()
            state = "from its last saved state" if saved else "from its beginning"
            return f"goes on at phase {number} {phase.name}, {state}"
    return "goes on at the evaluation"


def _set_aside(run: Run, first: int) -> None:
    """Moves what phase `first` and the later ones left behind out of the way. Nothing is deleted."""
    later = [own for _, _, own in run.phases[first - 1 :]]
    # The record goes first: as long as it is there, --resume takes the run for finished.
    if old := [path for path in (run.folder / RECORD, run.folder / TENSORS, *later) if path.exists()]:
        archive = next_archive(run.folder)
        archive.mkdir()
        for path in old:
            path.rename(archive / path.name)


def next_archive(folder: Path) -> Path:
    """The folder, not yet made, in which a run keeps what is superseded next."""
    number = 1
    while (archive := folder / f"superseded-{number}").exists():
        number += 1
    return archive


def _write_text(path: Path, text: str) -> None:
    replace(path, text.encode())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within this block no other process of this machine is in one for the same folder. Raises BadInput when
    another one is.

    Where the system or the file system knows no such lock, none is taken.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _LOCKS.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = "found another process at work on this run, expected none"
            raise BadInput(f"{folder}: {found}; wait until it has ended, or stop it") from None
        except OSError:
            pass
        yield
    finally:
        _LOCKS.discard(descriptor)
        os.close(descriptor)


def describe(root: Path, runtime: Runtime) -> dict[str, Any]:
    """Plain data about this process: command, commit, machine, start time."""
    return {
        "command": " ".join(["repro", *sys.argv[1:]]),
        "commit": _commit_of_this_process(root),
        "machine": machine(runtime.device),
        "processes": runtime.world.size,
        "determinism": runtime.determinism,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _commit_of_this_process(root: Path) -> str:
    """As it was at the first of several seeds: somebody may commit while they run."""
    return git_commit(root)


def git_commit(root: Path) -> str:
    """The commit of the code, "+changes" when tracked files differ from it, "none" outside a repository."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return "none"
    return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    """Of Python and of every distribution that this process has imported something of until now."""
    return {"python": platform.python_version(), **imported_versions()}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
