"""Phases with a loop of their own, for commands that know one network with one loss only: they say so and measure nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from repro.phases import Phase, SingleLossPhase

EXIT_NOT_MEASURED = 3
"""Neither a fault nor a pass: the command cannot look at what it was asked about."""


class NotMeasured(Exception):
    """What a command was asked about and cannot look at, a line each."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


def own_loops(phases: Iterable[Phase[Any]]) -> list[str]:
    """The names of the phases that have a loop of their own."""
    return [phase.name for phase in phases if has_own_loop(phase)]


def has_own_loop(phase: Phase[Any]) -> bool:
    """Whether it says less than one network with one loss: its step is the paper's own, or it has rounds and leaves open,
    by `rehearse` and `work`, what they come to."""
    kind = type(phase)
    open_rounds = kind.rehearse is Phase.rehearse or kind.work is Phase.work
    return not isinstance(phase, SingleLossPhase) or (phase.collect_every > 0 and open_rounds)


def require_single_loss(phases: Iterable[Phase[Any]], experiment: str) -> list[SingleLossPhase]:
    """The phases. Raises NotMeasured where one of them has a loop of its own."""
    given = list(phases)
    found = own_loops(given)
    if found:
        raise NotMeasured(*(f"{experiment}: phase {name}: not measured: own loop" for name in found))
    return [phase for phase in given if isinstance(phase, SingleLossPhase)]
