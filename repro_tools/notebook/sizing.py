"""How many sessions a run takes: seconds of each phase, with where they come from, cut into sessions of so many hours.

Times are measured where a record of the same phase on the same device exists, or given, or estimated from the operations of a step
(a range: what is planned with is its likely value), or unknown. Nothing here is a promise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from repro.config import RunConfig, flatten
from repro.errors import BadInput
from repro.method import Project
from repro.phases import Phase
from repro.runtime import Runtime
from repro_tools.memory.devices import find
from repro_tools.memory.measured import LEAST_STEPS, is_too_short, micro_batches_of, step_of
from repro_tools.memory.roofline import NOTHING
from repro_tools.memory.words import count, in_words

EVALUATION = "evaluation"


@dataclass(frozen=True)
class Timing:
    """Seconds of a phase's step and of building what it trains on; of the evaluation in `prepare_s` alone, with a step of 0.

    `step_s` is None where nobody knows. `origin` says where the numbers come from, in words. `low` and `high`: how much less or
    more it may be, as factors of both; 1 where it was measured. `saving_s` of saving, spread over the steps; in a measured step already.
    """

    step_s: float | None
    prepare_s: float
    origin: str
    low: float = 1.0
    high: float = 1.0
    saving_s: float = 0.0

    @property
    def pace_s(self) -> float:
        """Seconds from one step to the next."""
        return (self.step_s or 0.0) + self.saving_s


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
    """The timing of every phase and of the evaluation (EVALUATION) on `device`, a name of `repro_tools.memory.devices`.

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
        timing, short = _measured(phase, config, records, device, runtime.micro_batches_of(phase.name))
        if timing is None or phase.name in given:
            timing = _estimated(phase, number, project, config, runtime, device)
            if runtime.micro_batches_of(phase.name) > 1 and timing.step_s is not None:
                timing = replace(timing, origin=f"{timing.origin}; of whole minibatches, in parts it takes longer")
            if short:
                passed_over = f"{count(short, 'run')} of fewer than {LEAST_STEPS} steps passed over"
                timing = replace(timing, origin=f"{timing.origin}; {passed_over}")
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
            least = one.prepare_s + one.pace_s
            if least > session_s:
                raise BadInput(
                    f"{name}: found {in_words(least)} that cannot be cut, expected at most {in_words(session_s)}, a session's"
                )
            while True:
                if clock + least > session_s:
                    session, clock = session + 1, 0.0
                fits = steps - done
                if one.pace_s > 0:
                    fits = min(fits, math.floor((session_s - clock - one.prepare_s) / one.pace_s))
                seconds = one.prepare_s + fits * one.pace_s
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
    try:
        return find(driver_name).name == device
    except BadInput:
        return False


def _measured(
    phase: Phase, config: RunConfig, records: Sequence[dict], device: str, divided: int
) -> tuple[Timing | None, int]:
    """From records of the same phase in as many micro-batches, whose number of steps may differ; and how many were passed over for having too few."""
    steps, prepares, short = [], [], 0
    own = _own(config.model_dump(mode="json"), phase.name)
    for record in records:
        comparable = _own(record["config"], phase.name) == own and micro_batches_of(record, phase.name) == divided
        if comparable and phase.name in record["wall_s"]:
            step_s, done = step_of(record, phase.name)
            if is_too_short(done, phase.steps):
                short += 1
                continue
            steps.append(step_s)
            processes = len(record.get("sessions", {}).get(phase.name, [None]))  # each of them prepared
            prepares.append(record["prepare_s"].get(phase.name, 0.0) / processes)
    if not steps:
        return None, short
    return Timing(median(steps), median(prepares), f"measured on {device}, {count(len(steps), 'run')}"), short


def _own(config: dict[str, Any], phase: str) -> dict[str, Any]:
    """What decides about the time of a phase's step: its section, and all that belongs to no phase, without what only shapes results."""
    rest = {key: value for key, value in config.items() if key not in ("phases", "pace", "evaluation")}
    section = {key: value for key, value in config["phases"].get(phase, {}).items() if key != "iterations"}
    return flatten({"rest": rest, "section": section})


def _estimated(phase: Phase, number: int, project: Project, config: RunConfig, runtime: Runtime, device: str) -> Timing:
    from repro_tools.memory.duration import cost_of_phase, time_of
    from repro_tools.memory.fake import CannotRehearse

    try:
        before = list(project.method.phases(config, runtime))[:number]
        found = time_of(cost_of_phase(phase, before, config), find(device), config.pace.checkpoint_every)
    except (BadInput, CannotRehearse) as error:
        return Timing(None, 0.0, f"unknown: {error}")
    step, others = found.parts[0], found.parts[1:]
    prepare = sum((one.seconds for one in others), NOTHING)
    in_all = found.seconds
    origin = f"estimated for {device}, {in_words(step.once.low)} to {in_words(step.once.high)}; not measured"
    return Timing(
        step.once.likely,
        prepare.likely,
        origin,
        in_all.low / in_all.likely,
        in_all.high / in_all.likely,
        found.saving.likely / step.times,
    )


def _evaluation(project: Project, config: RunConfig, runtime: Runtime, device: str, records: Sequence[dict]) -> Timing:
    from repro_tools.memory.duration import cost_of_evaluation, time_of
    from repro_tools.memory.fake import CannotRehearse

    own = flatten(
        {key: value for key, value in config.model_dump(mode="json").items() if key not in ("phases", "pace")}
    )
    same = [
        record
        for record in records
        if flatten({key: value for key, value in record["config"].items() if key not in ("phases", "pace")}) == own
    ]
    if same:
        seconds = median(record["wall_s"]["evaluate"] for record in same)
        return Timing(0.0, seconds, f"measured on {device}, {count(len(same), 'run')}")
    try:
        cost = cost_of_evaluation(project.method, config, list(project.method.phases(config, runtime)), runtime)
        found = None if cost is None else time_of(cost, find(device), None).seconds
    except (BadInput, CannotRehearse) as error:
        return Timing(0.0, 0.0, f"unknown, not counted: {error}")
    if found is None or not found.likely:
        return Timing(0.0, 0.0, "unknown, not counted")
    span = f"{in_words(found.low)} to {in_words(found.high)}"
    origin = f"estimated for {device}, {span}; what the host computes is not counted"
    return Timing(0.0, found.likely, origin, found.low / found.likely, found.high / found.likely)
