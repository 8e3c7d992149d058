"""Parts of a minibatch, for commands that take `--micro-batches` as a run does."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from repro.errors import BadInput

WHOLE: Mapping[str, int] = {}
"""The micro-batches of a run that divides nothing."""


def require_phases(micro_batches: Mapping[str, int], names: Collection[str]) -> None:
    """Raises BadInput for micro-batches of a phase that none of the experiments has."""
    for name in micro_batches:
        if name not in ("*", *names):
            raise BadInput(f"--micro-batches: found the phase '{name}', expected one of: {', '.join(sorted(names))}")
