"""m41: a tolerance chosen after the result.

A run stores a hash of each of its claims, tolerance included. A claim whose value or tolerance is another one now is inconclusive and the page says
why, also when the networks are evaluated anew. Evidence that is added to the spec, and other claims, move no verdict.
"""

import copy
from pathlib import Path

import pytest
import yaml
from proof import Proof
from tiny_method import ORIGIN, SPEC, runtime, train, write_project

from repro.config import digest
from repro_tools import evaluate, spec
from repro_tools.evaluate import evaluate_anew, find_runs
from repro_tools.report import gather, judge
from repro_tools.report.gather import write_report
from repro_tools.report.results import read_records
from repro_tools.spec import claim_hashes, load_spec

REFERENCE = Path(__file__).parents[2] / "reference_impl"
CHANGED = "the claim or its tolerance was changed after the run"
PLANNED = SPEC | {"seeds": [1]}


def with_(claim=None, tolerance=None):
    """The spec with other fields of its claim, or of the claim's tolerance."""
    data = copy.deepcopy(PLANNED)
    data["claims"][0] |= claim or {}
    data["tolerances"]["narrow"] |= tolerance or {}
    return data


def with_evidence():
    """What may be written after the runs: a quote, a suspected cause, a second claim, and a tolerance that no claim of the runs has."""
    data = with_({"quote": "counts **6** steps"})
    data["gaps"] = [{"claims": "count", "cause": "Some.", "evidence": "None yet.", "ablation": "Another run."}]
    data["tolerances"]["other"]["close"] = 0.9
    data["claims"].append(PLANNED["claims"][0] | {"id": "second", "tolerance": "other"})
    return data


AFTERWARDS = {
    "a wider tolerance": with_(tolerance={"reproduced": 0.2}),
    "a narrower tolerance": with_(tolerance={"close": 0.06}),
    "the name of another tolerance": with_({"tolerance": "other"}),
    "another value of the paper": with_({"reported": 6.6}),
}


def check(tmp_path):
    """Measured is 6.6, by the spec of the run close to the paper's 6, and nothing that is chosen afterwards makes it anything better or worse."""
    project = write_project(tmp_path / "project", **PLANNED)
    train(project, 1)

    def judged(data):
        project.spec.write_text(yaml.safe_dump(data))
        return write_report(project, project.root / "runs", project.reports, "Results")[0]

    assert judged(PLANNED).verdict == "close", f"by the spec of the run: found {judged(PLANNED).verdict}"
    for what, data in AFTERWARDS.items():
        for when in ("after the run", "after the run and evaluated anew"):
            if "anew" in when:
                evaluate_all_anew(project)
            found, page = judged(data), (project.reports / "README.md").read_text()
            assert (found.verdict, found.reason) == ("inconclusive", CHANGED) and CHANGED in page, (
                f"{what} {when}: found {found.verdict}, {found.reason}"
            )
    found = judged(with_evidence())
    assert found.verdict == "close", f"evidence written after the run: found {found.verdict}, {found.reason}"


def evaluate_all_anew(project):
    """As `repro evaluate` does, under the spec as it is now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "describe", lambda *_: ORIGIN)
        for run in find_runs(project, ["count"], None, [], project.root / "runs"):
            evaluate_anew(run, runtime())


def hash_by(monkeypatch, content):
    """Another hash of a claim, for runs and for reports."""
    for module in (spec, judge):
        monkeypatch.setattr(module, "claim_hash", lambda whole, claim: digest(content(whole, claim)))


def content_of(whole, claim):
    return [part.model_dump(mode="json", exclude={"quote"}) for part in (claim, whole.tolerances[claim.tolerance])]


def tolerance_hashed_by_its_name(monkeypatch):
    """The claim names its tolerance, and the claim is what is hashed."""
    hash_by(monkeypatch, lambda whole, claim: content_of(whole, claim)[0])


def bounds_hashed_alone(monkeypatch):
    """The tolerance is what is hashed, the value that it is relative to is not."""
    hash_by(monkeypatch, lambda whole, claim: [claim.id, claim.tolerance, content_of(whole, claim)[1]])


def hashed_when_reported(monkeypatch):
    """The report takes the hashes from the spec as it is now, not from the runs."""
    real = gather.judge_all

    def with_hashes_of_today(one, records):
        return real(one, [record | {"claims": claim_hashes(one, record["experiment"])} for record in records])

    monkeypatch.setattr(gather, "judge_all", with_hashes_of_today)


def hashed_anew_when_evaluated(monkeypatch):
    """A later evaluation writes a record like a run's, with the claims as they are by then."""
    real = evaluate.write_record

    def write_record(path, record):
        return real(path, record | {"claims": claim_hashes(load_spec(path.parents[3] / "spec.yaml"), "count")})

    monkeypatch.setattr(evaluate, "write_record", write_record)


def whole_spec_hashed(monkeypatch):
    """Then a suspected cause that is written down afterwards costs every verdict."""
    hash_by(monkeypatch, lambda whole, claim: whole.model_dump(mode="json"))


def reason_of_the_tolerance_left_out(monkeypatch):
    """Values and words decide the verdict, the reason given for a tolerance does not."""
    hash_by(
        monkeypatch,
        lambda whole, claim: [{k: v for k, v in one.items() if k != "why"} for one in content_of(whole, claim)],
    )


def bounds_in_the_place_of_the_name(monkeypatch):
    """But with the name kept: the claims of two runs stay comparable."""

    def content(whole, claim):
        of_claim, of_tolerance = content_of(whole, claim)
        return {**of_claim, "bounds": [of_tolerance["reproduced"], of_tolerance["close"]]}

    hash_by(monkeypatch, content)


PROOFS = [
    Proof(
        check,
        plant={
            tolerance_hashed_by_its_name: "a wider tolerance after the run: found reproduced",
            bounds_hashed_alone: "another value of the paper after the run: found reproduced",
            hashed_when_reported: "a wider tolerance after the run: found reproduced",
            hashed_anew_when_evaluated: "a wider tolerance after the run and evaluated anew: found reproduced",
            whole_spec_hashed: "evidence written after the run: found inconclusive",
        },
        innocent=[reason_of_the_tolerance_left_out, bounds_in_the_place_of_the_name],
    )
]


def test_proof(case):
    case()


def test_what_tolerances_of_twice_the_width_would_have_claimed_of_this_repository():
    """The figures of the entry."""
    whole, records = load_spec(REFERENCE / "spec.yaml"), read_records(REFERENCE / "reports" / "records")
    reproduced = [one.verdict for one in judge.judge_all(whole, records)].count("reproduced")

    def twice(one):
        return one.model_copy(update={"reproduced": 2 * one.reproduced, "close": 2 * one.close})

    wider = whole.model_copy(update={"tolerances": {name: twice(one) for name, one in whole.tolerances.items()}})
    restamped = [record | {"claims": claim_hashes(wider, record["experiment"])} for record in records]
    assert [one.verdict for one in judge.judge_all(wider, records)].count("reproduced") == 0
    assert (reproduced, [one.verdict for one in judge.judge_all(wider, restamped)].count("reproduced")) == (14, 20)
