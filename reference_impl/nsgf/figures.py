"""What this method adds to the results page: a section for points, and one for images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nsgf import figures_images, figures_points
from repro_tools.report.judge import Judgement


def report_sections(judgements: Sequence[Judgement], records: Sequence[dict], runs: Path, reports: Path) -> str:
    parts = [kind.report_sections(judgements, records, runs, reports) for kind in (figures_points, figures_images)]
    return "\n".join(part for part in parts if part)
