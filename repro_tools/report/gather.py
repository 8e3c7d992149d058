"""`repro report` as a library: reads the records, judges every claim, writes the results page and results.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from repro.method import Project
from repro_tools.project import resolved
from repro_tools.report.judge import Judgement, causes, check_patterns, judge_all, unexplained
from repro_tools.report.markup import write
from repro_tools.report.results import Results, collect, group_runs, tally
from repro_tools.report.results_page import results_page
from repro_tools.spec import load_spec


def write_report(project: Project, runs: Path, reports: Path, title: str) -> list[Judgement]:
    """Judges every claim and writes results.json, README.md and the method's figures into `reports`."""
    results = gather(project, runs, reports, title)
    write_results(results, reports)
    return results.judgements


def gather(project: Project, runs: Path, reports: Path, title: str) -> Results:
    """Collects the records, judges every claim and has the method draw its figures. Raises BadInput."""
    spec = load_spec(project.spec)
    check_patterns(spec, project.spec)
    records = collect(runs, reports)
    judgements = judge_all(spec, records)
    sections = resolved(project.method.report_sections, "report_sections")(judgements, records, runs, reports)
    runs_of_each = group_runs(records, [claim.experiment for claim in spec.claims])
    return Results(title, spec, records, runs_of_each, judgements, sections)


def write_results(results: Results, reports: Path) -> None:
    """Writes results.json and README.md."""
    data = {
        "paper": results.spec.paper.model_dump(mode="json"),
        "verdicts": tally(results.judgements),
        "unexplained": unexplained(results.spec, results.judgements),
        "claims": [
            asdict(judgement)
            | {"causes": causes(results.spec, judgement), "runs": [one.id for one in results.runs_of(judgement)]}
            for judgement in results.judgements
        ],
        "causes": {number: gap.model_dump(mode="json") for number, gap in enumerate(results.spec.gaps, start=1)},
        "runs": [asdict(one) for one in results.runs],
    }
    write(reports / "results.json", json.dumps(data, indent=1) + "\n")
    write(reports / "README.md", results_page(results))
