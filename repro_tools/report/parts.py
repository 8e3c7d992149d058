"""In how many parts a run divided its minibatches, and what is known of the parts, in words. Nothing for a run in one part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repro_tools.report.markup import plural


def division(record: Mapping[str, Any]) -> str:
    """Processes, micro-batches and workers of a run, as far as there was more than one part or any worker."""
    told = []
    if (processes := record.get("processes", 1)) > 1:
        told.append(f"{processes} processes")
    divided = {phase: count for phase, count in record.get("micro_batches", {}).items() if count > 1}
    told += [f"{phase} in {count} micro-batches" for phase, count in divided.items()]
    if workers := record.get("workers", 0):
        told.append(plural(workers, "worker"))
    return ", ".join(told)


def verdict_lines(record: Mapping[str, Any]) -> list[str]:
    """A line for each verdict that the run kept on the parts of a phase's minibatches."""
    return [
        f"{phase}, {_parts(verdict)}: {_said(verdict)}"
        for phase, verdicts in record.get("parts", {}).items()
        for verdict in verdicts
    ]


def _parts(verdict: Mapping[str, Any]) -> str:
    processes, micro_batches = verdict.get("processes", 1), verdict.get("micro_batches", 1)
    told = [f"{processes} processes"] * (processes > 1) + [f"{micro_batches} micro-batches"] * (micro_batches > 1)
    return " of ".join(told)


def _said(verdict: Mapping[str, Any]) -> str:
    outcome, why = verdict.get("outcome"), verdict.get("why", "")
    if outcome == "same":
        draws = "; what a step draws at random is equal in distribution only" if verdict.get("draws") else ""
        return f"the gradient of the whole{f', {why}' if why else ''}{draws}"
    if outcome == "per part":
        return f"not tried (`parts_define`): {why} within each part, so their number is the method's"
    return f"{outcome}: {why}"
