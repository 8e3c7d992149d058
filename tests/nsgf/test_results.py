"""The committed results are what the kit makes of the committed records, on the page as in results.json."""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from repro.method import find_project
from repro_tools.report.gather import write_report
from repro_tools.report.judge import judge_all
from repro_tools.report.results import read_records
from repro_tools.spec import load_spec

PROJECT = find_project(Path(__file__).parent)
RESULTS = json.loads((PROJECT.reports / "results.json").read_text())
PAGE = (PROJECT.reports / "README.md").read_text()


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    """The report made again from a copy of the committed records and figures, with no runs at hand."""
    reports = tmp_path_factory.mktemp("reports") / "reports"
    shutil.copytree(PROJECT.reports, reports, ignore=shutil.ignore_patterns("demo"))
    title = re.search(r"^# (.*)$", PAGE, re.MULTILINE)[1]
    write_report(PROJECT, reports / "no-runs", reports, title)
    return reports


def test_the_committed_page_follows_from_the_committed_records(rewritten):
    assert (rewritten / "README.md").read_text() == (PROJECT.reports / "README.md").read_text()


def leaves(data, place=()):
    """Every value of nested data with its place."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        yield place, data
    for key, value in items or ():
        yield from leaves(value, (*place, key))


def test_the_committed_results_follow_from_the_committed_records(rewritten):
    """But for the last digits of a sum, which another version of Python rounds otherwise."""
    found, kept = (dict(leaves(json.loads((one / "results.json").read_text()))) for one in (rewritten, PROJECT.reports))
    assert list(found) == list(kept)
    numbers = {place for place, value in kept.items() if isinstance(value, float)}
    assert {place: found[place] for place in numbers} == pytest.approx(
        {place: kept[place] for place in numbers}, rel=1e-12
    )
    assert [place for place in kept if place not in numbers and found[place] != kept[place]] == []


def test_every_claim_of_the_spec_is_judged_with_its_origin():
    spec = load_spec(PROJECT.spec)
    assert [claim["id"] for claim in RESULTS["claims"]] == [claim.id for claim in spec.claims]
    for claim in RESULTS["claims"]:
        keys = {
            "id",
            "metric",
            "reported",
            "reproduced",
            "floor",
            "tolerance",
            "verdict",
            "commit",
            "config_hash",
            "machine",
            "seeds",
        }
        assert keys <= claim.keys()
        if claim["verdict"] != "could not run":
            assert claim["commit"] and claim["config_hash"] and claim["machine"]
            assert claim["seeds"] == spec.seeds and len(claim["reproduced"]["values"]) == len(spec.seeds) >= 3
            assert claim["reproduced"]["spread"] is not None


def test_no_claim_of_the_2d_experiments_is_left_undecided_for_want_of_a_run():
    undecided = [
        claim["id"]
        for claim in RESULTS["claims"]
        if claim["experiment"].startswith("2d-") and claim["verdict"] == "could not run"
    ]
    assert not undecided


def test_the_committed_runs_are_the_shipped_configurations_at_one_clean_commit_for_a_family():
    """A family is what one report compares: the 2-D experiments, and each image experiment by itself."""
    records = read_records(PROJECT.reports / "records")
    assert not [record["experiment"] for record in records if record["departures"]]
    assert not [record["commit"] for record in records if not re.fullmatch(r"[0-9a-f]{40}", record["commit"])]
    commits = defaultdict(set)
    for record in records:
        commits["2d-*" if record["experiment"].startswith("2d-") else record["experiment"]].add(record["commit"])
    assert not {family: found for family, found in commits.items() if len(found) > 1}


def test_the_verdicts_on_the_page_are_those_of_the_results():
    for claim in RESULTS["claims"]:
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| **{claim['id']}** ")]
        left_open = ", open" if claim["settled"] is False else ""
        assert f"| {claim['verdict']}{left_open} |" in row


def test_every_picture_of_the_page_is_committed():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE)
    assert len(pictures) >= 5
    assert not [name for name in pictures if not (PROJECT.reports / name).is_file()]


def test_judging_is_a_function_of_spec_and_records():
    spec, records = load_spec(PROJECT.spec), read_records(PROJECT.reports / "records")
    assert judge_all(spec, records) == judge_all(spec, records)
