import copy
import json

import pytest
from toy_project import SPEC

from repro.config import validate
from repro.errors import BadInput
from repro.report import collect, judge_all, read_records
from repro.spec import Spec, claim_hashes


def spec(**claim):
    data = copy.deepcopy(SPEC)
    data["claims"][0].update(claim)
    return validate(Spec, data, "spec.yaml")


def record(spec, seed, metrics, departures=(), claims=None):
    return {
        "experiment": "toy",
        "seed": seed,
        "metrics": metrics,
        "departures": list(departures),
        "claims": claim_hashes(spec, "toy") if claims is None else claims,
        "commit": "abc",
        "config_hash": "def",
        "machine": {"processor": "p", "cores": 2, "device": "cpu"},
    }


def verdict(spec, *values, **changes):
    records = [record(spec, seed, {"constant.value": value}, **changes) for seed, value in enumerate(values)]
    (judgement,) = judge_all(spec, records)
    return judgement


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3.0, 3.0), "reproduced"),
        ((1.5, 1.6), "reproduced"),
        ((5.0, 5.1), "close"),
        ((0.1, 0.2), "close"),
        ((7.0, 7.1), "not reproduced"),
        ((-3.0, -3.1), "not reproduced"),
    ],
)
def test_a_value_is_held_against_the_relative_tolerance(values, expected):
    """Reported 3, tolerance 0.5 and 1.0 of it: 1.5 to 4.5 is reproduced, 0 to 6 is close."""
    assert verdict(spec(), *values).verdict == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(-9.0, "reproduced"), (0.5, "reproduced"), (0.51, "close"), (1.01, "not reproduced")]
)
def test_an_at_most_claim_is_held_against_the_bound_itself(value, expected):
    assert verdict(spec(kind="at_most", reported=0.9), value, value).verdict == expected


def test_a_ratio_divides_seed_by_seed():
    """The mean of ratios (2.25) is not the ratio of means (1.6)."""
    claim = spec(metric="a", divided_by="b", reported=2.25)
    records = [record(claim, 0, {"a": 4.0, "b": 1.0}), record(claim, 1, {"a": 2.0, "b": 4.0})]
    assert judge_all(claim, records)[0].reproduced["mean"] == 2.25


def test_without_a_run_a_claim_could_not_run():
    assert judge_all(spec(), [])[0].verdict == "could not run"


def test_a_metric_that_no_run_measured_could_not_run():
    assert verdict(spec(metric="other"), 3.0, 3.0).verdict == "could not run"


def test_a_shortened_run_never_counts_however_good():
    judgement = verdict(spec(), 3.0, 3.0, departures=["phases.line.iterations: 12 -> 5"])
    assert judgement.verdict == "inconclusive" and "phases.line.iterations: 12 -> 5" in judgement.reason


def test_a_tolerance_changed_after_the_run_never_counts():
    judgement = verdict(spec(), 3.0, 3.0, claims={"constant": "another hash"})
    assert judgement.verdict == "inconclusive" and "changed after the run" in judgement.reason


def test_too_few_seeds_decide_nothing():
    judgement = verdict(spec(), 3.0)
    assert judgement.verdict == "inconclusive" and judgement.reason == "no run of seed 1"


def test_seeds_beyond_the_planned_ones_do_not_count():
    """The planned seeds 0 and 1 give 3.0; seed 2, added later, would make the claim fail."""
    judgement = verdict(spec(), 3.0, 3.0, 700.0)
    assert judgement.verdict == "reproduced" and judgement.seeds == [0, 1]


def test_other_seeds_do_not_stand_in_for_the_planned_ones():
    claim = spec()
    records = [record(claim, seed, {"constant.value": 3.0}) for seed in (0, 7, 8)]
    assert judge_all(claim, records)[0].reason == "no run of seed 1"


def test_a_ratio_to_zero_is_no_value():
    claim = spec(metric="a", divided_by="b")
    assert (
        judge_all(claim, [record(claim, seed, {"a": 1.0, "b": 0.0}) for seed in (0, 1)])[0].verdict == "could not run"
    )


def test_a_shortened_run_does_not_take_the_place_of_a_full_one(tmp_path):
    claim = spec()

    def run(runs, departures):
        path = tmp_path / runs / "toy" / "seed-0" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record(claim, 0, {}, departures=departures)))
        return tmp_path / runs

    full, short = run("full", []), run("short", ["phases.line.iterations: 12 -> 5"])
    collect(full, tmp_path / "reports")
    with pytest.raises(
        BadInput, match="found a shortened or altered run, expected none in the place of the full one .*--out"
    ):
        collect(short, tmp_path / "reports")
    assert collect(full, tmp_path / "reports")[0]["departures"] == []


def test_seeds_that_disagree_decide_nothing():
    judgement = verdict(spec(), 3.0, 7.0)
    assert judgement.verdict == "inconclusive" and "the seeds disagree" in judgement.reason


def test_a_reported_value_below_the_floor_is_said():
    claim = spec(floor="floor")
    records = [record(claim, seed, {"constant.value": 4.0, "floor": 3.5 + seed}) for seed in range(2)]
    judgement = judge_all(claim, records)[0]
    assert judgement.floor["mean"] == 4.0 and "the reported value is below the floor" in judgement.reason


def test_a_judgement_says_where_it_comes_from():
    judgement = verdict(spec(), 3.0, 3.2)
    assert (judgement.seeds, judgement.commit, judgement.config_hash, judgement.machine) == (
        [0, 1],
        ["abc"],
        ["def"],
        ["p, 2 cores"],
    )
    assert judgement.reproduced["values"] == [3.0, 3.2] and judgement.reproduced["spread"] == pytest.approx(
        0.2 / 2**0.5
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"experiment": 1'])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(BadInput, match="bad.json: found no run record"):
        read_records(tmp_path)


def test_records_are_read_in_order_of_experiment_and_seed(tmp_path):
    one = spec()
    for name, seed in (("a", 10), ("b", 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(one, seed, {})))
    assert [each["seed"] for each in read_records(tmp_path)] == [9, 10]
