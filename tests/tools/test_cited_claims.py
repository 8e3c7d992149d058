"""Claims whose paper says no number, and claims that another text tells of."""

import copy
from pathlib import Path

import pytest
from toy_project import SPEC

from repro.config import validate
from repro.errors import BadInput
from repro_tools.check.coverage import unsourced
from repro_tools.check.paper import Paper, make_page
from repro_tools.check.sources import not_found, quotes_alone
from repro_tools.report.judge import judge
from repro_tools.report.markup import as_reported
from repro_tools.spec import Spec, claim_hash

PAPER = Paper(Path("paper.txt"), {1: make_page("A method. The constant is about as large as the line.")})
CITED = {"origin": "cited", "where": "a summary, example.org/summary.md", "quote": "the constant is **3** in the paper"}


def spec(**changes):
    data = copy.deepcopy(SPEC)
    data["claims"] = [data["claims"][0] | changes]
    data["settings"] = []
    return validate(Spec, data, "spec.yaml")


def findings(made, paper=None):
    found = [*unsourced(made, {}, Path()), *quotes_alone(made), *(not_found(made, paper) if paper else ())]
    return [f"{one.kind}: {one.place}: {one.found}" for one in found if "claim" in one.place]


def test_a_comparison_without_a_number_needs_the_words_alone():
    quoted = {"kind": "at_most", "reported": None, "where": "page 1", "quote": "is about as large as the line"}
    assert findings(spec(**quoted), PAPER) == []
    assert findings(spec(**quoted | {"quote": None}), PAPER) == ["unsourced: spec.yaml: claim constant: quote: none"]
    elsewhere = findings(spec(**quoted | {"quote": "is twice as large as the line"}), PAPER)
    assert elsewhere == [
        "not found: spec.yaml: claim constant: quote: 'is twice as large as the line', which is not on page 1"
    ]


@pytest.mark.parametrize("kind", ["equal", "within"])
def test_a_distance_needs_a_number_to_be_measured_from(kind):
    with pytest.raises(BadInput, match=f"a reported value for kind {kind}"):
        spec(kind=kind, reported=None)


def test_a_claim_without_a_number_is_judged_by_its_bound_and_shown_without_one():
    made = spec(kind="at_most", reported=None, floor="constant.value")
    hashes = {"constant": claim_hash(made, made.claims[0])}
    records = [
        {
            "seed": seed, "metrics": {"constant.value": 0.4}, "departures": [], "claims": hashes, "commit": "0", "config_hash": "0",
            "machine": {"device": "cpu", "processor": "p", "cores": 1},
        }
        for seed in made.seeds
    ]  # fmt: skip
    judged = judge(made, made.claims[0], records)
    assert (judged.verdict, judged.reported, judged.settled) == ("reproduced", None, True)
    assert as_reported(None) == ""


def test_a_cited_claim_names_its_source_and_is_not_looked_for_in_the_paper():
    assert findings(spec(**CITED), PAPER) == []
    assert findings(spec(**CITED | {"where": "somebody said so"})) == [
        "unsourced: spec.yaml: claim constant: where: 'somebody said so'"
    ]
    assert findings(spec(**CITED | {"quote": "the constant is **4** in the paper"})) == [
        "contradicted: spec.yaml: claim constant: reported: 3.0, but its quote says 4"
    ]


def test_where_a_claim_was_read_changes_no_hash():
    made, cited = spec(), spec(origin="cited")
    assert claim_hash(made, made.claims[0]) == claim_hash(cited, cited.claims[0])
