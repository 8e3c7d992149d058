"""What `repro memory` prints, found: the footprints of an experiment, what is too large for a device, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from repro.config import Change, RunConfig, load
from repro.method import Project
from repro.phases import Phase
from repro.runtime import Runtime
from repro_tools.memory.devices import Device
from repro_tools.memory.fake import CPU, CannotRehearse
from repro_tools.memory.fitting import Divided, Smaller, more_micro_batches, smaller_minibatch
from repro_tools.memory.footprint import Footprint, Part, needed, of_evaluation, of_phase
from repro_tools.parts import WHOLE

RUNTIME = Runtime(CPU)


@dataclass(frozen=True)
class Planned:
    """An experiment with its overrides."""

    project: Project
    experiment: str
    overrides: list[str]
    config: RunConfig
    changes: list[Change]

    @classmethod
    def read(cls, project: Project, experiment: str, overrides: list[str]) -> Planned:
        """Raises BadInput for a configuration or overrides that cannot be used."""
        path = project.experiments()[experiment]
        config, changes = load(project.config_class(experiment), path, overrides)
        return cls(project, experiment, overrides, config, changes)

    def phases(self) -> list[Phase]:
        """Fresh phases."""
        return list(self.project.method.phases(self.config, RUNTIME))


@dataclass(frozen=True)
class Estimate:
    """The footprints of an experiment's phases and evaluation; a line for each that could not be found."""

    planned: Planned
    footprints: tuple[Footprint, ...]
    failures: tuple[str, ...]


def estimate(planned: Planned, processes: int = 1, micro_batches: Mapping[str, int] = WHOLE) -> Estimate:
    """Rehearses every phase and the evaluation of an experiment. `micro_batches`: as `Runtime` takes them."""
    divided = Runtime(CPU, micro_batches=micro_batches).micro_batches_of
    footprints, failures = [], []
    for index, phase in enumerate(planned.phases()):
        try:
            before, count = planned.phases()[:index], divided(phase.name)
            footprints.append(of_phase(phase, before, processes=processes, micro_batches=count))
        except CannotRehearse as error:
            failures.append(str(error))
    try:
        evaluation = of_evaluation(planned.project.method, planned.config, planned.phases(), RUNTIME)
        footprints += [evaluation] if evaluation else []
    except CannotRehearse as error:
        failures.append(str(error))
    return Estimate(planned, tuple(footprints), tuple(failures))


@dataclass(frozen=True)
class Advice:
    """What to do about a part that does not fit: micro-batches, and another minibatch, or a line that says why that is no way.

    `divided` is None for what is no training step.
    """

    device: Device
    estimate: Estimate
    phase: str
    part: Part
    divided: Divided | str | None
    way: Smaller | str


def ways_to_fit(found: Estimate, device: Device, processes: int) -> Iterator[Advice]:
    planned, room = found.planned, device.room_bytes
    for one in found.footprints:
        step, others = (one.parts[0], one.parts[1:]) if one.rows else (None, one.parts)
        if step is not None and needed(one, step, processes) > room:
            divided = more_micro_batches(planned.phases, one, room, processes)
            way = smaller_minibatch(planned.project, planned.experiment, planned.overrides, one, room, processes)
            yield Advice(device, found, one.name, step, divided, way)
        large = [part for part in others if needed(one, part, processes) > room]
        if large:
            largest = max(large, key=lambda part: part.peak.in_blocks)
            more = f" ({len(large) - 1} more like it)" if len(large) > 1 else ""
            way = f"no training step{more}; make what it handles at a time smaller in the configuration"
            yield Advice(device, found, one.name, largest, None, way)


def fits(found: Estimate, device: Device, processes: int) -> bool:
    return not too_large(found, device, processes)


def too_large(found: Estimate, device: Device, processes: int) -> list[str]:
    return [
        one.name
        for one in found.footprints
        if any(needed(one, part, processes) > device.room_bytes for part in one.parts)
    ]
