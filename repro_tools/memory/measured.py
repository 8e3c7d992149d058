"""Seconds of a step as they were measured: from records of runs, or from a small file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat

from repro.config import Section, read_yaml, validate
from repro.errors import BadInput

LEAST_STEPS = 100
"""Steps of a phase from which its record counts: libraries choose their algorithms in the first ones. Of a shorter phase, all of them."""


@dataclass(frozen=True)
class Measured:
    """Seconds of a step as it was measured: where, on what, and the configuration's part for the phase (empty: not known).

    source: the file. steps: over how many, None where that is not known.
    """

    experiment: str
    phase: str
    seconds: float
    device: str
    threads: int | None
    section: Mapping[str, Any]
    source: str
    steps: int | None = None


class StepsMeasured(Section):
    """The small file: seconds of a step by experiment and phase, on one device."""

    device: str
    seconds_per_step: dict[str, dict[str, PositiveFloat]]


def read_measured(path: Path) -> list[Measured]:
    """Measured steps from records of runs (a folder of them, at any depth, or one file) or from a small YAML file, see `StepsMeasured`.

    Raises BadInput for a file that is neither, and for a folder without a record.
    """
    if path.suffix in (".yaml", ".yml"):
        given = validate(StepsMeasured, read_yaml(path), str(path))
        return [
            Measured(experiment, phase, seconds, given.device, None, {}, str(path))
            for experiment, steps in given.seconds_per_step.items()
            for phase, seconds in steps.items()
        ]
    if not path.exists():
        raise BadInput(f"--measured: found no {path}, expected records of runs or a YAML file")
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    found = [one for file in files for one in _from_record(file, strict=path.is_file())]
    if not found:
        raise BadInput(f"--measured: found no record of a run in {path}, expected one")
    return found


def step_of(record: Mapping[str, Any], phase: str) -> tuple[float, int]:
    """Seconds of a phase's step without its preparation, saving included, and how many there were."""
    steps = record["config"]["phases"][phase]["iterations"]
    return max(0.0, record["wall_s"][phase] - record["prepare_s"].get(phase, 0.0)) / steps, steps


def micro_batches_of(record: Mapping[str, Any], phase: str) -> int | None:
    """Of a step of one process, since a step in parts takes another time; None where several shared it."""
    return record.get("micro_batches", {}).get(phase, 1) if record.get("processes", 1) == 1 else None


def is_too_short(steps: int, of: int) -> bool:
    """Whether so many steps, of a phase of `of`, are too few to count."""
    return steps < min(LEAST_STEPS, of)


def shaping(config: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """The phase's section without what does not change the time of a step."""
    section = config.get("phases", {}).get(phase) or {}
    return {key: value for key, value in section.items() if key not in ("iterations", "learning_rate", "pool", "flow")}


def _from_record(path: Path, strict: bool) -> Iterable[Measured]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        device, threads, config = record["machine"]["device"], record["machine"]["threads"], record["config"]
        for phase, section in config["phases"].items():
            if section is None or phase not in record["wall_s"] or micro_batches_of(record, phase) != 1:
                continue
            seconds, steps = step_of(record, phase)
            yield Measured(
                record["experiment"], phase, seconds, device, threads, shaping(config, phase), str(path), steps
            )
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        if strict:
            raise BadInput(f"{path}: found no record of a run, expected one that `repro run` wrote") from None
