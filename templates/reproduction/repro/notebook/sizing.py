"""How many sessions a run takes: seconds of each phase, with where they come from, cut into sessions of so many hours.

Times are measured where a record of the same phase on the same device exists, or given, or estimated from the operations of a step
(a range: what is planned with is its likely value), or unknown. Nothing here is a promise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from repro.config import RunConfig, flatten
from repro.errors import BadInput
from repro.method import Project
from repro.phases import Phase
from repro.runtime import Runtime

EVALUATION = "evaluation"


@dataclass(frozen=True)
class Timing:
    """Seconds of a phase's step and of building what it trains on; of the evaluation in `prepare_s` alone, with a step of 0.

    `step_s` is None where nobody knows. `origin` says where the numbers come from, in words. `low` and `high`: how much less or
    more it may be, as factors of both; 1 where it was measured.
    """

    step_s: float | None
    prepare_s: float
    origin: str
    low: float = 1.0
    high: float = 1.0


@dataclass(frozen=True)
class Part:
    """What one session does of one phase: steps `first` + 1 to `last`; of an evaluation both are 0."""

    session: int
    seed: int
    phase: str
    first: int
    last: int
    seconds: float


def timings(
    project: Project,
    experiment: str,
    config: RunConfig,
    runtime: Runtime,
    device: str,
    runs: Path,
    given: Mapping[str, float],
) -> dict[str, Timing]:
    """The timing of every phase and of the evaluation (EVALUATION) on `device`, a name of `repro.memory.devices`.

    `given` are seconds per step by phase. Raises BadInput for a phase in it that does not exist.
    """
    phases = list(project.method.phases(config, runtime))
    unknown = set(given) - {phase.name for phase in phases}
    if unknown:
        raise BadInput(
            f"--seconds-per-step: found {', '.join(sorted(unknown))}, expected one of: {', '.join(one.name for one in phases)}"
        )
    records = _records(project, experiment, device, runs)
    found = {}
    for number, phase in enumerate(phases):
        timing = _measured(phase, config, records, device)
        if timing is None or phase.name in given:
            timing = _estimated(phase, number, project, config, runtime, device)
        if phase.name in given:
            timing = Timing(given[phase.name], timing.prepare_s, "given")
        found[phase.name] = timing
    found[EVALUATION] = _evaluation(project, config, runtime, device, records)
    return found


def schedule(
    phases: Sequence[tuple[str, int]], timing: Mapping[str, Timing], seeds: Sequence[int], session_s: float
) -> list[Part]:
    """The runs of all seeds, one after the other, cut into sessions in which `session_s` seconds are for the runs.

    What a phase trains on is built again in each session in which it goes on. An evaluation is not cut: it has no states. Raises
    BadInput when something that cannot be cut takes longer than a session, or a time is unknown.
    """
    parts: list[Part] = []
    session, clock = 1, 0.0
    for seed in seeds:
        for name, steps in [*phases, (EVALUATION, 0)]:
            one, done = timing[name], 0
            if one.step_s is None:
                raise BadInput(f"{name}: {one.origin}")
            least = one.prepare_s + one.step_s
            if least > session_s:
                raise BadInput(
                    f"{name}: found {hours(least)} hours that cannot be cut, expected at most {hours(session_s)}, a session's"
                )
            while True:
                if clock + least > session_s:
                    session, clock = session + 1, 0.0
                fits = steps - done
                if one.step_s > 0:
                    fits = min(fits, math.floor((session_s - clock - one.prepare_s) / one.step_s))
                seconds = one.prepare_s + fits * one.step_s
                parts.append(Part(session, seed, name, done, done + fits, seconds))
                clock, done = clock + seconds, done + fits
                if done >= steps:
                    break
                session, clock = session + 1, 0.0
    return parts


def span(parts: Sequence[Part], timing: Mapping[str, Timing]) -> tuple[float, float]:
    """The least and the most seconds that all parts together may take, if every estimate errs the same way."""
    low = sum(part.seconds * timing[part.phase].low for part in parts)
    return low, sum(part.seconds * timing[part.phase].high for part in parts)


def hours(seconds: float) -> str:
    """Hours with two digits, which is more than a plan knows."""
    value = seconds / 3600
    if value < 0.01:
        return "< 0.01"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _records(project: Project, experiment: str, device: str, runs: Path) -> list[dict[str, Any]]:
    """The records of the experiment on such a device, from the runs and from the reports."""
    paths = [
        *runs.glob(f"{experiment}/seed-*/record.json"),
        *(project.reports / "records").glob(f"{experiment}-seed-*.json"),
    ]
    found = []
    for path in sorted(paths):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if _is(device, record["machine"]["device"]) and record["experiment"] == experiment:
                found.append(record)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the report says what is wrong with a record
    return found


def _is(device: str, driver_name: str) -> bool:
    from repro.memory.devices import find

    try:
        return find(driver_name).name == device
    except BadInput:
        return False


def _measured(phase: Phase, config: RunConfig, records: Sequence[dict], device: str) -> Timing | None:
    """From records of the same phase; the number of steps may differ, so that a short run will do."""
    steps, prepares = [], []
    own = _own(config.model_dump(mode="json"), phase.name)
    for record in records:
        if _own(record["config"], phase.name) == own and phase.name in record["wall_s"]:
            done = record["config"]["phases"][phase.name]["iterations"]
            prepare = record["prepare_s"].get(phase.name, 0.0)
            steps.append(max(0.0, record["wall_s"][phase.name] - prepare) / done)
            prepares.append(prepare)
    if not steps:
        return None
    runs = "run" if len(steps) == 1 else "runs"
    return Timing(median(steps), median(prepares), f"measured on {device}, {len(steps)} {runs}")


def _own(config: dict[str, Any], phase: str) -> dict[str, Any]:
    """What decides about the time of a phase's step: its section, and all that belongs to no phase, without what only shapes results."""
    rest = {key: value for key, value in config.items() if key not in ("phases", "pace", "evaluation")}
    section = {key: value for key, value in config["phases"].get(phase, {}).items() if key != "iterations"}
    return flatten({"rest": rest, "section": section})


