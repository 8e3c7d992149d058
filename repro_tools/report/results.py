"""Records of runs and what they add up to: the facts that the pages of a report are written from."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repro.config import flatten
from repro.errors import BadInput
from repro.run import RECORD, SPEC
from repro_tools.report.judge import VERDICTS, Judgement, hardware
from repro_tools.report.kept_spec import completed, kept_beside
from repro_tools.report.parts import division, verdict_lines
from repro_tools.spec import Spec

LAST_STEP = "last step"


@dataclass(frozen=True)
class Runs:
    """The runs of one experiment that differ in nothing but the seed. Lists go by seed; None is what no record says.

    `machine` names processes, micro-batches and workers too, where there were several; `parts` says what is known of the parts.
    `checkpoint` is the rule that chose the networks. `evaluated_later` says when, and by which commit, finished networks were
    judged anew; None where the run itself judged them.
    """

    id: str
    experiment: str
    seeds: list[int]
    command: str
    machine: str
    commit: str
    config_hash: str
    departures: list[str]
    checkpoint: str
    evaluated_later: str | None
    minutes: list[float]
    peak_host_mib: float | None
    peak_device_mib: float | None
    parameters: int | None
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """All that a report is written from. `sections` is the method's own Markdown."""

    title: str
    spec: Spec
    records: list[dict]
    runs: list[Runs]
    judgements: list[Judgement]
    sections: str

    def runs_of(self, judgement: Judgement) -> list[Runs]:
        """The runs that a claim was judged by."""
        return [
            one for one in self.runs if one.experiment == judgement.experiment and set(one.seeds) & set(judgement.seeds)
        ]

    def by_experiment(self) -> dict[str, list[Judgement]]:
        """The judgements of each experiment, in the order of the spec."""
        groups: dict[str, list[Judgement]] = {}
        for judgement in self.judgements:
            groups.setdefault(judgement.experiment, []).append(judgement)
        return groups


def collect(runs: Path, reports: Path) -> list[dict]:
    """Copies the record of every finished run under `runs` into `reports`/records and returns all that lie there.

    Superseded records lie a folder deeper and are not taken. Raises BadInput rather than put a shortened run in the place of a
    full one, or count a seed twice.
    """
    store = reports / "records"
    copies = {
        store / f"{path.parent.parent.name}-{path.parent.name}.json": path
        for path in sorted(runs.glob(f"*/seed-*/{RECORD}"))
    }
    found: dict[tuple[str, int], Path] = {}
    for kept, path in copies.items():
        record = read_record(path)  # all of them before anything is written
        _once(record, path, found)
        if kept.exists() and record["departures"] and not read_record(kept)["departures"]:
            raise BadInput(
                f"{path}: found a shortened or altered run, expected none in the place of the full one in {kept}; report it with --out to another folder"
            )
    store.mkdir(parents=True, exist_ok=True)
    for kept, path in copies.items():
        shutil.copyfile(path, kept)
        text = kept_beside(read_record(path), store)
        if text is not None and (path.parent / SPEC).is_file():
            shutil.copyfile(path.parent / SPEC, text)
    return read_records(store)


def read_records(store: Path) -> list[dict]:
    """The records in a folder, by experiment and seed.

    Raises BadInput for a file that is no record, and for two records of one run: the seed would count twice.
    """
    found: dict[tuple[str, int], Path] = {}
    records = []
    for path in sorted(store.glob("*.json")):
        record = read_record(path)
        records.append(completed(record, kept_beside(record, store)))
        _once(records[-1], path, found)
    return sorted(records, key=lambda record: (record["experiment"], record["seed"]))


def _once(record: dict, path: Path, found: dict[tuple[str, int], Path]) -> None:
    """Notes where the record of a run lies. Raises BadInput for the second one of a run."""
    run = record["experiment"], record["seed"]
    other = found.setdefault(run, path)
    if other != path:
        raise BadInput(f"{path}: found a second record of {run[0]}, seed {run[1]}, expected one; the other is {other}")


REQUIRED = {"experiment", "seed", "metrics", "departures", "commit", "machine"}
FIELDS = {
    "experiment": str, "seed": int, "config": dict, "config_hash": str, "departures": list, "claims": dict, "planned_seeds": list, "placeholders": list, "spec_sha256": str, "method_placeholder": str, "command": str, "commit": str,
    "versions": dict, "machine": dict, "processes": int, "micro_batches": dict, "workers": int, "parts": dict, "started": str, "wall_s": dict, "prepare_s": dict, "parameters": dict,
    "peak_host_mib": float, "peak_device_mib": dict, "metrics": dict, "curves": dict, "evaluated_later": dict,
}  # fmt: skip
"""The kind of each field of a record. Those that an older kit did not write may be absent."""


