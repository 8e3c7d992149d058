"""`repro memory`: device memory and time of every phase, without a GPU, and what to change where it does not fit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

from repro import __main__ as command_line
from repro.errors import EXIT_OK, EXIT_RUN_FAILED
from repro.method import find_project
from repro.phases import SingleLossPhase
from repro.runtime import progress
from repro_tools.memory import hours
from repro_tools.memory.devices import DEVICES, Device
from repro_tools.memory.estimate import Advice, Estimate, Planned, estimate, fits, too_large, ways_to_fit
from repro_tools.memory.fitting import Divided
from repro_tools.memory.footprint import Footprint, Part, allowances, needed
from repro_tools.memory.storages import REST
from repro_tools.own_loop import require_single_loss
from repro_tools.parts import require_phases

GIB, MIB = 2**30, 2**20
WIDTH, NAME_WIDTH = 118, 54
HOURS_OF_ONE_PART = (
    "These hours are those of whole minibatches. Micro-batches take more launches: how much longer was not measured."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Estimates the peak of device memory and the time of every phase, by its real step on tensors without numbers, and of its\n"
        "evaluation. A time is a range.\n"
        "No GPU and no data are needed; nothing is written."
    )
    parser.epilog = "example: repro memory cifar10 --on T4"
    command_line.add(parser, "experiments", **command_line.EVERY)
    parser.add_argument(
        "--on",
        nargs="+",
        default=["all"],
        metavar="DEVICE",
        help="devices to hold it against, by name, `this` for the CPU at hand, or all that are known (default: all)",
    )
    parser.add_argument(
        "--processes",
        type=command_line.positive,
        default=1,
        metavar="N",
        help="processes that share each minibatch, one device each (default: 1)",
    )
    command_line.add(parser, "--micro-batches")
    hours.add_arguments(parser)
    command_line.add(parser, "--set", "--train-iters", "--json")


def command(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    devices = list(DEVICES) if options.on == ["all"] else hours.devices_named(options.on)
    overrides = command_line.overrides(options)
    plans = [Planned.read(project, name, overrides) for name in command_line.names(project, options.experiments)]
    for plan in plans:
        for change in plan.changes:
            print(f"{plan.experiment}: {change}", file=sys.stderr)
    for plan in plans:
        require_single_loss(plan.phases(), plan.experiment)
    require_phases(options.micro_batches, {phase.name for plan in plans for phase in plan.phases()})
    times = hours.Times.of(
        [hours.Planned(plan.project, plan.experiment, plan.config) for plan in plans], devices, options
    )
    divided = options.micro_batches
    found = [estimate(plan, options.processes, divided) for plan in progress(plans, "experiments")]
    advice = [
        way
        for device in (devices if len(devices) == 1 else ())
        for one in found
        for way in ways_to_fit(one, device, options.processes)
    ]
    if options.json:
        print(json.dumps(_as_json(found, devices, advice, options.processes) | {"time": times.as_json()}, indent=1))
    else:
        page = _page(found, devices, advice, options.processes)
        hours_page = times.page(told=[line for one in found for line in _failures(one)])
        print(page, hours_page, *([HOURS_OF_ONE_PART] if _is_divided(found) else []), sep="\n\n")
    rehearsed = not any(one.failures for one in found)
    large_enough = any(all(fits(one, device, options.processes) for one in found) for device in devices)
    return EXIT_OK if rehearsed and large_enough else EXIT_RUN_FAILED


def _page(found: Sequence[Estimate], devices: Sequence[Device], advice: Sequence[Advice], processes: int) -> str:
    device = devices[0] if len(devices) == 1 else None
    parts = []
    if any(one.footprints for one in found):
        parts += [_peaks(found, device, processes), _legend(found, processes)]
        if device is None:
            parts.append(_verdicts(found, devices, processes))
        else:
            parts.append(f"{device.name}: {_gib(device.room_bytes)} GiB usable ({device.source})")
    remarks: dict[str, list[str]] = {}
    for one in found:
        for footprint in one.footprints:
            for line in _remarks(one, footprint, devices):
                remarks.setdefault(line, []).append(f"{one.planned.experiment} {footprint.name}")
    parts += [_wrapped(f"{', '.join(names)}: {line}") for line, names in remarks.items()]
    parts += [line for one in found for line in _failures(one)]
    parts += [_advice(one) for one in advice]
    parts += [line for one in found for line in _together([way for way in advice if way.estimate is one])]
    return "\n\n".join(parts)


def _failures(one: Estimate) -> list[str]:
    return [f"{one.planned.experiment} {line}" for line in one.failures]


def _peaks(found: Sequence[Estimate], device: Device | None, processes: int) -> str:
    small = all(part.peak.total < GIB for one in found for each in one.footprints for part in each.parts)
    unit, per = ("MiB", MIB) if small else ("GiB", GIB)
    header = [
        unit,
        "rows",
        "networks",
        "gradients",
        "optimiser",
        "rest",
        "sum",
        "needed",
        *["fits"] * bool(device),
    ]
    rows = []
    for one in (one for one in found if one.footprints):
        rows.append([one.planned.experiment])
        for footprint in one.footprints:
            for part in _shown(footprint):
                is_step = footprint.rows and part is footprint.parts[0]
                name = f"  {footprint.name}" if is_step or not footprint.rows else f"    {part.name}"
                if not footprint.rows:
                    name = f"  {footprint.name}: {part.name}"
                name = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."
                size = needed(footprint, part, processes)
                kinds = part.peak.by_kind
                networks = sum(kinds.get(kind, 0) for kind in ("parameters", "average", "earlier networks"))
                rest = kinds.get(REST, 0) + kinds.get("minibatch", 0)
                numbers = [networks, kinds.get("gradients", 0), kinds.get("optimiser", 0), rest, part.peak.total, size]
                verdict = [] if device is None else ["yes" if size <= device.room_bytes else "NO"]
                count = str(footprint.rows) + f"/{footprint.micro_batches}" * (footprint.micro_batches > 1)
                rows.append([name, count if is_step else "", *(_in(number, per) for number in numbers), *verdict])
    return _table(header, rows)


def _shown(footprint: Footprint) -> list[Part]:
    """The step and the largest part of what else there is; everything is in the JSON."""
    step = list(footprint.parts[:1]) if footprint.rows else []
    others = footprint.parts[len(step) :]
    return step + ([max(others, key=lambda part: part.peak.in_blocks)] if others else [])


def _legend(found: Sequence[Estimate], processes: int) -> str:
    footprints = [(one, one.largest) for estimate in found for one in estimate.footprints]
    shared = f", in each of {processes} processes" if processes > 1 else ""
    parts = ", by the number of its micro-batches" if _is_divided(found) else ""
    largest = max(footprints, key=lambda pair: needed(pair[0], pair[1], processes))
    lines = [
        _wrapped(
            f"An estimate: nothing of it was measured on a GPU. rows: of the minibatch{shared}{parts}. rest: activations, temporaries and the "
            "minibatch at the worst moment. needed: the sum and what no tracker of tensors sees, here for the largest row:"
        )
    ]
    lines += [f"  {one.name}: {_gib(one.size)} GiB ({one.origin})" for one in allowances(*largest, processes)]
    host = [
        f"{name} of {estimate.planned.experiment} {one.name} {_gib(size)} GiB"
        for estimate in found
        for one in estimate.footprints
        for name, size in one.storage.items()
    ]
    return "\n".join([*lines, *([_wrapped(f"On the disk: {', '.join(host)}")] if host else [])])


def _verdicts(found: Sequence[Estimate], devices: Sequence[Device], processes: int) -> str:
    """Which devices are large enough, and what is too large for the others."""
    devices_of: dict[str, list[str]] = {}
    everything = "What could be estimated" if any(one.failures for one in found) else "Everything"
    for device in sorted(devices, key=lambda one: one.room_bytes):
        large = [
            f"{one.planned.experiment} ({', '.join(names)})"
            for one in found
            if (names := too_large(one, device, processes))
        ]
        verdict = f"Too large: {'; '.join(large)}, for" if large else f"{everything} fits on"
        devices_of.setdefault(verdict, []).append(f"{device.name} ({_gib(device.room_bytes)})")
    return "\n".join(_wrapped(f"{verdict} (usable GiB) {', '.join(names)}") for verdict, names in devices_of.items())


def _remarks(one: Estimate, footprint: Footprint, devices: Sequence[Device]) -> Iterator[str]:
    if footprint.piling_up > 0:
        yield (
            f"{footprint.piling_up:,} bytes more are alive after each step: something keeps a graph or a tensor of every step "
            "(a loss in a list, for one); no device is large enough for that"
        )
    yield from footprint.notes
    if footprint.micro_batches > 1 and footprint.bound:
        yield f"found {footprint.micro_batches} micro-batches, expected 1: {footprint.bound}"
    options = {phase.name: phase.options for phase in one.planned.phases() if isinstance(phase, SingleLossPhase)}.get(
        footprint.name
    )
    if options is not None and options.precision == "bf16":
        without = [device.name for device in devices if device.peak_flops.get("bf16") is None]
        if without:
            yield f"found precision bf16, expected fp16 or float32 on {', '.join(without)}, which have no hardware for it"


def _advice(one: Advice) -> str:
    head = f"{one.estimate.planned.experiment} {one.phase}, {one.part.name}: does not fit on {one.device.name}"
    if one.divided is None:
        return _wrapped(f"{head}: {one.way}")
    return "\n".join([f"{head}.", *_in_micro_batches(one), *_in_smaller_minibatches(one)])


def _in_micro_batches(one: Advice) -> list[str]:
    divided = one.divided
    if not isinstance(divided, Divided):
        return [_wrapped(f"No micro-batches: {divided}.")]
    return [
        _wrapped(
            f"The same minibatch in parts of {divided.rows} at most: {_gib(divided.needed)} GiB needed with", indent=""
        ),
        f"  --micro-batches {one.phase}={divided.micro_batches}",
        _wrapped(
            "That gives the same result where the loss is a mean over rows: no deviation. `repro preflight` tries it (row `parts`), and a run "
            "before it starts. It takes more launches; the time was not measured.",
            indent="",
        ),
    ]


def _together(advice: Sequence[Advice]) -> Iterator[str]:
    """The option that has the micro-batches of all phases of an experiment."""
    own = [f"{one.phase}={one.divided.micro_batches}" for one in advice if isinstance(one.divided, Divided)]
    if len(own) > 1:
        yield f"{advice[0].estimate.planned.experiment}, all of these: --micro-batches {' '.join(own)}"


def _in_smaller_minibatches(one: Advice) -> list[str]:
    way = one.way
    if isinstance(way, str):
        return [_wrapped(f"No smaller minibatch: {way}")]
    lines = [
        f"{'Otherwise as' if isinstance(one.divided, Divided) else 'As'} many examples in smaller minibatches: "
        f"{_gib(way.needed)} GiB needed with"
    ]
    lines += [f"  --set {override}" for override in way.overrides]
    if way.changes:
        return [*lines, f"That is another method: the minibatch decides {way.changes}."]
    told = "That changes the noise of the gradient, and is a deviation to write down. The learning rate is not adapted."
    return [*lines, told]


def _as_json(
    found: Sequence[Estimate], devices: Sequence[Device], advice: Sequence[Advice], processes: int
) -> dict[str, Any]:
    def part(footprint: Footprint, one: Part) -> dict[str, Any]:
        return {
            "name": one.name,
            "times": one.times,
            "peak_bytes": one.peak.total,
            "peak_bytes_in_blocks": one.peak.in_blocks,
            "by_kind": dict(one.peak.by_kind),
            "allowances": [asdict(each) for each in allowances(footprint, one, processes)],
            "needed_bytes": needed(footprint, one, processes),
            "fits": {each.name: needed(footprint, one, processes) <= each.room_bytes for each in devices},
        }

    def way(one: Advice) -> dict[str, Any]:
        smaller = {"why_not": one.way} if isinstance(one.way, str) else asdict(one.way)
        if one.divided is None:
            return smaller
        divided = {"why_not": one.divided} if isinstance(one.divided, str) else asdict(one.divided)
        return {"in_micro_batches": divided} | smaller

    return {
        "devices": {each.name: {"usable_bytes": each.room_bytes, "source": each.source} for each in devices},
        "processes": processes,
        "experiments": {
            one.planned.experiment: {
                "phases": {
                    footprint.name: {
                        "rows": footprint.rows or None,
                        "micro_batches": footprint.micro_batches,
                        "parts": [part(footprint, each) for each in footprint.parts],
                        "bytes_piling_up_per_step": footprint.piling_up,
                        "host_bytes": dict(footprint.storage),
                        "remarks": list(_remarks(one, footprint, devices)),
                    }
                    for footprint in one.footprints
                },
                "failures": list(one.failures),
                "to_fit": [
                    {"phase": each.phase, "part": each.part.name, "device": each.device.name, **way(each)}
                    for each in advice
                    if each.estimate is one
                ],
            }
            for one in found
        },
    }


def _is_divided(found: Sequence[Estimate]) -> bool:
    return any(footprint.micro_batches > 1 for one in found for footprint in one.footprints)


def _wrapped(text: str, indent: str = "  ") -> str:
    return fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _gib(size: float) -> str:
    return _in(size, GIB)


def _in(size: float, unit: int) -> str:
    return "<0.01" if 0 < size < 0.005 * unit else f"{size / unit:,.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that are as wide as they must be; the first one to the left, numbers to the right."""
    wide = [row for row in [header, *rows] if len(row) > 1]
    widths = [max(len(row[column]) for row in wide) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.rjust(width) if _is_number(cell) or row is header else cell
            for cell, width in zip(row[1:], widths[1:], strict=False)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell.lstrip("<").replace(".", "").replace(",", "").isdecimal() or cell in ("yes", "NO", "")
