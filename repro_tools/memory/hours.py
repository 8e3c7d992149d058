"""What `repro memory` says of time: milliseconds a step, hours a phase, sessions in all."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repro.config import RunConfig
from repro.errors import BadInput
from repro.method import Project
from repro.runtime import Runtime, machine
from repro_tools.arguments import hours
from repro_tools.memory.devices import HERE, Device, called, find
from repro_tools.memory.duration import (
    PhaseCost,
    PhaseTime,
    cost_of_evaluation,
    cost_of_phase,
    sessions,
    time_of,
    warnings_of,
)
from repro_tools.memory.fake import CannotRehearse
from repro_tools.memory.host import available_host_bytes
from repro_tools.memory.measured import Measured, read_measured
from repro_tools.memory.roofline import NOTHING, Range, Speeds
from repro_tools.memory.this_machine import measure
from repro_tools.memory.words import count, in_hours
from repro_tools.spec import Spec, load_spec
from repro_tools.table import listed, wrapped

EVALUATION = "evaluation"
"""The name of what comes after the phases."""

STARTING = "starting a run (Python's imports and the method took 5 s here on a busy CPU) and its first step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options about time, beside those of the command."""
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="PATH",
        help="records of runs, a folder of them, or a YAML file with seconds per step; they take the place of what is predicted",
    )
    parser.add_argument(
        "--session-hours",
        type=hours,
        metavar="H",
        help="how long one session lasts (default: the spec's budget, or not said)",
    )


def devices_named(names: Sequence[str]) -> list[Device]:
    """The devices, `this` among them. Raises BadInput for a name that is not known."""
    return [this_device() if name == HERE else find(name) for name in names]


def this_device() -> Device:
    """The CPU at hand as a device: its memory is what is available now; its speed is measured when it is asked for."""
    said = machine(torch.device("cpu"))
    threads = torch.get_num_threads()
    return Device(
        HERE,
        round(said["memory_gib"] * 2**30),
        available_host_bytes(),
        0.0,
        {name: 0.0 for name in ("float32", "tf32", "bf16", "fp16")},
        f"{said['processor']}, {threads} thread{'s' * (threads > 1)}; memory: what is available now",
    )


@dataclass(frozen=True)
class Planned:
    """An experiment whose time is asked for: its configuration, and how to make its phases anew."""

    project: Project
    experiment: str
    config: RunConfig

    def costs(self, on_a_gpu: bool) -> tuple[list[PhaseCost], dict[str, str]]:
        """What the phases and the evaluation cost, and by its name a line for each that cannot be rehearsed."""
        runtime = Runtime(torch.device("cpu"))
        found, failures = [], {}

        def phases() -> list:
            return list(self.project.method.phases(self.config, runtime))

        for index, phase in enumerate(phases()):
            try:
                found.append(cost_of_phase(phase, phases()[:index], self.config, on_a_gpu=on_a_gpu))
            except CannotRehearse as error:
                failures[phase.name] = str(error)
        try:
            evaluation = cost_of_evaluation(self.project.method, self.config, phases(), runtime)
            found += [evaluation] if evaluation else []
        except CannotRehearse as error:
            failures[EVALUATION] = str(error)
        return found, failures


@dataclass(frozen=True)
class ExperimentTime:
    """The times of an experiment on a device. missing: by phase a line about why it has no time."""

    experiment: str
    phases: tuple[PhaseTime, ...]
    missing: Mapping[str, str]
    seeds: int

    @property
    def of_a_seed(self) -> Range | None:
        """None where a phase has no time: the sum of the others is no estimate of the whole."""
        return None if self.missing else sum((one.hours for one in self.phases), NOTHING)

    @property
    def in_all(self) -> Range | None:
        return None if self.of_a_seed is None else self.of_a_seed * self.seeds

    @property
    def lines(self) -> list[str]:
        """What the page says of the missing ones."""
        return [f"{self.experiment} {line}" for line in self.missing.values()]


