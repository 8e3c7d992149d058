"""The committed note and checklist follow from the committed records; the suspected causes rest on numbers that are in them."""

import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from repro.config import parse_yaml, validate
from repro.method import find_project
from repro_tools import cli
from repro_tools.report.checklist import checklist
from repro_tools.report.gather import gather
from repro_tools.report.judge import REPRODUCED, unexplained
from repro_tools.report.note import FIGURE_WORDS, MOST_CLAIMS, PAGE_WORDS, PAGES, choose, write_note
from repro_tools.spec import Gap, Withdrawal, load_spec

PROJECT = find_project(Path(__file__).parent)
SPEC = load_spec(PROJECT.spec)
TITLE = "Results: Tables 1 to 3 of the paper"
CLAIMS = ["rank-*", "digits-*", "mnist-reduced-*"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results as the committed records give them; figures are drawn elsewhere."""
    folder = tmp_path_factory.mktemp("reports") / "reports"
    (folder / "records").mkdir(parents=True)
    (folder / "figures").mkdir()
    for path in (PROJECT.reports / "records").glob("*.json"):
        (folder / "records" / path.name).write_bytes(path.read_bytes())
    for path in (PROJECT.reports / "figures").glob("*.png"):
        (folder / "figures" / path.name).write_bytes(path.read_bytes())
    return gather(PROJECT, folder / "no-runs", folder, TITLE)


def test_the_committed_note_follows_from_the_committed_records(results):
    path = PROJECT.reports / "note.md"
    note = write_note(results, path, CLAIMS, None)
    assert note.page == path.read_text()
    assert note.pages <= PAGES and note.unwritten == []


def test_the_committed_checklist_follows_from_the_committed_records(results):
    path = PROJECT.reports / "checklist.md"
    assert checklist(results, path) == path.read_text()


def test_the_pages_about_reporting_say_what_the_report_says(results):
    pages = {name: (PROJECT.root.parent / "refs" / f"{name}.md").read_text() for name in ("comparing", "reporting")}
    reproduced = [judgement for judgement in results.judgements if judgement.verdict == REPRODUCED]
    inside = {4: "four"}[sum(bool(judgement.settled) for judgement in reproduced)]
    assert f"\n{len(reproduced)} claims are reproduced, and for {inside} of them" in pages["comparing"]
    note = write_note(results, PROJECT.reports / "note.md", CLAIMS, None)
    assert f"has {note.words:,} words and a figure, which makes\n{note.pages:.1f} pages" in pages["reporting"]
    assert f"about {PAGE_WORDS}, a figure takes the place of {FIGURE_WORDS}." in pages["reporting"]
    assert f"more than {MOST_CLAIMS} claims are counted" in pages["reporting"]
    gaps, withdrawn = (
        parse_yaml(block, "reporting.md") for block in re.findall(r"```yaml\n(.*?)```", pages["reporting"], re.DOTALL)
    )
    assert [validate(Gap, gap, "gaps") for gap in gaps["gaps"]]
    assert [validate(Withdrawal, one, "withdrawn") for one in withdrawn["withdrawn"]]


def test_every_claim_that_was_not_reproduced_has_a_suspected_cause(results):
    assert unexplained(SPEC, results.judgements) == []


def commands(text):
    return [shlex.split(command)[1:] for command in re.findall(r"`(repro [^`]+)`", text)]


@pytest.mark.parametrize("gap", SPEC.gaps, ids=lambda gap: gap.claims)
def test_the_run_that_would_tell_is_one_that_the_command_line_takes(gap, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    asked = commands(gap.ablation)
    assert asked
    for name, *arguments in asked:
        # An evaluation is not tried: it would need the run. Its names and options are those of a run.
        told = io.StringIO()
        assert name in ("run", "evaluate")
        with redirect_stdout(io.StringIO()), redirect_stderr(told):
            assert cli.main(["run", *arguments, "--device", "cpu", "--dry-run"]) == 0, told.getvalue()


def test_a_run_that_is_refused_would_be_seen(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    ((_, *arguments),) = commands("`repro run 2d-scurve --set phases.velocity_field.pol.batches=9`")
    with redirect_stderr(io.StringIO()):
        assert cli.main(["run", *arguments, "--device", "cpu", "--dry-run"]) == 2


MEASURED = {
    "table1-nsgf-100-*": [
        ("2d-8gaussians", "nsgf.100.w2", "0.711"),
        ("2d-8gaussians", "nsgf.10.w2", "0.717"),
        ("2d-checkerboard", "nsgf.100.w2", "0.407"),
        ("2d-checkerboard", "nsgf.10.w2", "0.394"),
    ],
    "rank-ot-cfm-*": [
        ("2d-scurve", "nsgf.10.w2", "0.330"),
        ("2d-scurve", "ot_cfm.10.w2", "0.220"),
        ("2d-scurve", "floor.w2", "0.217"),
    ],
    "mnist-reduced-level": [
        ("mnist-reduced", "nsgf_plus_plus.classifier_frechet", "57"),
        ("mnist-reduced", "fm.100.classifier_frechet", "54"),
        ("mnist-reduced", "floor.classifier_frechet", "2"),
    ],
}


@pytest.mark.parametrize(
    "claims, experiment, metric, shown", [(claims, *one) for claims, several in MEASURED.items() for one in several]
)
def test_the_evidence_is_what_the_records_hold(results, claims, experiment, metric, shown):
    (gap,) = [gap for gap in SPEC.gaps if gap.claims == claims]
    values = [record["metrics"][metric] for record in results.records if record["experiment"] == experiment]
    assert re.search(rf"(?<![\d.]){re.escape(shown)}(?![\d]|\.\d)", gap.evidence)
    decimals = len(shown.partition(".")[2])
    assert f"{sum(values) / len(values):.{decimals}f}" == shown


@pytest.mark.parametrize("claim", ["rank-ot-cfm-scurve", "mnist-reduced-level"])
def test_the_ratios_in_the_evidence_are_those_of_the_seeds(results, claim):
    (gap,) = [gap for gap in SPEC.gaps if gap.claims == claim]
    (judgement,) = choose(results.judgements, [claim])
    for ratio in judgement.pairs.ratios:
        assert f"{ratio:.2f}" in gap.evidence
