import copy
import json
import re
from dataclasses import asdict

import pytest
from toy_project import SPEC, write_yaml

from repro.config import validate
from repro.errors import BadInput
from repro.method import find_project
from repro_tools.cli import main
from repro_tools.report.gather import write_report
from repro_tools.report.judge import causes, check_patterns, judge_all, unexplained
from repro_tools.report.markup import as_reported, edition_of, number, title_of
from repro_tools.report.results import Results, collect, group_runs, read_records
from repro_tools.report.results_page import deviation_lines, interval_text, results_page
from repro_tools.report.statistics import Interval
from repro_tools.spec import Paper, Spec, claim_hashes


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
        ((6.0, 6.0), "close"),
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3.5, "reproduced"), (2.5, "reproduced"), (3.51, "close"), (2.0, "close"), (4.01, "not reproduced"), (1.9, "not reproduced")],
)  # fmt: skip
def test_a_claim_within_is_held_against_the_distance_itself(value, expected):
    """Reported 3, tolerance 0.5 and 1.0: for kind equal all of these would be close or better."""
    judgement = verdict(spec(kind="within"), value, value)
    assert judgement.verdict == expected
    assert judgement.reason == f"{value - 3:+.3g} from the reported value, 0.5 allowed"


def test_a_claim_within_may_be_about_zero():
    assert verdict(spec(kind="within", reported=0.0), 0.4, 0.5).verdict == "reproduced"
    assert verdict(spec(kind="within", reported=0.0), -0.6, -0.6).verdict == "close"


def from_below(**changes):
    data = copy.deepcopy(SPEC)
    data["tolerances"]["wide"].update(reproduced=1.0, close=0.5)
    data["claims"][0].update(kind="at_least", **changes)
    return validate(Spec, data, "spec.yaml")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, "reproduced"), (900.0, "reproduced"), (0.99, "close"), (0.5, "close"), (0.49, "not reproduced"), (-9.0, "not reproduced")],
)  # fmt: skip
def test_an_at_least_claim_is_held_against_the_bound_from_below(value, expected):
    judgement = verdict(from_below(), value, value)
    assert judgement.verdict == expected and judgement.reason == "at least 1 required"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.1, 1.11), True),  # 1.04 to 1.17, all of it above the bound
        ((1.1, 1.2), False),  # 0.5 to 1.8
        ((0.7, 0.71), True),  # 0.64 to 0.77, all of it close
        ((0.3, 0.31), True),  # 0.24 to 0.37, nowhere close
    ],
)
def test_a_verdict_from_below_is_settled_where_the_whole_interval_agrees(values, expected):
    assert verdict(from_below(), *values).settled is expected


def test_a_difference_is_taken_seed_by_seed_and_its_interval_is_that_of_the_differences():
    """Differences 1 and 2: 1.5 ± 12.706 * 0.7071 / 1.4142. The seeds lie far apart, the differences do not."""
    claim = from_below(metric="a", minus="b", reported=1.5)
    records = [record(claim, 0, {"a": 10.0, "b": 9.0}), record(claim, 1, {"a": 60.0, "b": 58.0})]
    (judgement,) = judge_all(claim, records)
    assert (judgement.metric, judgement.reproduced["values"], judgement.verdict) == ("a - b", [1.0, 2.0], "reproduced")
    assert (judgement.interval.low, judgement.interval.high) == pytest.approx((-4.853, 7.853), abs=1e-3)
    assert judgement.interval.scale == "linear" and judgement.pairs is None
    page = results_page(results(claim, records))
    assert row(page, "**constant**")[1] == "`a - b`" and "A against B" not in page


def test_a_difference_needs_both_metrics_and_may_subtract_zero():
    claim = from_below(metric="a", minus="b")
    assert judge_all(claim, [record(claim, seed, {"a": 4.0}) for seed in (0, 1)])[0].verdict == "could not run"
    zero = [record(claim, seed, {"a": 4.0, "b": 0.0}) for seed in (0, 1)]
    assert judge_all(claim, zero)[0].reproduced["mean"] == 4.0


def test_a_ratio_divides_seed_by_seed():
    """The mean of ratios (2.25) is not the ratio of means (1.6)."""
    claim = spec(metric="a", divided_by="b", reported=2.25)
    records = [record(claim, 0, {"a": 4.0, "b": 1.0}), record(claim, 1, {"a": 2.0, "b": 4.0})]
    assert judge_all(claim, records)[0].reproduced["mean"] == 2.25


