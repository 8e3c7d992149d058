"""What the results page says of the runs on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def report_sections(judgements: Sequence, records: Sequence[dict], runs: Path, reports: Path) -> str:
    return ""
