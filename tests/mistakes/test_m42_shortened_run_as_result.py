"""m42: a shortened run reported as the claim.

A run that departs from the shipped configuration says so in its record, gets no verdict and takes no full run's place, however good its number
is. A configuration that was shortened by hand is refused before the run, because it contradicts the spec.
"""

import argparse

import yaml
from proof import Proof
from tiny_method import CONFIG, SPEC, train, write_project

from repro import arguments, run
from repro.config import Change, flatten
from repro.errors import BadInput
from repro_tools import gate
from repro_tools.report import gather, judge
from repro_tools.report.gather import write_report
from repro_tools.spec import settings_of

KEY = "phases.steps.iterations"
WARNING = "Nothing here counts as a verdict"
PLANNED = {"seeds": [0], "claims": [SPEC["claims"][0] | {"reported": 5.0}]}


def of_command_line(**given):
    """The overrides that --train-iters and --set stand for."""
    return arguments.overrides(argparse.Namespace(**{"overrides": [], "train_iters": None} | given))


def check(tmp_path):
    """The paper reports 5. The shipped six steps measure 6, which is close; a run of five would be reproduced to the last digit."""
    project = write_project(tmp_path / "project", **PLANNED)

    def judged(runs, reports):
        (found,) = write_report(project, project.root / runs, project.root / reports, "Results")
        return found, (project.root / reports / "README.md").read_text()

    train(project, 0, *of_command_line(train_iters=5), runs="short")
    found, page = judged("short", "reports-short")
    assert found.verdict == "inconclusive" and KEY in found.reason and WARNING in page, (
        f"--train-iters 5: found {found.verdict}, {found.reason}"
    )

    same = of_command_line(train_iters=6, overrides=["pace.log_every=3"])  # another pace, and a number as it is shipped
    train(project, 0, *same)
    found, page = judged("runs", "reports")
    assert found.verdict == "close" and WARNING not in page, f"full run: found {found.verdict}, {found.reason}"

    try:
        found, _ = judged("short", "reports")
    except BadInput:
        found, _ = judged("runs", "reports")
    assert found.reproduced["values"] == [6.0], (
        f"a shortened run took the place of the full one: found {found.reproduced['values']}, expected [6.0]"
    )

    edited = CONFIG | {"phases": {"steps": {"iterations": 5}}}
    project.experiments()["count"].write_text(yaml.safe_dump(edited))
    try:
        train(project, 0, runs="edited")
        told = ""
    except BadInput as error:
        told = str(error)
    assert f"{KEY}: found 5, expected 6" in told, (
        f"iterations: 5 written into the configuration: found {told or 'a run'}"
    )


def override_kept_nowhere(monkeypatch):
    """What ran is compared with what was asked for, and that is the same."""
    monkeypatch.setattr(run, "differences", lambda shipped, asked: [])


def record_not_asked_what_it_is(monkeypatch):
    """The report looks at the metrics alone."""
    real = judge._verdict

    def verdict(claim, tolerance, used, *rest):
        return real(claim, tolerance, [record | {"departures": []} for record in used], *rest)

    monkeypatch.setattr(judge, "_verdict", verdict)


def newest_record_kept(monkeypatch):
    real = gather.collect

    def collect(runs, reports):
        for path in (reports / "records").glob("*.json"):
            path.unlink()
        return real(runs, reports)

    monkeypatch.setattr(gather, "collect", collect)


def shipped_configuration_taken_at_its_word(monkeypatch):
    """Whatever stands in the file is what was planned."""
    monkeypatch.setattr(gate, "check_experiment", lambda *given: None)


def told_in_other_words(monkeypatch):
    monkeypatch.setattr(Change, "__str__", lambda self: f"{self.key} was changed by {self.after - self.before}")


def settings_compared_elsewhere(monkeypatch):
    """By a function of its own that stops at the first difference."""

    def check_experiment(spec, spec_path, experiment, config, config_path):
        for setting, own in settings_of(spec, experiment, flatten(config)):
            for key in own:
                if own[key] != setting.value:
                    raise BadInput(f"{config_path}: {key}: found {own[key]}, expected {setting.value}")

    monkeypatch.setattr(gate, "check_experiment", check_experiment)


def shortened_runs_left_out_of_the_store(monkeypatch):
    """They are reported from where they lie, and a full record is never written over."""
    real = gather.collect

    def collect(runs, reports):
        kept = {path: path.read_text() for path in (reports / "records").glob("*.json")}
        try:
            return real(runs, reports)
        finally:
            for path, text in kept.items():
                path.write_text(text)

    monkeypatch.setattr(gather, "collect", collect)


PROOFS = [
    Proof(
        check,
        plant={
            override_kept_nowhere: "--train-iters 5: found reproduced",
            record_not_asked_what_it_is: "--train-iters 5: found reproduced",
            newest_record_kept: "a shortened run took the place of the full one: found [5.0]",
            shipped_configuration_taken_at_its_word: "iterations: 5 written into the configuration: found a run",
        },
        innocent=[told_in_other_words, settings_compared_elsewhere, shortened_runs_left_out_of_the_store],
    )
]


def test_proof(case):
    case()