@dataclass(frozen=True)
class Times:
    """The times of several experiments on several devices."""

    plans: Sequence[Planned]
    devices: Sequence[Device]
    measured: Sequence[Measured]
    session_hours: float | None
    seeds: int
    budget: tuple[str, float] | None
    _costs: dict = field(default_factory=dict)  # what was recorded and measured so far

    @classmethod
    def of(cls, plans: Sequence[Planned], devices: Sequence[Device], options: argparse.Namespace) -> Times:
        """Raises BadInput for measured times that cannot be read."""
        spec = _spec(plans)
        budget = spec.budget if spec else None
        session_hours = options.session_hours or (budget.session_hours if budget else None)
        measured = read_measured(options.measured) if options.measured else []
        seeds = len(spec.seeds) if spec else 1
        return cls(plans, devices, measured, session_hours, seeds, (budget.device, budget.hours) if budget else None)

    def on(self, device: Device) -> list[ExperimentTime]:
        """Of every experiment on that device."""
        here = device.name == HERE
        target = self._here() if here else device
        return [self._of(plan, target, on_a_gpu=not here) for plan in self.plans]

    def _here(self) -> Speeds:
        """Measured once, and only when it is asked for: it takes some seconds."""
        if HERE not in self._costs:
            self._costs[HERE] = measure().speeds
        return self._costs[HERE]

    def _of(self, plan: Planned, device: Device | Speeds, on_a_gpu: bool) -> ExperimentTime:
        key = (plan.experiment, on_a_gpu)
        if key not in self._costs:
            self._costs[key] = plan.costs(on_a_gpu)
        costs, failures = self._costs[key]
        phases, missing, every = [], dict(failures), plan.config.pace.checkpoint_every
        for cost in costs:
            saves = every if cost.state_bytes else None
            try:
                phases.append(time_of(cost, device, saves, plan.experiment, self.measured))
            except BadInput as error:
                missing[cost.name] = f"{cost.name}: {error}"
        return ExperimentTime(plan.experiment, tuple(phases), missing, self.seeds)

    def page(self, told: Collection[str] = ()) -> str:
        """For people: every phase on one device, or every device in one line. `told`: lines that stand above it already."""
        return _one_device(self, self.devices[0], told) if len(self.devices) == 1 else _all_devices(self, told)

    def as_json(self) -> dict[str, Any]:
        """The same for programs; ranges as [low, likely, high]."""
        return {
            "seeds": self.seeds,
            "session_hours": self.session_hours,
            "measured": _told(self, [one for device in self.devices for one in self.on(device)]),
            "devices": {
                device.name: {one.experiment: _experiment_json(one, self.session_hours) for one in self.on(device)}
                for device in self.devices
            },
        }


def _spec(plans: Sequence[Planned]) -> Spec | None:
    path = plans[0].project.spec if plans else None
    return load_spec(path) if path is not None and path.exists() else None


def _one_device(times: Times, device: Device, told: Collection[str]) -> str:
    rows, notes, found = [], [], times.on(device)
    longest = max((phase.hours.high for one in found for phase in one.phases), default=0.0)
    unit, per_hour = ("hours", 1.0) if longest >= 1 else ("min", 60.0)
    for one in found:
        if one.phases:
            rows.append([one.experiment])
        for phase in one.phases:
            rows += _rows_of(phase, per_hour)
            notes += [f"{one.experiment} {line}" for line in warnings_of(phase, times.session_hours)]
        notes += [line for line in one.lines if line not in told]
        if one.in_all is not None:
            label = "  in all" + (f", {one.seeds} seeds" if one.seeds > 1 else "")
            rows.append([label, "", "", _amount(one.in_all * per_hour), ""])
    header = ["time: likely (low to high)", "times", "ms", unit, "from"]
    lines = [
        *([_table(header, rows), ""] if rows else []),
        *_sums(times, device, found),
        *_legend(device, found),
        *_told(times, found),
        *notes,
    ]
    return "\n".join(lines)