def test_a_judgement_says_what_was_claimed_and_how_far_off_it_is():
    judgement = verdict(spec(), 2.0, 4.0)
    claimed = judgement.id, judgement.statement, judgement.where, judgement.experiment, judgement.kind, judgement.metric
    assert claimed == ("constant", "The constant is three.", "page 1", "toy", "equal", "constant.value")
    assert judgement.reported == 3.0 and judgement.tolerance == {
        "reproduced": 0.5,
        "close": 1.0,
        "why": "chosen for the test",
    }
    assert judgement.reproduced == {"mean": 3.0, "spread": pytest.approx(2**0.5), "values": [2.0, 4.0]}
    assert judgement.reason == "+0.0% from the reported value, 50% allowed"
    assert verdict(spec(), 3.6, 3.6).reason == "+20.0% from the reported value, 50% allowed"
    assert verdict(spec(kind="at_most"), 0.1, 0.1).reason == "at most 0.5 allowed"


def test_a_judgement_names_the_machines_and_their_devices():
    claim = spec()
    on_a_gpu = record(claim, 1, {"constant.value": 3.0}) | {
        "machine": {"processor": "p", "cores": 2, "device": "NVIDIA T4"}
    }
    (judgement,) = judge_all(claim, [record(claim, 0, {"constant.value": 3.0}), on_a_gpu])
    assert judgement.machine == ["p, 2 cores", "p, 2 cores, NVIDIA T4"]


def test_a_ratio_is_told_as_one_and_needs_both_metrics():
    claim = spec(metric="a", divided_by="b", reported=2.0)
    both = [record(claim, seed, {"a": 4.0, "b": 2.0}) for seed in (0, 1)]
    assert judge_all(claim, both)[0].metric == "a / b"
    assert judge_all(claim, [record(claim, seed, {"a": 4.0}) for seed in (0, 1)])[0].verdict == "could not run"


@pytest.mark.parametrize(("floor", "told"), [(3.5, True), (3.0, False), (2.5, False)])
def test_a_value_below_the_floor_is_told_beside_the_verdict(floor, told):
    claim = spec(floor="floor")
    judgement = judge_all(claim, [record(claim, seed, {"constant.value": 3.0, "floor": floor}) for seed in (0, 1)])[0]
    assert judgement.reason == "+0.0% from the reported value, 50% allowed" + told * (
        "; the reported value is below the floor of this metric"
    )


def test_without_a_run_a_claim_could_not_run():
    (judgement,) = judge_all(spec(), [])
    assert (judgement.verdict, judgement.reason) == ("could not run", "no run of this experiment measured it")


def test_a_metric_that_no_run_measured_could_not_run():
    assert verdict(spec(metric="other"), 3.0, 3.0).verdict == "could not run"


def test_a_shortened_run_never_counts_however_good():
    judgement = verdict(spec(), 3.0, 3.0, departures=["phases.line.iterations: 12 -> 5", "pool_size: 64 -> 8"])
    assert judgement.verdict == "inconclusive"
    assert judgement.reason.endswith(": phases.line.iterations: 12 -> 5; pool_size: 64 -> 8")


def test_a_tolerance_changed_after_the_run_never_counts():
    judgement = verdict(spec(), 3.0, 3.0, claims={"constant": "another hash"})
    assert (judgement.verdict, judgement.reason) == (
        "inconclusive",
        "the claim or its tolerance was changed after the run",
    )


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


def planned(seeds, *values):
    """The verdict on runs of seeds 0, 1, ... that were made when the spec planned `seeds`; it plans 0 and 1 now."""
    one = spec()
    records = [record(one, seed, {"constant.value": v}) | {"planned_seeds": seeds} for seed, v in enumerate(values)]
    (judgement,) = judge_all(one, records)
    return judgement


def test_seeds_that_were_chosen_among_those_planned_never_count():
    judgement = planned([0, 1, 2, 3], 3.0, 3.0, 700.0, 900.0)
    assert judgement.verdict == "inconclusive"
    assert judgement.reason == "dropped from the planned seeds after the runs: 2, 3"


