"""How long a run takes: every phase, its work beside the steps, the evaluation, saving; in hours and in sessions.

What is predicted comes from `repro_tools.memory.cost` and `repro_tools.memory.roofline` and is a range. What was measured takes its place: a step's time from a
record of a run, or from a small file, on the same device; on another one it is scaled by the ratio of the two predictions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repro.config import RunConfig
from repro.errors import BadInput
from repro.method import Method
from repro.phases import Networks, Phase
from repro.runtime import Runtime, machine
from repro_tools.memory.cost import Cost, step_cost
from repro_tools.memory.devices import Device, find
from repro_tools.memory.fake import Rehearsal, fake_tensors, networks, reported_as
from repro_tools.memory.measured import LEAST_STEPS, Measured, is_too_short, shaping
from repro_tools.memory.roofline import NOTHING, Range, Speeds, predict
from repro_tools.memory.words import count, in_words

DISK_BYTES_S = 100e6
"""Bytes of a checkpoint that get onto the disk in a second, with its checksum and the wait for the disk. Measured here, four times 428 MB on a
virtual disk of a busy machine: 78 to 121 MB/s."""

TRAINER = Range(0.2e-3, 0.25e-3, 0.5e-3)
"""Seconds of the trainer for each step: seeding, the generator, the bar, moving the minibatch. Measured here on one core: a step of a phase with
almost nothing to compute took 0.30 ms at least, the same without the trainer 0.09. What `minibatch` itself does is not in it."""

SCALING = 1.3
"""Factor either way by which a measured time may be off when it is carried over to another device (assumed)."""

SESSION_PART = 0.1
"""The part of a session that a kill may cost; more between two saved states is warned of."""

SAVING_PART, SAVING_S = 0.05, 60.0
"""The part of the time that saving may take, and the seconds of it in all that are not worth a word; more is warned of."""


@dataclass(frozen=True)
class PartCost:
    """Something that is done `times` times, and what it costs once."""

    name: str
    times: int
    cost: Cost


@dataclass(frozen=True)
class PhaseCost:
    """What a phase costs, whatever the device: its step first, then its other work; so the evaluation, without a step.

    precision: of its float32 products, float32 or tf32. state_bytes: of a saved state: network, optimiser, average of the weights.
    section: its part of the configuration, as far as it shapes a step.
    """

    name: str
    parts: tuple[PartCost, ...]
    precision: str
    state_bytes: int
    section: Mapping[str, Any]


def cost_of_phase(phase: Phase, before: Sequence[Phase], config: RunConfig, *, on_a_gpu: bool = True) -> PhaseCost:
    """Records a step and the other work of a fresh `phase` on fake tensors. Raises CannotRehearse where it does not run so.

    on_a_gpu: as PyTorch does the step there: autocast leaves more in float32, and the optimiser updates all weights at once.
    """
    what = f"phase {phase.name}"
    with reported_as(what):
        others = tuple(phase.work())
    with fake_tensors(), reported_as(what):
        rehearsal = (Rehearsal if on_a_gpu else _OnACPU)(phase, networks(before))
        rehearsal.draw()
        rehearsal(0)
        parts = [PartCost("step", phase.steps, step_cost(lambda: rehearsal(1)))]
        parts += [PartCost(one.name, one.times, step_cost(one.run)) for one in others]
        held = [rehearsal.model.state_dict(), rehearsal.optimiser.state_dict()["state"]]
        held += [] if rehearsal.average is None else [rehearsal.average.state_dict()]
        state_bytes = sum(tensor.nbytes for tensor in _tensors(held))
    precision = phase.precision if phase.precision == "tf32" else "float32"
    return PhaseCost(
        phase.name, tuple(parts), precision, state_bytes, shaping(config.model_dump(mode="json"), phase.name)
    )


class _OnACPU(Rehearsal):
    """The step as PyTorch does it on a CPU."""

    def __init__(self, phase: Phase, earlier: Mapping[str, Networks]):
        super().__init__(phase, earlier)
        for group in self.optimiser.param_groups:
            group["foreach"] = None

    def differences(self) -> AbstractContextManager:
        return nullcontext()


def cost_of_evaluation(
    method: Method, config: RunConfig, phases: Sequence[Phase], runtime: Runtime
) -> PhaseCost | None:
    """The same of an evaluation; None where the method says nothing about it."""
    tensors = fake_tensors()
    with tensors, reported_as("evaluation"):
        models = networks(phases)
    with reported_as("evaluation"):
        work = tuple(method.evaluation_work(config, models, runtime))
    if not work:
        return None
    with tensors, torch.no_grad(), reported_as("evaluation"):
        parts = [PartCost(one.name, one.times, step_cost(one.run)) for one in work]
    return PhaseCost("evaluation", tuple(parts), "float32", 0, {})


@dataclass(frozen=True)
class PartTime:
    """Seconds of one call of a part, and whether they were measured."""

    name: str
    times: int
    once: Range
    basis: str

    @property
    def seconds(self) -> Range:
        return self.once * self.times


@dataclass(frozen=True)
class PhaseTime:
    """The time of a phase or of the evaluation on a device. save_s: seconds of saving a state once; every: steps between two.

    used: what of it was measured. passed_over: measured steps that say nothing here, and why.
    """

    name: str
    parts: tuple[PartTime, ...]
    state_bytes: int
    every: int | None
    used: tuple[Measured, ...] = ()
    passed_over: tuple[tuple[Measured, str], ...] = ()

    @property
    def save_s(self) -> float:
        return self.state_bytes / DISK_BYTES_S

    @property
    def saving(self) -> Range:
        """Seconds of saving in all."""
        saves = self.parts[0].times // self.every if self.every and self.state_bytes else 0
        return Range(1.0, 1.0, 1.0) * (saves * self.save_s)

    @property
    def seconds(self) -> Range:
        """In all; what was measured has the saving in it."""
        if not self.parts:
            return NOTHING
        own = sum((part.seconds for part in self.parts), NOTHING)
        return own if self.parts[0].basis.startswith("measured") else own + self.saving

    @property
    def hours(self) -> Range:
        return self.seconds * (1 / 3600)


def time_of(
    found: PhaseCost,
    device: Device | Speeds,
    every: int | None,
    experiment: str = "",
    measured: Sequence[Measured] = (),
) -> PhaseTime:
    """The time of a phase on a device. Raises BadInput when the device has no hardware for its precision.

    every: steps between two saved states, None where nothing is saved. measured: what `read_measured` found; what was measured of another
    step, over too few of them, or on a device that is not known here, is passed over.
    """
    parts = [
        PartTime(
            one.name,
            one.times,
            predict(one.cost, device, found.precision) + (TRAINER if one.name == "step" else NOTHING),
            _basis(device),
        )
        for one in found.parts
    ]
    own = [one for one in measured if (one.experiment, one.phase) == (experiment, found.name)]
    passed_over = tuple((one, reason) for one in own if (reason := _why_not(one, found, device)))
    fitting = [one for one in own if not _why_not(one, found, device)]
    used: tuple[Measured, ...] = ()
    if fitting and parts and parts[0].name == "step":
        once, basis, used = _carried(fitting, found, device, parts[0].once)
        parts[0] = PartTime("step", parts[0].times, once, basis)
    return PhaseTime(found.name, tuple(parts), found.state_bytes, every, used, passed_over)


def sessions(hours: Range, session_hours: float) -> tuple[int, int, int]:
    """How many sessions the hours take: at least, likely, at most."""
    low, likely, high = (max(1, math.ceil(one / session_hours)) for one in (hours.low, hours.likely, hours.high))
    return low, likely, high


def warnings_of(times: PhaseTime, session_hours: float | None) -> list[str]:
    """What the pace of saving costs, where it costs too much, a line each."""
    step = times.parts[0].once if times.parts and times.parts[0].name == "step" else None
    if step is None or not times.every or step.likely <= 0:
        return []
    lines, between = [], times.every * step.high
    if (
        session_hours is not None
        and min(times.every, times.parts[0].times) * step.high > SESSION_PART * session_hours * 3600
    ):
        fitting = max(1, int(SESSION_PART * session_hours * 3600 / step.high))
        lines.append(
            f"{times.name}: up to {in_words(between)} between two saved states, more than a tenth of a session of "
            f"{session_hours:g} h; --set pace.checkpoint_every={fitting}"
        )
    part = times.save_s / (times.save_s + times.every * step.likely)
    if part > SAVING_PART and times.saving.likely > SAVING_S:
        fitting = math.ceil(times.save_s * (1 / SAVING_PART - 1) / step.likely)
        lines.append(
            f"{times.name}: saving {times.state_bytes / 1e6:.0f} MB every {times.every} steps takes {part:.0%} of the time at "
            f"{DISK_BYTES_S / 1e6:.0f} MB/s; --set pace.checkpoint_every={fitting}"
        )
    return lines


def _why_not(one: Measured, found: PhaseCost, device: Device | Speeds) -> str:
    """Why a measured step says nothing about this phase here; empty where it does."""
    if not _is_device(one, device) and _sheet(one.device) is None:
        return f"measured on {one.device}" + (
            f", {count(one.threads, 'thread')}" if isinstance(device, Speeds) and one.threads else ""
        )
    if one.steps is not None and found.parts and is_too_short(one.steps, found.parts[0].times):
        return f"fewer than {LEAST_STEPS} steps"
    if one.section and dict(one.section) != dict(found.section):
        return "another setting of the phase"
    return ""


def _carried(
    own: Sequence[Measured], found: PhaseCost, device: Device | Speeds, here: Range
) -> tuple[Range, str, tuple[Measured, ...]]:
    """The measured time on `device`, what it rests on, and what of `own` was used.

    Of several records the median; those of the device itself first, else the first, scaled.
    """
    direct = tuple(one for one in own if _is_device(one, device))
    if direct:
        seconds = [one.seconds for one in direct]
        middle = Range(min(seconds), statistics.median(seconds), max(seconds))
        return middle, f"measured, {count(len(direct), 'record')}", direct
    one, sheet = own[0], find(own[0].device)
    there = predict(found.parts[0].cost, sheet, found.precision)
    ratios = sorted((here.low / there.low, here.likely / there.likely, here.high / there.high))
    likely = here.likely / there.likely
    scaled = Range(ratios[0] / SCALING, likely, ratios[2] * SCALING) * one.seconds
    return scaled, f"scaled from {sheet.name}, measured", (one,)


def _is_device(one: Measured, device: Device | Speeds) -> bool:
    if isinstance(device, Speeds):
        here = machine(torch.device("cpu"))
        return (one.device, one.threads) == (here["device"], here["threads"])
    sheet = _sheet(one.device)
    return sheet is not None and sheet.name == device.name


def _sheet(name: str) -> Device | None:
    try:
        return find(name)
    except BadInput:
        return None


def _basis(device: Device | Speeds) -> str:
    return "probes of this machine" if isinstance(device, Speeds) else "data sheet"


def _tensors(held: object) -> Iterable[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for one in held.values():
            yield from _tensors(one)
    elif isinstance(held, (list, tuple)):
        for one in held:
            yield from _tensors(one)
