"""NSGF and NSGF++ as the kit sees them."""

from __future__ import annotations

from nsgf.config import ImageConfig, PointConfig
from nsgf.evaluate import evaluate
from nsgf.evaluation_work import evaluation_work
from nsgf.phases import make_phases
from nsgf.probes import probes
from repro.method import Method

TINY_POINTS = (
    "phases.*.iterations=2",
    "phases.*.batch_size=8",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=8",
    "evaluation.test_points=32",
    "evaluation.path_points=2",
    "evaluation.floor_draws=1",
    "evaluation.sinkhorn_scaling=0.5",
    "sinkhorn.scaling=0.5",
)
TINY_IMAGES = (
    "phases.*.iterations=2",
    "phases.*.batch_size=2",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=2",
    "nsgf_plus_plus.sinkhorn_steps=1",
    "nsgf_plus_plus.straight_flow_step=1.0",
    "evaluation.samples=3",
    "evaluation.batch_size=10",
    "evaluation.euler_steps=[100]",
    "evaluation.nearest=2",
    "evaluation.pictures=2",
)
"""Claims of the small experiments name metrics of the straight flow at 100 steps."""
TINY_LARGE_IMAGES = (*TINY_IMAGES, "evaluation.samples=10", "evaluation.euler_steps=[1]")
"""Those of the large ones do not, and name the Inception score, which fewer samples do not have."""

METHOD = Method(
    "NSGF++",
    {"2d-*": PointConfig, "*": ImageConfig},
    make_phases,
    evaluate,
    "nsgf.figures:report_sections",
    probes=probes,
    tiny={"2d-*": TINY_POINTS, "digits": TINY_IMAGES, "mnist-reduced": TINY_IMAGES, "*": TINY_LARGE_IMAGES},
    evaluation_work=evaluation_work,
)