def test_a_seed_that_was_planned_after_a_run_is_said_in_the_line_of_the_verdict():
    judgement = planned([0], 3.0, 3.0)
    assert judgement.verdict == "reproduced"
    assert judgement.reason == "+0.0% from the reported value, 50% allowed; added to the planned seeds after a run: 1"
    assert "planned" not in planned([0, 1], 3.0, 3.0).reason


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
    assert judgement.verdict == "inconclusive" and judgement.reason == "the seeds disagree: not reproduced, reproduced"


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


@pytest.mark.parametrize("field", ["departures", "planned_seeds", "placeholders"])
def test_a_field_of_another_kind_makes_a_file_no_record(tmp_path, field):
    (tmp_path / "bad.json").write_text(json.dumps(record(spec(), 0, {}) | {field: "text"}))
    with pytest.raises(BadInput, match=f"bad.json: found no run record .{field}: str, not list"):
        read_records(tmp_path)


def test_records_are_read_in_order_of_experiment_and_seed(tmp_path):
    one = spec()
    for name, seed in (("a", 10), ("b", 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(one, seed, {})))
    assert [each["seed"] for each in read_records(tmp_path)] == [9, 10]


def test_a_second_record_of_a_run_is_refused(tmp_path):
    """A copy under another name would count its seed twice, and make the interval narrower."""
    for name in ("toy-seed-0", "toy-seed-0-copy"):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(spec(), 0, {})))
    with pytest.raises(BadInput, match="toy-seed-0.json: found a second record of toy, seed 0, expected one"):
        read_records(tmp_path)