def _estimated(phase: Phase, number: int, project: Project, config: RunConfig, runtime: Runtime, device: str) -> Timing:
    from repro.memory.cost import step_cost
    from repro.memory.fake import CannotRehearse, Rehearsal, fake_tensors, networks, reported_as

    try:
        work = list(phase.work())
        with fake_tensors(), reported_as(f"phase {phase.name}"):
            rehearsal = Rehearsal(phase, networks(list(project.method.phases(config, runtime))[:number]))
            for step in range(2):  # the first step of Adam makes its state
                rehearsal(step)
            cost = step_cost(lambda: rehearsal(2))
            costs = [(one.times, step_cost(one.run)) for one in work]
        step = _predict(cost, device, phase.options.precision)
        prepare_s = sum(times * _predict(one, device, "float32").likely for times, one in costs)
    except (BadInput, CannotRehearse) as error:
        return Timing(None, 0.0, f"unknown: {error}")
    span = f"{step.low:.2g} to {step.high:.2g} s"
    return Timing(
        step.likely,
        prepare_s,
        f"estimated for {device}, {span}; not measured",
        step.low / step.likely,
        step.high / step.likely,
    )


def _evaluation(project: Project, config: RunConfig, runtime: Runtime, device: str, records: Sequence[dict]) -> Timing:
    from repro.memory.cost import step_cost
    from repro.memory.fake import CannotRehearse, fake_tensors, networks, reported_as

    own = flatten(
        {key: value for key, value in config.model_dump(mode="json").items() if key not in ("phases", "pace")}
    )
    same = [
        record
        for record in records
        if flatten({key: value for key, value in record["config"].items() if key not in ("phases", "pace")}) == own
    ]
    if same:
        return Timing(
            0.0, median(record["wall_s"]["evaluate"] for record in same), f"measured on {device}, {len(same)} runs"
        )
    try:
        with fake_tensors(), reported_as(EVALUATION):
            models = networks(list(project.method.phases(config, runtime)))
            work = list(project.method.evaluation_work(config, models, runtime))
            costs = [(one.times, step_cost(one.run)) for one in work]
        ranges = [_predict(cost, device, "float32") * times for times, cost in costs]
    except (BadInput, CannotRehearse) as error:
        return Timing(0.0, 0.0, f"unknown, not counted: {error}")
    likely = sum(one.likely for one in ranges)
    if not likely:
        return Timing(0.0, 0.0, "unknown, not counted")
    low, high = sum(one.low for one in ranges), sum(one.high for one in ranges)
    origin = f"estimated for {device}, {hours(low)} to {hours(high)} h; what the host computes is not counted"
    return Timing(0.0, likely, origin, low / likely, high / likely)


def _predict(cost, device: str, precision: str):
    from repro.memory.devices import find
    from repro.memory.roofline import predict

    found = find(device)
    if precision == "tf32" and found.peak_flops.get("tf32") is None:
        precision = "float32"  # what PyTorch does on a device without it
    return predict(cost, found, precision)
