"""NSGF and NSGF++ as the kit sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from nsgf import evaluate_images, evaluate_points, figures_images, figures_points
from nsgf.config import ImageConfig, PointConfig
from nsgf.phases import make_phases
from repro.method import Evaluation, Method
from repro.report import Judgement
from repro.runtime import Runtime


def evaluate(
    config: PointConfig | ImageConfig, models: Mapping[str, nn.Module], seed: int, runtime: Runtime
) -> Evaluation:
    kind = evaluate_points if isinstance(config, PointConfig) else evaluate_images
    return kind.evaluate(config, models, seed, runtime)


def report_sections(judgements: Sequence[Judgement], records: Sequence[dict], runs: Path, reports: Path) -> str:
    parts = [kind.report_sections(judgements, records, runs, reports) for kind in (figures_points, figures_images)]
    return "\n".join(part for part in parts if part)


METHOD = Method("NSGF++", {"2d-*": PointConfig, "*": ImageConfig}, make_phases, evaluate, report_sections)
