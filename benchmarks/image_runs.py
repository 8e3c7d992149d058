"""Writes the table of predicted hand-over times into refs/nsgf-images.md, from the committed records of the runs.

python -m benchmarks.image_runs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from repro.method import find_project
from repro_tools.report.results import read_records

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "refs" / "nsgf-images.md"
START, END = "<!-- measured:runs:hand-over -->", "<!-- /measured:runs:hand-over -->"


def table(records: Sequence[dict]) -> str:
    """One row for each run on images that tried a fixed hand-over time too."""
    lines = [
        "| experiment | seed | predicted time | evaluations | distance | distance at a fixed time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        metrics = record["metrics"]
        fixed = [name for name in metrics if name.startswith("handover_") and name.endswith(".classifier_frechet")]
        if not fixed:
            continue
        time, spread = (metrics[f"nsgf_plus_plus.handover_time.{kind}"] for kind in ("mean", "std"))
        lines.append(
            f"| {record['experiment']} | {record['seed']} | {time:.3f} ± {spread:.3f} | {metrics['nsgf_plus_plus.nfe']:.1f} "
            f"| {metrics['nsgf_plus_plus.classifier_frechet']:.3g} | {metrics[fixed[0]]:.3g} |"
        )
    return "\n".join(lines)


def fill(page: str, records: Sequence[dict]) -> str:
    """The page with the table between its marks. Raises ValueError when these do not stand there once each."""
    if page.count(START) != 1 or page.count(END) != 1:
        raise ValueError(
            f"{PAGE.name}: found {page.count(START)} and {page.count(END)} marks, expected {START} and {END} once"
        )
    before, rest = page.split(START)
    return f"{before}{START}\n\n{table(records)}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    records = read_records(find_project(ROOT).reports / "records")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
