"""Verdicts: every claim of the spec held against the records of the runs (SKILL section 9).

A verdict follows from the tolerance that was fixed before the run. Runs that depart from the shipped
configuration are shown and never counted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from repro.errors import BadInput
from repro.method import Project
from repro.run import RECORD
from repro.spec import Claim, Spec, Tolerance, claim_hash, load_spec

REPRODUCED, CLOSE, NOT = "reproduced", "close", "not reproduced"
INCONCLUSIVE, COULD_NOT_RUN = "inconclusive", "could not run"
SHORTENED = "shortened or altered run, it does not count"
VERDICTS = (REPRODUCED, CLOSE, NOT, INCONCLUSIVE, COULD_NOT_RUN)


@dataclass(frozen=True)
class Judgement:
    """One claim and what became of it; `reproduced` and `floor` are summaries over `seeds`, None without a run."""

    id: str
    statement: str
    where: str
    experiment: str
    kind: str
    metric: str
    reported: float
    reproduced: dict | None
    floor: dict | None
    tolerance: dict
    verdict: str
    reason: str
    seeds: list[int]
    commit: list[str]
    config_hash: list[str]
    machine: list[str]


def judge(spec: Spec, claim: Claim, records: Sequence[dict]) -> Judgement:
    """The verdict on `claim` from `records`, those of its experiment, one per seed."""
    used = [record for record in records if record["seed"] in spec.seeds and _value(claim, record) is not None]
    values = [_value(claim, record) for record in used]
    tolerance = spec.tolerances[claim.tolerance]
    verdict, reason = _verdict(claim, tolerance, used, values, claim_hash(spec, claim), spec.seeds)
    floors = [record["metrics"][claim.floor] for record in used if claim.floor in record["metrics"]]
    if floors and claim.reported < min(floors):
        reason += "; the reported value is below the floor of this metric"
    metric = claim.metric if claim.divided_by is None else f"{claim.metric} / {claim.divided_by}"
    return Judgement(
        claim.id, claim.statement, claim.where, claim.experiment, claim.kind, metric, claim.reported,
        _summary(values), _summary(floors), tolerance.model_dump(mode="json"), verdict, reason,
        [record["seed"] for record in used],
        sorted({record["commit"] for record in used}),
        sorted({record["config_hash"] for record in used}),
        sorted({_machine(record) for record in used}),
    )  # fmt: skip


def judge_all(spec: Spec, records: Sequence[dict]) -> list[Judgement]:
    """One judgement per claim, in the order of the spec."""
    return [judge(spec, claim, [r for r in records if r["experiment"] == claim.experiment]) for claim in spec.claims]


def collect(runs: Path, reports: Path) -> list[dict]:
    """Copies the record of every finished run under `runs` into `reports`/records and returns all that lie there.

    Raises BadInput rather than put a shortened run in the place of a full one.
    """
    store = reports / "records"
    copies = {
        store / f"{path.parent.parent.name}-{path.parent.name}.json": path
        for path in sorted(runs.glob(f"*/seed-*/{RECORD}"))
    }
    for kept, path in copies.items():
        if kept.exists() and _read_record(path)["departures"] and not _read_record(kept)["departures"]:
            raise BadInput(
                f"{path}: found a shortened or altered run, expected none in the place of the full one in {kept}; report it with --out to another folder"
            )
    store.mkdir(parents=True, exist_ok=True)
    for kept, path in copies.items():
        shutil.copyfile(path, kept)
    return read_records(store)


def read_records(store: Path) -> list[dict]:
    """The records in a folder, by experiment and seed. Raises BadInput for a file that is no record."""
    records = [_read_record(path) for path in store.glob("*.json")]
    return sorted(records, key=lambda record: (record["experiment"], record["seed"]))


def _read_record(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"experiment", "seed", "metrics", "claims", "departures", "commit", "machine"} - set(record)
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(f"{path}: found no run record ({error}), expected one that `repro run` wrote") from None
    return record


def write_report(project: Project, runs: Path, reports: Path, title: str) -> list[Judgement]:
    """Judges every claim and writes results.json, README.md and the method's figures into `reports`."""
    spec = load_spec(project.spec)
    records = collect(runs, reports)
    judgements = judge_all(spec, records)
    results = {
        "paper": spec.paper.model_dump(mode="json"),
        "claims": [asdict(judgement) for judgement in judgements],
    }
    page = "\n".join(
        [
            f"# {title}\n",
            _introduction(spec, records),
            _tally(judgements),
            _claims_table(judgements),
            project.method.report_sections(judgements, records, runs, reports),
            _runs_table(records),
            _settings_table(spec),
            _deviations(spec),
        ]
    )
    _write(reports / "results.json", json.dumps(results, indent=1) + "\n")
    _write(reports / "README.md", page.rstrip() + "\n")
    return judgements


def _value(claim: Claim, record: dict) -> float | None:
    metrics = record["metrics"]
    names = [claim.metric] + ([claim.divided_by] if claim.divided_by else [])
    if any(name not in metrics for name in names):
        return None
    divisor = metrics[claim.divided_by] if claim.divided_by else 1.0
    return metrics[claim.metric] / divisor if divisor else None


