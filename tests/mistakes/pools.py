"""The pool of a phase of NSGF, as a run builds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nsgf.phases import NSGFPhase
from repro_tools.minibatch import first_round


def pool_of(phase: NSGFPhase, seed: int) -> Mapping[str, Tensor]:
    """What the first round of the phase makes, in memory; nothing for a phase without rounds."""
    phase.prepare(seed, Path(), {})
    return first_round(phase, seed, phase.runtime, {})