def test_a_copied_run_is_refused_before_it_is_kept(tmp_path):
    for name in ("seed-0", "seed-0-copy"):
        path = tmp_path / "runs" / "toy" / name / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record(spec(), 0, {})))
    with pytest.raises(BadInput, match="seed-0-copy/record.json: found a second record of toy, seed 0, expected one"):
        collect(tmp_path / "runs", tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


# --- intervals and comparisons beside the verdicts -----------------------------------------------------------------


def ratios(*pairs, **changes):
    claim = spec(metric="a", divided_by="b", **changes)
    (judgement,) = judge_all(claim, [record(claim, seed, {"a": a, "b": b}) for seed, (a, b) in enumerate(pairs)])
    return judgement


def test_the_interval_is_of_the_planned_seeds_alone():
    """2 and 4: 3 ± t(1) * 1.414 / 1.414 = 3 ± 12.706. Seed 2 is not planned."""
    judgement = verdict(spec(), 2.0, 4.0, 50.0)
    assert (judgement.interval.low, judgement.interval.high, judgement.interval.n) == pytest.approx(
        (-9.706, 15.706, 2), abs=1e-3
    )


def test_one_seed_has_no_interval():
    assert verdict(spec(), 3.0).interval is None


def test_a_ratio_is_compared_seed_by_seed_on_the_log_scale():
    judgement = ratios((2.0, 4.0), (10.0, 20.0), kind="at_most", reported=0.5)
    assert judgement.pairs.ratios == [0.5, 0.5] and judgement.pairs.below == 2
    assert judgement.interval.low == pytest.approx(0.5) == judgement.interval.high and judgement.interval.scale == "log"


def test_a_plain_claim_has_no_pairs():
    assert verdict(spec(), 3.0, 3.1).pairs is None


@pytest.mark.parametrize(
    "values, expected",
    [
        ((3.0, 3.01), True),  # 2.88 to 3.13, all of it reproduced
        ((4.0, 4.4), False),  # 1.66 to 6.74, beyond both bands
        ((7.0, 7.01), True),  # 6.94 to 7.07, nowhere close
        ((6.2, 6.3), False),  # 5.6 to 6.9, of which a part is close
        ((5.0, 5.01), True),  # all of it close
        ((-0.001, 6.2), None),  # inconclusive: the verdict does not come from the mean
    ],
)
def test_a_verdict_is_settled_where_the_whole_interval_agrees(values, expected):
    """Reported 3: 1.5 to 4.5 is reproduced, 0 to 6 is close."""
    judgement = verdict(spec(reported=3.0), *values) if expected is not None else verdict(spec(), 3.0, 7.0)
    assert judgement.settled is expected


def test_an_interval_that_reaches_beyond_both_sides_of_the_reported_value_is_not_settled():
    """Not reproduced at either end, and reproduced in between: 3 lies inside of the interval."""
    data = copy.deepcopy(SPEC)
    data["tolerances"]["wide"].update(reproduced=0.01, close=0.02)
    one = validate(Spec, data, "spec.yaml")
    assert verdict(one, 3.2, 3.5).verdict == "not reproduced" and verdict(one, 3.2, 3.5).settled is False


# --- causes ---------------------------------------------------------------------------------------------------------


def with_gap(claims="constant"):
    data = copy.deepcopy(SPEC)
    data["gaps"] = [
        {
            "claims": claims,
            "cause": "Too few steps.",
            "evidence": "The loss still falls.",
            "ablation": "`repro run toy`",
        }
    ]
    return validate(Spec, data, "spec.yaml")


def test_a_cause_stands_beside_a_claim_that_was_missed_and_no_other():
    one = with_gap()
    missed, fine = verdict(one, 7.0, 7.1), verdict(one, 3.0, 3.1)
    assert causes(one, missed) == [1] and unexplained(one, [missed]) == []
    assert causes(one, fine) == []


def test_a_missed_claim_without_a_cause_is_named(project, capsys):
    spec_without = spec()
    missed = verdict(spec_without, 7.0, 7.1)
    assert unexplained(spec_without, [missed]) == ["constant"]
    assert "Not reproduced and without any suspected cause (1 of 1): `constant`" in page(spec_without, 7.0, 7.1)
    assert "Every claim that was not reproduced has a suspected cause." in page(with_gap(), 7.0, 7.1)


def test_a_gap_that_matches_no_claim_is_refused(project, capsys):
    write_yaml(project / "spec.yaml", json.loads(with_gap("constnat").model_dump_json()))
    assert main(["report"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "gaps.0.claims: found 'constnat', expected the id of a claim" in line
    assert not (project / "reports").exists()
    check_patterns(with_gap("c*"), project / "spec.yaml")


def test_a_verdict_that_the_interval_leaves_open_says_so_where_it_stands():
    settled, left_open = (3.0, 3.01), (3.0, 4.0)
    assert "| reproduced |" in page(spec(), *settled) and "reproduced, open" not in page(spec(), *settled)
    assert "| reproduced, open |" in page(spec(), *left_open) and "1 reproduced (1 open)" in page(spec(), *left_open)


def withdrawing(claims="constant", instead=None, **claim):
    data = copy.deepcopy(SPEC)
    data["claims"][0].update(claim)
    data["withdrawn"] = [{"claims": claims, "why": "it was measured on airplanes only", "instead": instead}]
    return validate(Spec, data, "spec.yaml")


@pytest.mark.parametrize(
    ("values", "was"), [((3.0, 3.0), "reproduced"), ((7.0, 7.1), "not reproduced"), ((5.0, 5.1), "close")]
)
def test_a_withdrawn_claim_is_inconclusive_and_says_what_it_was(values, was):
    found = verdict(withdrawing("const*"), *values)
    assert found.verdict == "inconclusive"
    assert found.reason.startswith(f"withdrawn: it was measured on airplanes only; by the values: {was} (")
    assert found.reproduced["values"] == list(values) and found.settled is None
    assert verdict(withdrawing("other"), *values).verdict == was


def test_a_withdrawal_changes_no_hash_and_makes_no_verdict_of_a_run_that_has_none():
    assert claim_hashes(withdrawing(), "toy") == claim_hashes(spec(), "toy")
    (nothing,) = judge_all(withdrawing(), [])
    assert nothing.verdict == "could not run"
    shortened = verdict(withdrawing(), 3.0, 3.0, departures=["phases.line.iterations: 12 -> 5"])
    assert shortened.reason.startswith("withdrawn: ") and "by the values: inconclusive (shortened" in shortened.reason


def test_the_page_says_why_a_claim_was_withdrawn():
    assert "withdrawn: it was measured on airplanes only" in page(withdrawing(), 3.0, 3.1)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (withdrawing("constnat"), "withdrawn.0.claims: found 'constnat', expected the id of a claim"),
        (withdrawing(instead="other"), "withdrawn.0.instead: found 'other', expected the id of a claim"),
    ],
)
def test_a_withdrawal_that_names_no_claim_is_refused(project, capsys, one, words):
    write_yaml(project / "spec.yaml", json.loads(one.model_dump_json()))
    assert main(["report"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and not (project / "reports").exists()


# --- the page -------------------------------------------------------------------------------------------------------


def results(one, records, sections=""):
    return Results("Results", one, records, group_runs(records, []), judge_all(one, records), sections)


def page(one, *values, **changes):
    return results_page(
        results(one, [record(one, seed, {"constant.value": value}, **changes) for seed, value in enumerate(values)])
    )


def row(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[1:-1]]


def test_a_record_of_an_older_kit_can_still_be_shown():
    """`record` above has the fields that were always there, and nothing else."""
    text = page(spec(), 3.0, 3.2)
    assert row(text, "**constant**")[3:6] == ["3.10 ± 0.14", "1.8 to 4.4", "reproduced"]
    assert row(text, "R1")[:3] == ["R1", "toy", "0, 1"]


def test_runs_that_differ_in_the_seed_alone_are_one_row():
    one = spec()
    records = [
        record(one, seed, {"constant.value": 3.0})
        | {"command": f"repro run toy --seeds {seed} --device cpu", "wall_s": {"line": 60.0 * seed}}
        for seed in (0, 1)
    ]
    (group,) = group_runs(records, [])
    assert (
        group.command == "repro run toy --seeds SEED --device cpu"
        and group.minutes == [0.0, 1.0]
        and group.seeds == [0, 1]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"commit": "other"},
        {"config_hash": "other"},
        {"machine": {"processor": "q", "cores": 2, "device": "cpu"}},
        {"departures": ["a: 1 -> 2"]},
        {"micro_batches": {"line": 2}},
        {"processes": 2},
        {"command": "repro run toy --seeds 1 --set a=2"},
        {"config": {"phases": {"line": {"ema_decay": 0.9}}}},
    ],
)
def test_runs_that_differ_in_more_are_told_apart(changes):
    one = spec()
    two = [record(one, 0, {}), record(one, 1, {}) | changes]
    assert [group.id for group in group_runs(two, [])] == ["R1", "R2"]


DIVIDED = {
    "processes": 2, "micro_batches": {"line": 3, "constant": 1}, "workers": 4,
    "parts": {
        "line": [
            {"outcome": "same", "why": "but for the numbers logged as hits", "processes": 2, "micro_batches": 3, "draws": True},
            {"outcome": "refused", "why": "its batch norm | <b>takes</b>", "processes": 1, "micro_batches": 8, "draws": False},
        ],
        "constant": [
            {"outcome": "per part", "why": "the paper means the statistics of batch norm", "processes": 2, "micro_batches": 1, "draws": False},
            {"outcome": "not measured", "why": "its gradient is zero", "processes": 2, "micro_batches": 1, "draws": False},
            {"outcome": "same", "why": "", "processes": 2, "micro_batches": 1, "draws": False},
        ],
    },
}  # fmt: skip


def test_the_parts_of_a_run_stand_beside_its_machine_with_what_is_known_of_them():
    one = spec()
    records = [record(one, seed, {"constant.value": 3.0}) | DIVIDED for seed in (0, 1)]
    shown = results_page(results(one, records))
    assert "p, 2 cores, 2 processes, line in 3 micro-batches, 4 workers" in row(shown, "R1")
    assert [line for line in shown.splitlines() if line.startswith("- R1: ")] == [
        "- R1: line, 2 processes of 3 micro-batches: the gradient of the whole, but for the numbers logged as hits; what a step draws at "
        "random is equal in distribution only",
        "- R1: line, 8 micro-batches: refused: its batch norm | &lt;b>takes&lt;/b>",
        "- R1: constant, 2 processes: not tried (`parts_define`): the paper means the statistics of batch norm within each part, so their "
        "number is the method's",
        "- R1: constant, 2 processes: not measured: its gradient is zero",
        "- R1: constant, 2 processes: the gradient of the whole",
    ]


def test_of_a_run_in_one_part_nothing_is_said_of_parts():
    one = spec()
    whole = {"processes": 1, "workers": 0}
    shown = results_page(results(one, [record(one, seed, {}) | whole for seed in (0, 1)]))
    assert "p, 2 cores" in row(shown, "R1") and "divided" not in shown
    assert group_runs([record(one, 0, {}) | whole, record(one, 1, {})], [])[0].seeds == [0, 1]


@pytest.mark.parametrize("field", ["micro_batches", "parts"])
def test_parts_of_another_kind_make_a_file_no_record(tmp_path, field):
    (tmp_path / "bad.json").write_text(json.dumps(record(spec(), 0, {}) | {field: [2]}))
    with pytest.raises(BadInput, match=f"bad.json: found no run record .{field}: list, not dict"):
        read_records(tmp_path)


def test_every_row_of_a_claim_names_its_runs():
    text = page(spec(), 3.0, 3.1)
    assert row(text, "**constant**")[-1] == "R1" and row(text, "[toy](#claims-on-toy)")[-1] == "R1"
    assert "nothing here is a best of several" in text


def test_the_checkpoint_is_named():
    one = spec()
    averaged = [
        record(one, seed, {"constant.value": 3.0})
        | {"config": {"phases": {"line": {"ema_decay": 0.99}, "constant": {"ema_decay": None}}}}
        for seed in (0, 1)
    ]
    assert "last step; average of the weights in line" in results_page(results(one, averaged))
    assert "| last step |" in page(one, 3.0, 3.1)


@pytest.mark.parametrize(
    "pairs, shows, below",
    [
        (((1.0, 2.0), (1.0, 2.01)), "A is lower", "2 of 2"),
        (((2.0, 1.0), (2.01, 1.0)), "B is lower", "0 of 2"),
        (((1.0, 2.0), (2.0, 1.0)), "not which is lower", "1 of 2"),
        (((1.0, 2.0), (-1.0, 2.0)), "no interval: a ratio is not positive", "2 of 2"),
        (((1.0, 2.0),), "no interval: one seed", "1 of 1"),
    ],
)
def test_what_the_pairs_show(pairs, shows, below):
    claim = spec(metric="a", divided_by="b", kind="at_most", reported=0.5)
    text = results_page(results(claim, [record(claim, seed, {"a": a, "b": b}) for seed, (a, b) in enumerate(pairs)]))
    (cells,) = [row(line, "`constant`") for line in text.splitlines() if line.startswith("| `constant` ")]
    assert (cells[6], cells[5]) == (shows, below)


def test_text_of_a_spec_breaks_no_table_and_runs_no_script():
    hostile = spec(statement="a | b <script>alert(1)</script>\n\n# Heading `x < y`")
    text = page(hostile, 3.0, 3.1)
    assert "<script" not in text and "\n# Heading" not in text
    assert len(row(text, "**constant**")) == 8 and "`x < y`" in text


def test_the_summary_counts_the_verdicts():
    text = page(spec(), 3.0, 3.01)
    assert row(text, "**all**")[1:6] == ["**1**", "**0**", "**0**", "**0**", "**0**"]
    assert "lies within the tolerance for 1 of 1 claim reproduced." in text


@pytest.mark.parametrize(
    "seconds, told", [(2.0, "6 s"), (240.0, "12 min"), (1200.0, "1.0 hours"), (7200.0, "6.0 hours")]
)
def test_the_time_of_short_runs_is_told_in_minutes(seconds, told):
    one = spec()
    made = [record(one, seed, {"constant.value": 3.0}) | {"wall_s": {"line": seconds}} for seed in range(3)]
    assert f"3 runs in all, {told} of their machines." in results_page(results(one, made))


def test_shortened_runs_are_warned_of_and_counted_nowhere():
    text = page(spec(), 3.0, 3.1, departures=["phases.line.iterations: 12 -> 5"])
    assert "Nothing here counts as a verdict" in text and row(text, "**all**")[4] == "**1**"


def test_the_data_hold_what_the_page_shows(project, capsys):
    one = spec()
    store = project / "reports" / "records"
    store.mkdir(parents=True)
    for seed in (0, 1):
        (store / f"{seed}.json").write_text(json.dumps(record(one, seed, {"constant.value": 3.0 + seed})))
    (judgement,) = write_report(find_project(project), project / "none", project / "reports", "Results")
    data = json.loads((project / "reports" / "results.json").read_text())
    (claim,) = data["claims"]
    assert claim["interval"] == asdict(judgement.interval) and claim["runs"] == ["R1"] == [
        one["id"] for one in data["runs"]
    ]
    assert data["verdicts"]["reproduced"] == 1 and data["unexplained"] == []


# --- digits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "spread", "shown"),
    [
        (1.0002, 0.0057, "1.0002"),  # on which side of 1 is the claim
        (0.0057, 0.0057, "0.0057"),
        (1.04, 0.2, "1.04"),
        (0.2, 0.2, "0.20"),
        (98.0, None, "98.0"),
        (98.0, 0.0, "98.0"),
        (0.0123456, None, "0.0123"),
        (9.996, None, "10.0"),
        (0.9996, 0.0996, "1.00"),
        (1234.4, 345.0, "1234"),
        (-0.001, 0.2, "0.00"),
        (0.0, 0.2, "0"),
        (1.23456e-12, 1.2e-14, "1.235e-12"),
        (6.02e23, None, "6.02e+23"),
        (float("nan"), None, "nan"),
        (1.5, float("nan"), "1.50"),
        (0.1, 5e-17, "0.10000000"),
    ],
)
def test_the_spread_decides_the_digits(value, spread, shown):
    assert number(value, spread) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(98.0, "98.0"), (0.077, "0.077"), (97.42, "97.42"), (1.0, "1.0"), (2048.0, "2048")]
)
def test_a_reported_value_keeps_its_digits(value, shown):
    assert as_reported(value) == shown


