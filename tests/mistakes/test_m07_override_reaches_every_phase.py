"""m07: an override that missed one phase.

An override reaches every phase of every configuration that is shipped, by `--set` and by `--train-iters`, lists each field that it changed, and
is refused when it matches none.
"""

import json
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import pytest
import torch

from nsgf.phases import make_phases
from repro import cli, config, run_command
from repro.errors import BadInput
from repro.run import plan
from repro.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
ROOT = Path(__file__).parents[2]
OVERRIDE = "phases.*.iterations=5"


def check_plan(project, overrides=(OVERRIDE,), experiments="*"):
    """Read as the trainer reads it: every phase that is made has the value, and every change is listed."""
    names = [name for name in project.experiments() if fnmatchcase(name, experiments)]
    assert names
    for experiment in names:
        shipped, made = plan(project, experiment, []), plan(project, experiment, list(overrides))
        steps = {phase.name: phase.iterations for phase in make_phases(made.config, CPU)}
        missed = {name: number for name, number in steps.items() if number != 5}
        assert steps and not missed, f"{experiment}: the override missed {missed}"
        before = {phase.name: phase.iterations for phase in make_phases(shipped.config, CPU)}
        expected = [f"phases.{name}.iterations: {before[name]} -> 5" for name in steps]
        listed = [str(change) for change in made.changes if change.key.endswith(".iterations")]
        assert listed == expected, f"{experiment}: the override lists {listed}, changed are {expected}"


def check_command(project, monkeypatch, capsys):
    """The same by `repro run '*' --train-iters 5`: the resolved configuration on standard output, the changes on standard error."""
    monkeypatch.chdir(ROOT)
    assert cli.main(["run", "*", "--train-iters", "5", "--dry-run"]) == 0
    printed = capsys.readouterr()
    resolved = json.loads(printed.out)
    assert list(resolved) == list(project.experiments())
    for experiment, settings in resolved.items():
        for name, phase in settings["phases"].items():
            if phase is not None:
                assert phase["iterations"] == 5, (
                    f"{experiment}: --train-iters missed {name}, which has {phase['iterations']}"
                )
                assert f"{experiment}: phases.{name}.iterations: " in printed.err, (
                    f"{experiment}: the change of {name} is not listed"
                )


def check_refusal(project):
    """Nothing matches: the misspelled key is named, and what it may have been."""
    for experiment in project.experiments():
        try:
            plan(project, experiment, ["phases.*.iteration=5"])
        except BadInput as error:
            assert str(error).startswith("--set phases.*.iteration=5: found no field 'phases.*.iteration', expected"), (
                str(error)
            )
        else:
            raise AssertionError(f"{experiment}: an override that matches nothing was accepted")


def plant_first_match_only(monkeypatch):
    real = config._places
    monkeypatch.setattr(config, "_places", lambda *arguments: islice(real(*arguments), 1))


def plant_phases_by_name(monkeypatch):
    """The command knows two phases by name."""
    real = run_command.plan

    def named(project, experiment, overrides):
        return real(
            project,
            experiment,
            [o.replace("*", name) for o in overrides for name in ("velocity_field", "straight_flow")],
        )

    monkeypatch.setattr(run_command, "plan", named)


def plant_changes_not_listed(monkeypatch):
    real = config._override
    monkeypatch.setattr(config, "_override", lambda data, override: real(data, override)[:2])


def plant_no_match_is_accepted(monkeypatch):
    real = config._override

    def override(data, text):
        try:
            return real(data, text)
        except BadInput:
            return []

    monkeypatch.setattr(config, "_override", override)


def innocent(monkeypatch):
    """All fields are found before the first is changed."""
    real = config._places
    monkeypatch.setattr(config, "_places", lambda *arguments: iter(list(real(*arguments))))


def test_holds(project):
    check_plan(project)


def test_holds_for_the_command(project, monkeypatch, capsys):
    check_command(project, monkeypatch, capsys)


def test_holds_for_what_matches_nothing(project):
    check_refusal(project)


@pytest.mark.parametrize(
    ("overrides", "experiments"),
    [
        (["phases.ot_cfm=null", OVERRIDE], "2d-*"),  # a phase that is not there cannot be missed
        ([OVERRIDE, "phases.ot_cfm.batch_size=7"], "2d-*"),
        ([OVERRIDE, "phases.feature_classifier.batch_size=7"], "[!2]*"),
        (["phases.*.iter*=5"], "*"),
    ],
)
def test_silent_on_other_correct_overrides(project, overrides, experiments):
    check_plan(project, overrides, experiments)


def test_silent_on_another_way_to_find_the_fields(proof, project):
    proof.silent(lambda: check_plan(project), innocent)


@pytest.mark.parametrize("experiment", ["2d-8gaussians", "digits"])
def test_catches_an_override_of_the_first_match(proof, project, monkeypatch, capsys, experiment):
    _, *others = make_phases(plan(project, experiment, []).config, CPU)
    missed = {phase.name: phase.iterations for phase in others}
    only = {experiment: project.experiments()[experiment]}
    monkeypatch.setattr(type(project), "experiments", lambda self: only)
    proof.caught(lambda: check_plan(project), plant_first_match_only, f"{experiment}: the override missed {missed}")
    proof.caught(
        lambda: check_command(project, monkeypatch, capsys),
        plant_first_match_only,
        f"{experiment}: --train-iters missed straight_flow",
    )


def test_catches_phases_known_by_name(proof, project, monkeypatch, capsys):
    reason = "--train-iters missed time_predictor, which has 20000"
    proof.caught(lambda: check_command(project, monkeypatch, capsys), plant_phases_by_name, reason)


def test_catches_changes_that_are_not_listed(proof, project, monkeypatch, capsys):
    proof.caught(
        lambda: check_plan(project),
        plant_changes_not_listed,
        ": the override lists ['phases.velocity_field.iterations: 20000 -> 5', ",
    )
    proof.caught(
        lambda: check_command(project, monkeypatch, capsys),
        plant_changes_not_listed,
        "the change of time_predictor is not listed",
    )


def test_catches_an_override_without_effect(proof, project):
    proof.caught(
        lambda: check_refusal(project), plant_no_match_is_accepted, "an override that matches nothing was accepted"
    )