def _rows_of(phase: PhaseTime, per_hour: float) -> Iterator[list[str]]:
    in_all = _amount(phase.hours * per_hour)
    step = phase.parts[0] if phase.parts and phase.parts[0].name == "step" else None
    if step is None:
        yield [f"  {phase.name}", "", "", in_all, ""]
    else:
        yield [f"  {phase.name}", f"{step.times:,}", _text(step.once * 1e3), in_all, step.basis]
    for part in phase.parts[0 if step is None else 1 :]:
        own = _amount(part.seconds * (per_hour / 3600))
        yield [f"    of it {part.name}", f"{part.times:,}", _text(part.once * 1e3), own, ""]


def _what(times: Times) -> str:
    return f"{count(len(times.plans), 'experiment')}, {count(times.seeds, 'seed')}"


def _sums(times: Times, device: Device, found: Sequence[ExperimentTime]) -> Iterator[str]:
    what, total = f"{_what(times)} on {called(device.name)}", _total(found)
    if total is None:
        yield from wrapped(f"{what}: no total: {_without_time(found)}", "  ")
        return
    yield f"{what}: {_span_text(total)}{_sessions_text(total, times.session_hours)}"
    if times.budget is not None and times.budget[0].lower() == device.name.lower():
        hours = times.budget[1]
        verdict = "within" if total.high <= hours else "likely within" if total.likely <= hours else "over"
        yield f"The budget is {in_hours(hours)} on {called(times.budget[0])}: {verdict}"


def _total(found: Sequence[ExperimentTime]) -> Range | None:
    """None where a phase of an experiment has no time."""
    hours = [one.in_all for one in found if one.in_all is not None]
    return sum(hours, NOTHING) if len(hours) == len(found) else None


def _without_time(found: Sequence[ExperimentTime]) -> str:
    """What has no time, which is why there is no total."""
    parts = []
    for one in (one for one in found if one.missing):
        phases = [name for name in one.missing if name != EVALUATION]
        names = [f"phase{'s' * (len(phases) > 1)} {', '.join(phases)}"] if phases else []
        names += ["the evaluation"] if EVALUATION in one.missing else []
        parts.append(" and ".join(names) + (f" of {one.experiment}" if len(found) > 1 else ""))
    return f"{'; '.join(parts)} could not be estimated"


def _sessions_text(total: Range, session_hours: float | None) -> str:
    if session_hours is None:
        return ""
    low, likely, high = sessions(total, session_hours)
    span = "" if low == likely == high else f" ({low:,} to {high:,})"
    return f"; {likely:,}{span} session{'s' * (high > 1)} of {session_hours:g} h"


def _legend(device: Device, found: Sequence[ExperimentTime]) -> Iterator[str]:
    bases = [part.basis for one in found for phase in one.phases for part in phase.parts]
    if not bases:
        return
    if all(basis.startswith("measured") for basis in bases):
        yield "Every time was measured on this device."
        yield f"Not in it: {STARTING}, waiting for a session."
        return
    what = "What is not marked as measured is an estimate" if any("measured" in one for one in bases) else "An estimate"
    if device.name == HERE:
        yield f"{what} from probes of this machine. Steps of models that nothing was fitted to"
        yield "lay within a factor of 1.5 of it."
    else:
        yield f"{what} from a data sheet and assumed shares of its peaks: nothing of it was measured on"
        yield "a GPU. Plan with the upper end. A hundred real steps on the device are worth more: give their record, or their"
        yield "seconds, with --measured."
    yield f"Not in it: {STARTING},"
    yield "reading and drawing data, compiling, waiting for a session, a device that throttles."