def _verdict(
    claim: Claim, tolerance: Tolerance, used: list[dict], values: list[float], current_hash: str, seeds: Sequence[int]
) -> tuple[str, str]:
    if not used:
        return COULD_NOT_RUN, "no run of this experiment measured it"
    departures = sorted({line for record in used for line in record["departures"]})
    if departures:
        return INCONCLUSIVE, f"{SHORTENED}: {'; '.join(departures)}"
    if any(record["claims"].get(claim.id) != current_hash for record in used):
        return INCONCLUSIVE, "the claim or its tolerance was changed after the run"
    missing = sorted(set(seeds) - {record["seed"] for record in used})
    if missing:
        return INCONCLUSIVE, f"no run of seed {', '.join(map(str, missing))}"
    grades = {_grade(claim, tolerance, value) for value in values}
    grade = _grade(claim, tolerance, mean(values))
    if {REPRODUCED, NOT} <= grades:
        return INCONCLUSIVE, f"the seeds disagree: {', '.join(sorted(grades))}"
    return grade, _comparison(claim, tolerance, mean(values))


def _grade(claim: Claim, tolerance: Tolerance, value: float) -> str:
    distance = abs(value - claim.reported) / abs(claim.reported) if claim.kind == "equal" else value
    if distance <= tolerance.reproduced:
        return REPRODUCED
    return CLOSE if distance <= tolerance.close else NOT


def _comparison(claim: Claim, tolerance: Tolerance, value: float) -> str:
    if claim.kind == "equal":
        return f"{100 * (value / claim.reported - 1):+.1f}% from the reported value, {tolerance.reproduced:.0%} allowed"
    return f"at most {tolerance.reproduced:g} allowed"


def _summary(values: list[float]) -> dict | None:
    if not values:
        return None
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None, "values": values}


def _machine(record: dict) -> str:
    machine = record["machine"]
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return f"{machine['processor']}, {machine['cores']} cores{device}"


def _introduction(spec: Spec, records: Sequence[dict]) -> str:
    paper = f"[{spec.paper.title}]({spec.paper.url}) (arXiv {spec.paper.arxiv}{spec.paper.version})"
    text = f"This page is written by `repro report` from the run records. Paper: {paper}.\n"
    if records and all(record["departures"] for record in records):
        changes = sorted({change for record in records for change in record["departures"]})
        text += (
            '\n!!! warning "Shortened runs"\n    Every run on this page departs from the shipped configuration. '
            f"Nothing here counts as a verdict. Changed: {'; '.join(f'`{change}`' for change in changes)}.\n"
        )
    return text


def _tally(judgements: list[Judgement]) -> str:
    counts = Counter(judgement.verdict for judgement in judgements)
    rows = "".join(f"| {verdict} | {counts[verdict]} |\n" for verdict in VERDICTS)
    return f"## Verdicts\n\n| verdict | claims |\n|---|---|\n{rows}"


def _claims_table(judgements: list[Judgement]) -> str:
    lines = [
        "## Every claim\n",
        "Ours is the mean over the seeds ± their standard deviation. The floor is what the same metric gives between "
        "two independent samples of the target: no generator can be expected to score below it.\n",
        "| claim | metric | reported | ours | floor | verdict | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for j in judgements:
        reason = SHORTENED if j.reason.startswith(SHORTENED) else j.reason  # what was changed stands above the table
        lines.append(
            f"| **{j.id}** {j.statement} ({j.where}) | `{j.metric}` | {j.reported:.3g} | {_show(j.reproduced)} | {_show(j.floor)} "
            f"| {j.verdict} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def _runs_table(records: Sequence[dict]) -> str:
    if not records:
        return "## Runs\n\nNone yet.\n"
    lines = [
        "## Runs\n",
        "| experiment | seed | minutes | peak host MiB | configuration | commit | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        lines.append(
            f"| {record['experiment']} | {record['seed']} | {sum(record['wall_s'].values()) / 60:.1f} | {record['peak_host_mib']:.0f} "
            f"| {record['config_hash']} | {record['commit'][:12]}{'+changes' if '+' in record['commit'] else ''} | {_machine(record)} |"
        )
    command = records[0]["command"]
    return "\n".join(lines) + f"\n\nThe first of them was made by `{command}`.\n"


def _settings_table(spec: Spec) -> str:
    lines = [
        "## Settings and where they come from\n",
        "| setting | experiments | value | origin | alternatives | why |",
        "|---|---|---|---|---|---|",
    ]
    for s in spec.settings:
        lines.append(
            f"| {s.name} | `{s.experiments}` | {s.value} | {s.origin}: {s.where} | {'; '.join(s.alternatives) or 'none'} | {s.why} |"
        )
    return "\n".join(lines) + "\n"


def _deviations(spec: Spec) -> str:
    lines = ["## Deviations\n", *(f"- {d.what} {d.why}" for d in spec.deviations), "\n## Not attempted\n"]
    lines += [f"- {n.what} ({n.where}). {n.why}" for n in spec.not_attempted]
    return "\n".join(lines) + "\n"


def _show(summary: dict | None) -> str:
    if summary is None:
        return ""
    spread = "" if summary["spread"] is None else f" ± {summary['spread']:.2g}"
    return f"{summary['mean']:.3g}{spread}"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
