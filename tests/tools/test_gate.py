"""A run that passed the gate and one that did not: what each record says of the specification, and how it is judged."""

import json

import pytest
from toy_method import METHOD
from toy_project import SPEC, write_yaml

from repro import __main__ as engine
from repro.errors import BadInput
from repro_tools.cli import main
from repro_tools.report.results import read_records

WIDER = {"wide": {"reproduced": 0.9, "close": 1.0, "why": "chosen after the run"}}


@pytest.fixture
def alone(project):
    """The toy project after two runs of the engine alone, one for each planned seed."""
    for seed in ("0", "1"):
        assert engine.main(["run", "toy", "--seeds", seed]) == 0
    return project


def record(project, seed=0):
    return json.loads((project / f"runs/toy/seed-{seed}/record.json").read_text())


def judged(project):
    """(verdict, reason) of the one claim, and the page."""
    assert main(["report"]) == 0
    (claim,) = json.loads((project / "reports/results.json").read_text())["claims"]
    return claim["verdict"], claim["reason"], (project / "reports/README.md").read_text()


def test_both_ways_of_running_give_one_result_and_keep_one_text(alone, capsys):
    assert main(["run", "toy", "--runs", "gated"]) == 0
    by_tools = json.loads((alone / "gated/toy/seed-0/record.json").read_text())
    by_engine = record(alone)
    assert by_tools["metrics"] == by_engine["metrics"] and by_tools["config_hash"] == by_engine["config_hash"]
    assert by_tools["spec_sha256"] == by_engine["spec_sha256"]
    assert set(by_tools) - set(by_engine) == {"claims", "planned_seeds", "placeholders"}
    for folder in ("runs", "gated"):
        assert (alone / folder / "toy/seed-0/spec.yaml").read_bytes() == (alone / "spec.yaml").read_bytes()


def test_what_the_gate_fixed_stands_where_it_stood_before(project):
    assert main(["run", "toy"]) == 0
    keys = list(record(project))
    place = keys.index("departures") + 1
    assert keys[place : place + 4] == ["claims", "planned_seeds", "placeholders", "spec_sha256"]


def test_runs_of_the_engine_alone_are_judged_by_the_text_that_they_kept(alone):
    verdict, _, page = judged(alone)
    for seed in ("0", "1"):
        assert main(["run", "toy", "--seeds", seed, "--runs", "gated"]) == 0
    assert main(["report", "--runs", "gated", "--out", "gated-reports"]) == 0
    (other,) = json.loads((alone / "gated-reports/results.json").read_text())["claims"]
    assert verdict == other["verdict"]
    assert "No gate was passed by 2 runs (toy seed 0, toy seed 1)" in page
    assert "No gate" not in (alone / "gated-reports/README.md").read_text()


def test_a_tolerance_that_was_changed_after_a_run_of_the_engine_alone_costs_the_verdict(alone):
    write_yaml(alone / "spec.yaml", SPEC | {"tolerances": WIDER})
    assert judged(alone)[:2] == ("inconclusive", "the claim or its tolerance was changed after the run")
    assert main(["check", "--json"]) == 1


def test_the_reports_keep_the_text_so_that_they_come_out_the_same_without_the_runs(alone):
    first = judged(alone)
    (alone / "runs").rename(alone / "elsewhere")
    assert judged(alone) == first


def test_a_text_that_was_changed_is_refused(alone, capsys):
    judged(alone)
    (kept,) = (alone / "reports/records").glob("spec-*.yaml")
    kept.write_text(kept.read_text() + "# later\n")
    with pytest.raises(BadInput, match="found the SHA-256"):
        read_records(alone / "reports/records")


@pytest.mark.parametrize("text", [None, "[", "paper: {}\n"])
def test_without_a_specification_the_engine_runs_and_nothing_is_reproduced(project, text):
    (project / "spec.yaml").unlink()
    if text is not None:
        (project / "spec.yaml").write_text(text)
    for seed in ("0", "1"):
        assert engine.main(["run", "toy", "--seeds", seed]) == 0
    write_yaml(project / "spec.yaml", SPEC)
    verdict, reason, _ = judged(project)
    assert verdict == "inconclusive" and reason.startswith("run without a gate, and the ")


def test_a_method_that_was_a_stand_in_earns_no_verdict_without_a_gate_either(project):
    object.__setattr__(METHOD, "placeholder", "the toy")
    try:
        for seed in ("0", "1"):
            assert engine.main(["run", "toy", "--seeds", seed]) == 0
    finally:
        object.__setattr__(METHOD, "placeholder", "")
    assert judged(project)[:2] == ("inconclusive", "made while these were still to be filled in: method: the toy")


def test_a_new_evaluation_of_a_run_without_a_gate_does_not_give_it_one(alone):
    assert main(["evaluate", "toy"]) == 0
    assert "claims" not in record(alone) and "no_gate" not in record(alone)


def test_the_engine_tells_every_metric(alone, capsys):
    capsys.readouterr()
    assert engine.main(["run", "toy", "--resume"]) == 0
    assert ", line.error " in (told := capsys.readouterr().err) and "constant.value" in told and "next:" not in told


@pytest.mark.parametrize("given", ["toy_figures:sections", "toy_figures:absent", "absent:sections", "toy_figures"])
def test_sections_that_are_named_are_imported_by_the_report_alone(project, capsys, monkeypatch, given):
    (project / "toy_figures.py").write_text("import sys\n\ndef sections(*given):\n    return '## Drawn\\n'\n")
    monkeypatch.syspath_prepend(project)
    object.__setattr__(METHOD, "report_sections", given)
    try:
        assert main(["run", "toy"]) == 0
        if given == "toy_figures:sections":
            assert "## Drawn" in judged(project)[2]
        else:
            capsys.readouterr()
            assert main(["report"]) == 2
            assert f"Method.report_sections: found '{given}'" in capsys.readouterr().err
    finally:
        object.__setattr__(METHOD, "report_sections", lambda *_: "")
