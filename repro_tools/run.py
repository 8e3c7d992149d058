"""`repro run`: holds the configurations against the specification, then has the engine train and evaluate."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from repro import run_command
from repro.errors import BadInput
from repro.run import RECORD, Plan
from repro.run_command import Around, carry_out, finished_line, planned
from repro_tools.gate import against_spec, gate, unmeasured
from repro_tools.placeholders import FEW, of_claim
from repro_tools.report.markup import number, plural
from repro_tools.report.results import read_record
from repro_tools.spec import Spec, load_spec
from repro_tools.table import listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_command.add_arguments(parser)


def command(options: argparse.Namespace) -> int:
    plans = planned(options)
    spec = load_spec(plans[0].project.spec)
    for one in plans:
        against_spec(one, spec)
    gates = {one.experiment: gate(one, spec) for one in plans}
    where = "" if options.runs == Path("runs") else f" --runs {shlex.quote(str(options.runs))}"
    around = Around(
        program="repro_tools",
        warnings=_placeholders(plans, spec, gates),
        gates=gates,
        tell=_tell,
        after=f"next: repro report{where}",
    )
    return carry_out(options, plans, around)


def _placeholders(plans: list[Plan], spec: Spec, gates: dict[str, dict[str, Any]]) -> list[str]:
    """Says in a line, before anything is trained, which claims the runs cannot decide and why."""
    claims = [(one, claim) for one in plans for claim in spec.claims_of(one.experiment)]
    undecided = {claim.id: [*gates[one.experiment]["placeholders"], *of_claim(spec, claim)] for one, claim in claims}
    undecided = {name: places for name, places in undecided.items() if places}
    places = list(dict.fromkeys(place for own in undecided.values() for place in own))
    if not places:
        return []
    verdict = "no verdict" if len(undecided) == len(claims) else f"no verdict on {listed(list(undecided), FEW)}"
    count = f"{plural(len(places), 'place')} {'is' if len(places) == 1 else 'are'} still to be filled in"
    named = ", ".join(places[:FEW]) + ", ..." * (len(places) > FEW)
    return [f"repro: warning: {verdict} can come of this run: {count}: {named}; repro check lists them"]


def _tell(one: Plan, seed: int, folder: Path, was_there: bool) -> list[str]:
    """What is said of a finished run: the metrics that its claims name and it did not give, and a line about those that it gave."""
    try:
        record = read_record(folder / RECORD)
    except BadInput as error:  # a record that was damaged since: the other runs go on
        return [f"repro: warning: {error}"]
    warnings = [] if was_there else [f"repro: warning: {line}" for line in unmeasured(one, record)]
    return [*warnings, _line(one, seed, record, was_there)]


def _line(one: Plan, seed: int, record: dict, was_there: bool) -> str:
    """Experiment, seed, seconds and the metrics that the experiment's claims are about, as many as fit into a line."""
    claims = load_spec(one.project.spec).claims_of(one.experiment)
    names = dict.fromkeys(name for claim in claims for name in claim.operands)
    metrics = [f"{name} {number(record['metrics'][name])}" for name in names if name in record["metrics"]]
    return finished_line(one, seed, record, was_there, metrics)
