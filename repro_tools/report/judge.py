"""Verdicts: every claim of the spec held against the records of the runs (SKILL section 9).

A verdict follows from the tolerance that was fixed before the run, and from nothing else here: intervals and comparisons are
shown beside it. Runs that depart from the shipped configuration are shown and never counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev

from repro.errors import BadInput
from repro_tools.placeholders import FEW, of_claim
from repro_tools.report.statistics import Interval, Pairs, compare, mean_interval
from repro_tools.spec import Claim, Spec, Tolerance, claim_hash
from repro_tools.table import listed

REPRODUCED, CLOSE, NOT = "reproduced", "close", "not reproduced"
INCONCLUSIVE, COULD_NOT_RUN = "inconclusive", "could not run"
SHORTENED = "shortened or altered run, it does not count"
VERDICTS = (REPRODUCED, CLOSE, NOT, INCONCLUSIVE, COULD_NOT_RUN)
BELOW_FLOOR = "the reported value is below the floor of this metric"


@dataclass(frozen=True)
class Judgement:
    """One claim and what became of it; `reproduced` and `floor` are summaries over `seeds`, None without a run.

    `interval` is that of the mean, or of the geometric mean where the claim is about a ratio; None for one seed. `pairs` is
    there for a ratio only. `settled`: every value in the interval would get the same verdict; None where there is no interval
    or the verdict does not come from the values. None of the three moves a verdict.
    """

    id: str
    statement: str
    where: str
    experiment: str
    kind: str
    metric: str
    reported: float | None
    reproduced: dict | None
    floor: dict | None
    tolerance: dict
    verdict: str
    reason: str
    seeds: list[int]
    commit: list[str]
    config_hash: list[str]
    machine: list[str]
    interval: Interval | None = None
    pairs: Pairs | None = None
    settled: bool | None = None


def worded(judgement: Judgement) -> str:
    """The verdict as a page shows it: with "open" where a part of the interval would get another one."""
    return f"{judgement.verdict}, open" if judgement.settled is False else judgement.verdict


def judge(spec: Spec, claim: Claim, records: Sequence[dict]) -> Judgement:
    """The verdict on `claim` from `records`, those of its experiment, one per seed."""
    planned = [(record, _value(claim, record)) for record in records if record["seed"] in spec.seeds]
    measured = [(record, value) for record, value in planned if value is not None]
    used, values = [record for record, _ in measured], [value for _, value in measured]
    tolerance = spec.tolerances[claim.tolerance]
    verdict, reason = _not_filled_in(spec, claim, used) or _verdict(
        claim, tolerance, used, values, claim_hash(spec, claim), spec.seeds
    )
    verdict, reason = _withdrawn(spec, claim, verdict, reason)
    floors = [record["metrics"][claim.floor] for record in used if claim.floor in record["metrics"]]
    if floors and claim.reported is not None and claim.reported < min(floors):
        reason += f"; {BELOW_FLOOR}"
    if added := _seeds_added(spec, used):
        reason += f"; added to the planned seeds after a run: {_listed(added)}"
    pairs = _pairs(claim, used)
    interval = pairs.interval if pairs else mean_interval(values)
    return Judgement(
        claim.id, claim.statement, claim.where, claim.experiment, claim.kind, _formula(claim), claim.reported,
        _summary(values), _summary(floors), tolerance.model_dump(mode="json"), verdict, reason,
        [record["seed"] for record in used],
        sorted({record["commit"] for record in used}),
        sorted({record["config_hash"] for record in used}),
        sorted({hardware(record) for record in used}),
        interval, pairs, _settled(claim, tolerance, verdict, interval),
    )  # fmt: skip


def judge_all(spec: Spec, records: Sequence[dict]) -> list[Judgement]:
    """One judgement per claim, in the order of the spec."""
    return [judge(spec, claim, [r for r in records if r["experiment"] == claim.experiment]) for claim in spec.claims]


def causes(spec: Spec, judgement: Judgement) -> list[int]:
    """Which of the spec's gaps say why this claim was missed, by number from 1; none for a claim that was not missed."""
    if judgement.verdict in (REPRODUCED, COULD_NOT_RUN):
        return []
    return [number for number, gap in enumerate(spec.gaps, start=1) if fnmatchcase(judgement.id, gap.claims)]


def unexplained(spec: Spec, judgements: Sequence[Judgement]) -> list[str]:
    """The claims that were not reproduced and for which no gap names a suspected cause."""
    return [j.id for j in judgements if j.verdict == NOT and not causes(spec, j)]


def check_patterns(spec: Spec, path: Path) -> None:
    """Raises BadInput for a gap or a withdrawal whose `claims` matches no claim: it would never be shown."""
    known = [claim.id for claim in spec.claims]
    named = [(f"gaps.{index}.claims", gap.claims) for index, gap in enumerate(spec.gaps)]
    named += [(f"withdrawn.{index}.claims", one.claims) for index, one in enumerate(spec.withdrawn)]
    problems = [
        f"{path}: {key}: found '{pattern}', expected the id of a claim or a pattern that matches one"
        for key, pattern in named
        if not any(fnmatchcase(name, pattern) for name in known)
    ]
    problems += [
        f"{path}: withdrawn.{index}.instead: found '{one.instead}', expected the id of a claim"
        for index, one in enumerate(spec.withdrawn)
        if one.instead is not None and one.instead not in known
    ]
    if problems:
        raise BadInput(*problems)


def hardware(record: dict) -> str:
    """The machine of a record in words."""
    machine = record["machine"]
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return f"{machine['processor']}, {machine['cores']} cores{device}"