def test_one_seed_is_shown_as_exactly_as_the_reported_value():
    assert row(page(spec(reported=97.42), 98.0), "**constant**")[2:4] == ["97.42", "98.00"]
    assert row(page(spec(reported=0.5), 0.6), "**constant**")[2:4] == ["0.5", "0.600"]


@pytest.mark.parametrize(
    ("ends", "scale", "shown"),
    [
        ((1.0002, 0.9861, 1.0143), "linear", "0.986 to 1.014"),
        ((1.4735, 0.6976, 3.1122), "log", "0.70 to 3.1"),
        ((1.0, 0.00123, 813.0), "log", "0.0012 to 813"),
        ((98.0, 98.0, 98.0), "linear", "98.0 to 98.0"),
    ],
)
def test_an_interval_has_the_digits_of_its_reach(ends, scale, shown):
    assert interval_text(Interval(*ends, n=3, level=0.95, scale=scale)) == shown


# --- the paper and its deviations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arxiv", "version", "url", "title", "edition"),
    [
        ("2401.14069", "v1", "https://arxiv.org/abs/2401.14069v1", "[T](https://arxiv.org/abs/2401.14069v1)", "arXiv 2401.14069v1"),
        ("math.ST/0101001", "as given", "http://a.b", "[T](http://a.b)", "arXiv math.ST/0101001, as given"),
        ("not on arXiv", "as given", "file paper.txt", "T", "not on arXiv, as given, file paper.txt"),
        ("none", "", "javascript:alert(1)", "T", "none, javascript:alert(1)"),
        ("none", "2nd", "https://a.b/c(d)e", "[T](https://a.b/c%28d%29e)", "none, 2nd"),
        ("2401.14069", None, None, "T", "arXiv 2401.14069"),
        (None, "v2", "https://a.b", "[T](https://a.b)", "v2"),
        (None, None, "https://a.b", "[T](https://a.b)", "edition not stated"),
        (None, None, None, "T", "edition not stated"),
    ],
)  # fmt: skip
def test_only_web_pages_are_linked_and_only_arxiv_papers_called_so(arxiv, version, url, title, edition):
    paper = Paper(title="T", authors=["A"], arxiv=arxiv, version=version, url=url)
    assert (title_of(paper), edition_of(paper)) == (title, edition)


def test_the_page_names_a_paper_without_an_address():
    data = copy.deepcopy(SPEC)
    data["paper"] |= {"arxiv": "not on arXiv", "version": "as given", "url": "file paper.txt"}
    text = results_page(results(validate(Spec, data, "spec.yaml"), []))
    assert "Paper: Toy (not on arXiv, as given, file paper.txt).\n" in text


@pytest.mark.parametrize("what", ["None known", "none known.", "None.", "None yet known."])
def test_a_deviation_that_says_there_is_none_is_none(what):
    data = SPEC | {"deviations": [{"what": what, "why": "It follows the paper."}]}
    assert deviation_lines(validate(Spec, data, "spec.yaml")) == ["None known."]


def test_a_deviation_that_begins_with_none_is_one():
    data = SPEC | {"deviations": [{"what": "None of the seeds is the paper's.", "why": "It gives none."}]}
    assert deviation_lines(validate(Spec, data, "s")) == ["- None of the seeds is the paper's. It gives none."]