def _told(times: Times, found: Sequence[ExperimentTime]) -> list[str]:
    """Where the measured times that were used come from, and a line for every reason why others were not."""
    phases = [phase for one in found for phase in one.phases]
    used = sorted({one.source for phase in phases for one in phase.used})
    folders = Counter(str(_folder(Path(source))) for source in used)
    named = [f"{folder} ({count(files, 'file')})" for folder, files in folders.items()]
    lines = [f"Measured times are from {listed(named)}"] if named else []
    reasons: dict[str, set[tuple[str, str]]] = {}
    for one, reason in (pair for phase in phases for pair in phase.passed_over):
        reasons.setdefault(reason, set()).add((one.source, one.phase))
    asked = {plan.experiment for plan in times.plans}
    others = [one for one in times.measured if one.experiment not in asked]
    if others:
        experiments = listed(sorted({one.experiment for one in others}))
        reasons[f"of other experiments: {experiments}"] = {(one.source, one.phase) for one in others}
    for reason, passed_over in reasons.items():
        records = count(len({source for source, _ in passed_over}), "record")
        whole = reason.startswith(("measured on", "of other experiments"))
        what = records if whole else f"{count(len(passed_over), 'phase')} of {records}"
        lines.append(f"{what} passed over: {reason}")
    return [line for text in lines for line in wrapped(text, "  ")]


def _folder(source: Path) -> Path:
    """What holds the runs of an experiment, or the file itself where it is no record."""
    if source.suffix != ".json":
        return source
    return source.parent.parent if source.parent.name.startswith("seed-") else source.parent


def _all_devices(times: Times, told: Collection[str]) -> str:
    rows: list[list[str]] = []
    everything: list[ExperimentTime] = []
    notes: dict[str, None] = {}
    for device in times.devices:
        found = times.on(device)
        everything += found
        notes |= dict.fromkeys(line for one in found for line in one.lines if line not in told)
        total = _total(found)
        if total is None:
            rows.append([device.name, "", "", f"no total: {_without_time(found)}"])
        else:
            sessions_text = _sessions_text(total, times.session_hours).lstrip("; ")
            rows.append([device.name, _span_text(total), sessions_text, ""])
    reasons = {row[-1] for row in rows}
    if len(reasons) == 1 and "" not in reasons:
        lines = wrapped(f"{_what(times)} on any of these devices: {reasons.pop()}", "  ")
    else:
        lines = [_table([f"time: {_what(times)}", "likely (low to high)", "", ""], rows), ""]
    return "\n".join([*lines, *_legend(times.devices[0], everything), *_told(times, everything), *notes])


def _experiment_json(one: ExperimentTime, session_hours: float | None) -> dict[str, Any]:
    def three(found: Range | None) -> list[float] | None:
        return None if found is None else [found.low, found.likely, found.high]

    return {
        "phases": {
            phase.name: {
                "parts": [
                    {"name": part.name, "times": part.times, "seconds": three(part.once), "from": part.basis}
                    for part in phase.parts
                ],
                "hours": three(phase.hours),
                "state_bytes": phase.state_bytes,
                "save_s": phase.save_s,
                "warnings": warnings_of(phase, session_hours),
            }
            for phase in one.phases
        },
        "missing": list(one.missing.values()),
        "no_total": _without_time([one]) if one.missing else None,
        "hours_of_a_seed": three(one.of_a_seed),
        "hours": three(one.in_all),
        "sessions": None if session_hours is None or one.in_all is None else list(sessions(one.in_all, session_hours)),
    }


def _amount(span: Range) -> str:
    return "<0.01" if span.high < 0.01 else _text(span)


def _span_text(hours: Range) -> str:
    return f"{_text(hours)} h" if hours.high >= 1 else f"{_text(hours * 60)} min"


def _text(found: Range) -> str:
    low, likely, high = map(_short, (found.low, found.likely, found.high))
    return likely if low == likely == high else f"{likely} ({low} to {high})"


def _short(number: float) -> str:
    """Two digits that count, none after the point from ten on."""
    if 0 < number < 0.01:
        return "<0.01"
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.1f}" if number >= 0.995 else f"{number:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that are as wide as they must be, all but the first and the last to the right."""
    whole = [header, *rows]
    widths = [max(len(row[column]) for row in whole if len(row) > max(1, column)) for column in range(len(header))]
    widths[0] = min(widths[0], 52)
    lines = []
    for row in whole:
        first = row[0] if len(row[0]) <= widths[0] or len(row) == 1 else row[0][: widths[0] - 3] + "..."
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *middle, *row[-1:][: len(row) - 1]]).rstrip())
    return "\n".join(lines)
