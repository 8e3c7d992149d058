"""m07: an override that missed one phase.

An override reaches every phase of every configuration that is shipped, by `--set` and by `--train-iters`, lists each field that it changed, and
is refused when it matches none.
"""

import json
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from proof import Proof

from nsgf.phases import make_phases
from repro import config, run_command
from repro.errors import BadInput
from repro.run import plan
from repro.runtime import Runtime
from repro_tools import cli
from repro_tools.spec import load_spec

CPU = Runtime(torch.device("cpu"))
ROOT = Path(__file__).parents[2]
OVERRIDE = "phases.*.iterations=5"


read_spec = cache(load_spec)  # a long file, and no proof changes it


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("repro_tools.run.load_spec", read_spec)


def named(project, pattern):
    names = [name for name in project.experiments() if fnmatchcase(name, pattern)]
    assert names
    return names


def check_plan(experiments, project, overrides=(OVERRIDE,)):
    """Read as the trainer reads it: every phase that is made has the value, and every change is listed."""
    for experiment in named(project, experiments):
        shipped, made = plan(project, experiment, []), plan(project, experiment, list(overrides))
        steps = {phase.name: phase.iterations for phase in make_phases(made.config, CPU)}
        missed = {name: number for name, number in steps.items() if number != 5}
        assert steps and not missed, f"{experiment}: the override missed {missed}"
        before = {phase.name: phase.iterations for phase in make_phases(shipped.config, CPU)}
        expected = [f"phases.{name}.iterations: {before[name]} -> 5" for name in steps]
        listed = [str(change) for change in made.changes if change.key.endswith(".iterations")]
        assert listed == expected, f"{experiment}: the override lists {listed}, changed are {expected}"


def check_command(experiments, project, capsys):
    """The same by `repro run '*' --train-iters 5`: the resolved configuration on standard output, the changes on standard error."""
    assert cli.main(["run", experiments, "--train-iters", "5", "--dry-run"]) == 0
    printed = capsys.readouterr()
    resolved = json.loads(printed.out)
    assert list(resolved) == named(project, experiments)
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


def first_match_only(monkeypatch):
    real = config._places
    monkeypatch.setattr(config, "_places", lambda *arguments: islice(real(*arguments), 1))


def phases_by_name(monkeypatch):
    """The command knows two phases by name."""
    real = run_command.plan

    def for_two(project, experiment, overrides):
        return real(
            project,
            experiment,
            [o.replace("*", name) for o in overrides for name in ("velocity_field", "straight_flow")],
        )

    monkeypatch.setattr(run_command, "plan", for_two)


def changes_not_listed(monkeypatch):
    real = config._override
    monkeypatch.setattr(config, "_override", lambda data, override: real(data, override)[:2])


def no_match_is_accepted(monkeypatch):
    real = config._override

    def override(data, text):
        try:
            return real(data, text)
        except BadInput:
            return []

    monkeypatch.setattr(config, "_override", override)


def found_before_any_is_changed(monkeypatch):
    real = config._places
    monkeypatch.setattr(config, "_places", lambda *arguments: iter(list(real(*arguments))))


MISSED = {
    "2d-8gaussians": "{'straight_flow': 20000, 'time_predictor': 20000, 'velocity_field_100': 20000, 'ot_cfm': 20000}",
    "digits": "{'straight_flow': 2000, 'time_predictor': 2000, 'feature_classifier': 1000}",
}
UNLISTED = ": the override lists ['phases.velocity_field.iterations: 20000 -> 5', "
PROOFS = [
    Proof(partial(check_plan, "*"), {changes_not_listed: UNLISTED}, [found_before_any_is_changed]),
    Proof(
        partial(check_command, "*"),
        {
            phases_by_name: "--train-iters missed time_predictor, which has 20000",
            changes_not_listed: "the change of time_predictor is not listed",
        },
        [found_before_any_is_changed],
    ),
    *(
        Proof(
            partial(check_plan, experiment),
            {first_match_only: f"{experiment}: the override missed {missed}"},
            [found_before_any_is_changed],
        )
        for experiment, missed in MISSED.items()
    ),
    *(
        Proof(
            partial(check_command, experiment),
            {first_match_only: f"{experiment}: --train-iters missed straight_flow"},
            [found_before_any_is_changed],
        )
        for experiment in MISSED
    ),
    Proof(
        check_refusal,
        {no_match_is_accepted: "an override that matches nothing was accepted"},
        [found_before_any_is_changed],
    ),
]


def test_proof(case):
    case()


@pytest.mark.parametrize(
    ("overrides", "experiments"),
    [
        (["phases.ot_cfm=null", OVERRIDE], "2d-*"),  # a phase that is not there cannot be missed
        ([OVERRIDE, "phases.ot_cfm.batch_size=7"], "2d-*"),
        ([OVERRIDE, "phases.feature_classifier.batch_size=7"], "[!2]*"),
        (["phases.*.iter*=5"], "*"),
    ],
)
def test_other_correct_overrides(project, overrides, experiments):
    check_plan(experiments, project, overrides)