def read_record(path: Path) -> dict:
    """One record. Its curves are by phase and name, also where version 0.1 wrote the one of the loss by phase.

    Raises BadInput for a file that is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = REQUIRED - set(record)
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        for key, expected in FIELDS.items():
            if key in record and (not isinstance(record[key], expected) or isinstance(record[key], bool)):
                raise ValueError(f"{key}: {type(record[key]).__name__}, not {expected.__name__}")
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(f"{path}: found no run record ({error}), expected one that `repro run` wrote") from None
    if "curves" in record:
        curves = record["curves"].items()
        record["curves"] = {name: curve if isinstance(curve, dict) else {"loss": curve} for name, curve in curves}
    return record


def group_runs(records: Sequence[dict], order: Sequence[str]) -> list[Runs]:
    """The records, those together that differ in nothing but the seed; by experiment, in the given order and then by name.

    Fields that an older kit did not write may be absent.
    """
    groups: dict[tuple, list[dict]] = {}
    places = {experiment: place for place, experiment in enumerate(dict.fromkeys(order))}
    for record in sorted(records, key=lambda record: places.get(record["experiment"], len(places))):
        facts = (
            record["experiment"], _command(record), _machine(record), record["commit"], record.get("config_hash", ""),
            tuple(record["departures"]), checkpoint_rule(record), evaluated_later(record),
        )  # fmt: skip
        groups.setdefault(facts, []).append(record)
    return [
        Runs(
            f"R{number}", experiment, [record["seed"] for record in own], command, machine, commit, config_hash, list(departures),
            checkpoint, later, [sum(record["wall_s"].values()) / 60 for record in own if record.get("wall_s")],
            max((record["peak_host_mib"] for record in own if record.get("peak_host_mib")), default=None),
            max((peak for record in own for peak in record.get("peak_device_mib", {}).values()), default=0) or None,
            sum(own[0]["parameters"].values()) if own[0].get("parameters") else None,
            tuple(dict.fromkeys(line for record in own for line in verdict_lines(record))),
        )
        for number, ((experiment, command, machine, commit, config_hash, departures, checkpoint, later), own) in enumerate(
            groups.items(), start=1
        )
    ]  # fmt: skip


def checkpoint_rule(record: dict) -> str:
    """Which networks were judged. The kit hands on those of the last step of each phase and chooses among none."""
    leaves = flatten(record.get("config", {}))
    averaged = [
        key.split(".")[1]
        for key, value in leaves.items()
        if key.startswith("phases.") and key.endswith(".ema_decay") and value is not None
    ]
    return f"{LAST_STEP}; average of the weights in {', '.join(averaged)}" if averaged else LAST_STEP


def evaluated_later(record: dict) -> str | None:
    """When and by which commit finished networks were judged anew, in words."""
    later = record.get("evaluated_later")
    if not later:
        return None
    where = f", on {hardware(later)}" if hardware(later) != hardware(record) else ""
    changed = f", with {'; '.join(later['changed'])}" if later["changed"] else ""
    return f"{later['started'][:10]}, commit {short(later['commit'])}{where}{changed}"


def short(commit: str) -> str:
    """A commit as a table shows it."""
    return f"{commit[:12]}{'+changes' if '+' in commit else ''}"


def tally(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How many claims got each verdict, in the order of the verdicts."""
    counts = Counter(judgement.verdict for judgement in judgements)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def tally_in_words(judgements: Sequence[Judgement]) -> str:
    """'3 reproduced (1 open), 1 close', without the verdicts that no claim got."""
    opened = Counter(judgement.verdict for judgement in judgements if judgement.settled is False)
    counted = [
        f"{count} {verdict}" + (f" ({opened[verdict]} open)" if opened[verdict] else "")
        for verdict, count in tally(judgements).items()
        if count
    ]
    return ", ".join(counted) or "no claims"


def _machine(record: dict) -> str:
    return ", ".join(filter(None, [hardware(record), division(record)]))


def _command(record: dict) -> str:
    """The command of a run without its seed, which is all in which the runs of a group differ."""
    return re.sub(r"(--seeds)(=|\s+)\d+(\s+\d+)*", r"\1 SEED", record.get("command", ""))