def _value(claim: Claim, record: dict) -> float | None:
    metrics = record["metrics"]
    if any(name not in metrics for name in claim.operands):
        return None
    if claim.minus:
        return metrics[claim.metric] - metrics[claim.minus]
    divisor = metrics[claim.divided_by] if claim.divided_by else 1.0
    return metrics[claim.metric] / divisor if divisor else None


def _formula(claim: Claim) -> str:
    return (" - " if claim.minus else " / ").join(claim.operands)


def _pairs(claim: Claim, used: Sequence[dict]) -> Pairs | None:
    if not used or not claim.divided_by:
        return None
    one, other = ([record["metrics"][name] for record in used] for name in (claim.metric, claim.divided_by))
    return compare(one, other)


def _not_filled_in(spec: Spec, claim: Claim, used: Sequence[dict]) -> tuple[str, str] | None:
    """What is said of runs where a placeholder stands in the claim, or stood in what they were made with; None without one."""
    if not used:
        return None
    if places := of_claim(spec, claim):
        return INCONCLUSIVE, f"to be filled in: {listed(places, FEW)}"
    if places := list(dict.fromkeys(place for record in used for place in record.get("placeholders", []))):
        return INCONCLUSIVE, f"made while these were still to be filled in: {listed(places, FEW)}"
    return None


def _withdrawn(spec: Spec, claim: Claim, verdict: str, reason: str) -> tuple[str, str]:
    """The verdict and its reason where the claim was not withdrawn, else that it was and what it would have been."""
    found = next((one for one in spec.withdrawn if fnmatchcase(claim.id, one.claims)), None)
    if found is None or verdict == COULD_NOT_RUN:
        return verdict, reason
    instead = f"; see {found.instead}" if found.instead else ""
    return INCONCLUSIVE, f"withdrawn: {found.why}{instead}; by the values: {verdict} ({reason})"


def _verdict(
    claim: Claim, tolerance: Tolerance, used: list[dict], values: list[float], current_hash: str, seeds: Sequence[int]
) -> tuple[str, str]:
    if not used:
        return COULD_NOT_RUN, "no run of this experiment measured it"
    departures = sorted({line for record in used for line in record["departures"]})
    if departures:
        return INCONCLUSIVE, f"{SHORTENED}: {'; '.join(departures)}"
    if unread := sorted({record["no_spec"] for record in used if "no_spec" in record}):
        return (
            INCONCLUSIVE,
            f"run without a gate, and {'; '.join(unread)}: nothing says that the claim was there before",
        )
    if any(record["claims"].get(claim.id) != current_hash for record in used):
        return INCONCLUSIVE, "the claim or its tolerance was changed after the run"
    dropped = _planned(used) - set(seeds)
    if dropped:
        return INCONCLUSIVE, f"dropped from the planned seeds after the runs: {_listed(dropped)}"
    missing = set(seeds) - {record["seed"] for record in used}
    if missing:
        return INCONCLUSIVE, f"no run of seed {_listed(missing)}"
    grades = {_grade(claim, tolerance, value) for value in values}
    grade = _grade(claim, tolerance, mean(values))
    if {REPRODUCED, NOT} <= grades:
        return INCONCLUSIVE, f"the seeds disagree: {', '.join(sorted(grades))}"
    return grade, _comparison(claim, tolerance, mean(values))


def _planned(used: Sequence[dict]) -> set[int]:
    """The seeds that the spec planned when one of the runs was made, as far as the records say; those of an older kit do not."""
    return {seed for record in used for seed in record.get("planned_seeds", [])}


def _seeds_added(spec: Spec, used: Sequence[dict]) -> set[int]:
    """The seeds that the spec did not plan yet when one of the runs was made."""
    return {
        seed
        for record in used
        if "planned_seeds" in record
        for seed in spec.seeds
        if seed not in record["planned_seeds"]
    }


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _grade(claim: Claim, tolerance: Tolerance, value: float) -> str:
    if claim.kind == "at_least":
        if value >= tolerance.reproduced:
            return REPRODUCED
        return CLOSE if value >= tolerance.close else NOT
    distance = _distance(claim, value)
    if distance <= tolerance.reproduced:
        return REPRODUCED
    return CLOSE if distance <= tolerance.close else NOT


def _distance(claim: Claim, value: float) -> float:
    """What the tolerance bounds from above."""
    if claim.kind == "at_most":
        return value
    distance = abs(value - _reported(claim))
    return distance / abs(_reported(claim)) if claim.kind == "equal" else distance


def _reported(claim: Claim) -> float:
    """What a claim of kind "equal" or "within" is held against."""
    assert claim.reported is not None  # a spec with such a claim is refused: Claim.lacks_number
    return claim.reported


def _settled(claim: Claim, tolerance: Tolerance, verdict: str, interval: Interval | None) -> bool | None:
    """Whether the whole interval lies where the verdict is the same."""
    if interval is None or verdict not in (REPRODUCED, CLOSE, NOT):
        return None
    # The grade changes with the value in one direction, or with its distance to the reported one, which is least there.
    points = [interval.low, interval.high]
    if claim.reported is not None and claim.reported in interval:
        points.append(claim.reported)
    return {_grade(claim, tolerance, point) for point in points} == {verdict}


def _comparison(claim: Claim, tolerance: Tolerance, value: float) -> str:
    if claim.kind == "equal":
        return (
            f"{100 * (value / _reported(claim) - 1):+.1f}% from the reported value, {tolerance.reproduced:.0%} allowed"
        )
    if claim.kind == "within":
        return f"{value - _reported(claim):+.3g} from the reported value, {tolerance.reproduced:g} allowed"
    if claim.kind == "at_least":
        return f"at least {tolerance.reproduced:g} required"
    return f"at most {tolerance.reproduced:g} allowed"


def _summary(values: list[float]) -> dict | None:
    if not values:
        return None
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None, "values": values}
