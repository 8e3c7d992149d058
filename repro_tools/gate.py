"""The gate before a run: the configuration held against the specification, and what of it is fixed in the record."""

from __future__ import annotations

import difflib
from typing import Any

from repro.method import Project
from repro.run import Plan, plan
from repro_tools.placeholders import of_run
from repro_tools.spec import Spec, check_experiment, claim_hashes, load_spec


def checked_plan(project: Project, experiment: str, overrides: list[str]) -> Plan:
    """The engine's plan, held against the specification. Raises BadInput; writes nothing."""
    planned = plan(project, experiment, overrides)
    against_spec(planned, load_spec(project.spec))
    return planned


def against_spec(planned: Plan, spec: Spec) -> None:
    """Raises BadInput where the configuration, as it is shipped, contradicts the specification."""
    project, experiment = planned.project, planned.experiment
    check_experiment(spec, project.spec, experiment, planned.shipped, project.experiments()[experiment])


def gate(planned: Plan, spec: Spec) -> dict[str, Any]:
    """What a record says of the specification that its run was made for: the hash of each claim, the planned seeds, and what the run
    is made with and is still to be filled in."""
    method = planned.project.method
    return {
        "claims": claim_hashes(spec, planned.experiment),
        "planned_seeds": spec.seeds,
        "placeholders": of_run(method.placeholder, spec, planned.experiment, planned.config),
    }


def unmeasured(planned: Plan, record: dict[str, Any]) -> list[str]:
    """A line for each claim of the experiment that names a metric which the evaluation did not give."""
    lines, spec = [], load_spec(planned.project.spec)
    for claim in spec.claims_of(planned.experiment):
        for name in filter(None, (*claim.operands, claim.floor)):
            if name not in record["metrics"]:
                close = difflib.get_close_matches(name, list(record["metrics"]), n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                lines.append(
                    f"{planned.project.spec}: claim {claim.id}: found metric '{name}', which no evaluation gave{hint}"
                )
    return lines
