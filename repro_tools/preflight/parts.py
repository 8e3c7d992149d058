"""Whether a phase may be divided: the engine's own test, on a minibatch at tiny size, in one process (`repro preflight`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from repro.errors import BadInput, RunFailed
from repro.phases import Networks, Phase
from repro.runtime import Runtime
from repro.split import Verdict, split_test
from repro_tools.failure import describe
from repro_tools.preflight.checks import Findings

TRIED = 2
"""Micro-batches, where none were asked for."""
ALONE = "it runs in one process and one part"


def look_at_parts(
    phase: Phase[Any],
    batches: Mapping[int, Mapping[str, Tensor]],
    seed: int,
    runtime: Runtime,
    earlier: Mapping[str, Networks],
    asked: Mapping[str, int],
    findings: Findings,
) -> None:
    """The row of a prepared phase, on minibatches by the number of their step. `asked`: the micro-batches that a run is to have, by phase.

    What cannot be divided is a fault where somebody asked for it alone.
    """
    wanted = Runtime(runtime.device, micro_batches=asked).micro_batches_of(phase.name)
    count = wanted if wanted > 1 else TRIED
    rows = max((len(column) for batch in batches.values() for column in batch.values()), default=0)
    if rows < 2 and not phase.parts_define:
        findings.left_out("parts", f"its minibatch at tiny size has {rows} row{'s' * (rows != 1)}", phase.name)
        return
    others = "a run by torchrun or with --micro-batches"
    try:
        found = split_test(phase, batches, seed, replace(runtime, micro_batches={"*": count}), earlier)
    except (BadInput, RunFailed) as error:
        found, others = Verdict("refused", describe(error), 1, count), "a run with --micro-batches"
    except Exception as error:  # of a step that does not run again
        found = Verdict("not measured", describe(error), 1, count)
    if found.outcome == "same":
        draws = "; the step draws at random, so parts give the same in distribution only" if found.draws else ""
        why = f", {found.why}" if found.why else ""
        findings.passed("parts", f"{count} parts: the same gradient{why}{draws}", phase.name)
    elif found.outcome == "per part":
        text = f"not tried: {found.why} within each part (parts_define); their number is the run's"
        findings.passed("parts", text, phase.name)
    elif found.outcome == "refused" and wanted > 1:
        findings.failed("parts", f"found {found.why}, expected the gradient of the whole in {count} parts", phase.name)
    elif found.outcome == "refused":
        findings.left_out("parts", f"{found.why}: {ALONE}, {others} is refused", phase.name)
    elif wanted > 1:
        findings.not_measured_all(["parts"], found.why, phase.name)
    else:
        findings.left_out(
            "parts", f"not measured: {found.why}: {ALONE}, {others} is not known to give the same", phase.name
        )
