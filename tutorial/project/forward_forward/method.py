"""The one object by which the kit knows the method; pyproject.toml names it."""

from repro.method import Method

from .config import Config
from .evaluate import evaluate
from .phases import make_phases
from .probes import probes

TINY = (
    "network.width=16",
    "phases.*.iterations=2",
    "phases.*.batch_size=4",
    "data.validation_images=10",
    "evaluation.hardest=4",
)
"""Overrides that make an experiment a run of seconds, for `repro preflight`."""

METHOD = Method(
    "Forward-Forward",
    Config,
    make_phases,
    evaluate,
    "forward_forward.figures:report_sections",
    probes=probes,
    tiny=TINY,
)
