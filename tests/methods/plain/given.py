"""What a plain loop takes from the engine: the seeds, the minibatches and the random numbers of a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repro.phases import Batch, Draw, Phase
from repro.randomness import generator, seed_global_generators

Curves = dict[str, list[tuple[int, float]]]
"""The value of each curve after so many steps."""


def begin(phase: Phase[Any], seed: int) -> None:
    """The data of `phase`, and the global generators as they are when its networks are made."""
    phase.prepare(seed, Path(), {})
    seed_global_generators(seed, phase.name, "initialise")


def minibatch(phase: Phase[Any], seed: int, step: int, collected: Mapping[str, Tensor] | None = None) -> Batch:
    """The minibatch of a step, and the global generators as they are in it."""
    round_step = step % phase.collect_every if phase.collect_every else step
    draw = Draw(seed, phase.name, "draws", step, step=step, round_step=round_step, collected=collected)
    seed_global_generators(seed, phase.name, "step", step)
    return phase.minibatch(step, draw)


def chance(phase: Phase[Any], seed: int, step: int, name: str) -> torch.Generator:
    """What `update.generator(name)` is in a step."""
    return generator(seed, phase.name, "step", step, name)


def tensors(**parts: nn.Module | Tensor) -> dict[str, Tensor]:
    """All tensors of the named parts, each as PART.NAME."""
    named = {}
    for name, part in parts.items():
        if isinstance(part, Tensor):
            named[name] = part
        else:
            named |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    return named
