"""Minibatches as a run draws them, for commands that look at a phase without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from repro.loop import Loop
from repro.phases import Networks, Phase
from repro.randomness import Draw
from repro.runtime import Runtime


def first_round(
    phase: Phase[Any], seed: int, runtime: Runtime, earlier: Mapping[str, Networks]
) -> Mapping[str, Tensor]:
    """What the first round of a prepared phase makes, in memory; nothing for a phase without rounds."""
    if not phase.collect_every:
        return {}
    loop = Loop(phase, seed=seed, runtime=runtime, earlier=earlier)
    loop.collect_if_due()
    return loop.round.rows if loop.round else {}


def draw(
    phase: Phase[Any],
    step: int,
    seed: int,
    collected: Mapping[str, Tensor],
    names: Sequence[str | int] = ("draws",),
    rows_of: int | None = None,
) -> dict[str, Tensor]:
    """The minibatch of a step, on the CPU, by the draw of `names`: a run's own, if no others are given.

    `collected` is what the round made. `rows_of` is the step whose rows of an epoch it takes, if another.
    """
    place = step if rows_of is None else rows_of
    given = Draw(seed, phase.stream, *names, step, step=place, round_step=place, collected=collected)
    return dict(phase.minibatch(step, given))
