"""m48: 1.96 in the place of Student's t.

The interval that a report gives for three seeds is as wide as three seeds make it: of such intervals 95 percent hold the true mean. It is the same
for a ratio on the log scale, and in the words of the page.
"""

import math
from pathlib import Path
from statistics import NormalDist, fmean, pstdev, stdev

import numpy as np
from proof import Proof
from scipy import stats
from tiny_method import SPEC

from repro.config import validate
from repro_tools.report import judge, statistics
from repro_tools.report.judge import judge_all
from repro_tools.report.results import Results, group_runs, read_records
from repro_tools.report.results_page import results_page
from repro_tools.report.statistics import t_quantile
from repro_tools.spec import Spec, claim_hashes, load_spec

REFERENCE = Path(__file__).parents[2] / "reference_impl"
T, Z = 4.302653, 1.959964
"""For three values: the quantile of Student's t with two degrees of freedom, of any table, and that of the normal law."""
TRIPLES = 4000


def record(spec, seed, value):
    origin = {"commit": "abc", "config_hash": "def", "machine": {"processor": "p", "cores": 2, "device": "cpu"}}
    metrics = {"weight": value, "other": 1.0}
    return {
        "experiment": "count",
        "seed": seed,
        "metrics": metrics,
        "departures": [],
        "claims": claim_hashes(spec, "count"),
        **origin,
    }


def judged(values, **claim):
    """The judgement on these values of seeds 0, 1 and 2, and the page."""
    spec = validate(Spec, SPEC | {"claims": [SPEC["claims"][0] | claim]}, "spec.yaml")
    records = [record(spec, seed, value) for seed, value in enumerate(values)]
    judgements = judge_all(spec, records)
    return judgements[0].interval, results_page(Results("R", spec, records, group_runs(records, []), judgements, ""))


def check():
    triples = np.random.default_rng(1).normal(7.0, 2.0, (TRIPLES, 3))
    covered = fmean(7.0 in judge.mean_interval(list(triple)) for triple in triples)
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / TRIPLES), (
        f"the 95% interval of three seeds holds the true mean in {covered:.0%} of {TRIPLES} cases"
    )
    half = T * 1.0 / 3**0.5  # of 1, 2 and 3, whose standard deviation is 1
    interval, page = judged([1.0, 2.0, 3.0])
    found = (interval.high - interval.low) / 2
    assert abs(found - half) < 1e-3, f"1, 2 and 3: found 2 ± {found:.3f}, expected 2 ± {half:.3f}"
    assert "| -0.5 to 4.5 |" in page and "reaches 2.5 standard deviations" in page, "the page says another interval"
    interval, _ = judged([math.exp(value) for value in (1, 2, 3)], divided_by="other")
    found = math.log(interval.high / interval.low) / 2
    assert abs(found - half) < 1e-3, f"ratios: found a factor of {found:.3f} on the log scale, expected {half:.3f}"


def quantile_of_the_normal_law(monkeypatch):
    monkeypatch.setattr(statistics, "t_quantile", lambda n, level=0.95: NormalDist().inv_cdf((1 + level) / 2))


def two_standard_errors(monkeypatch):
    monkeypatch.setattr(statistics, "t_quantile", lambda n, level=0.95: 2.0)


def n_degrees_of_freedom(monkeypatch):
    monkeypatch.setattr(statistics, "t_quantile", lambda n, level=0.95: t_quantile(n + 1, level))


def spread_over_n(monkeypatch):
    """As NumPy's std computes it unless told otherwise."""
    monkeypatch.setattr(statistics, "stdev", pstdev)


def standard_deviation_as_error(monkeypatch):
    """Too wide: not divided by the square root of n."""
    monkeypatch.setattr(statistics, "stdev", lambda values: stdev(values) * len(values) ** 0.5)


def normal_law_on_the_log_scale_only(monkeypatch):
    """The plain interval was mended, the one of the ratios forgotten."""
    real = statistics.ratio_interval

    def ratio_interval(ratios, level=0.95):
        found = real(ratios, level)
        factor = (found.high / found.centre) ** (Z / t_quantile(len(ratios), level))
        return statistics.Interval(found.centre, found.centre / factor, found.centre * factor, found.n, level, "log")

    monkeypatch.setattr(statistics, "ratio_interval", ratio_interval)


def quantiles_of_scipy_stats(monkeypatch):
    monkeypatch.setattr(statistics, "t_quantile", lambda n, level=0.95: float(stats.t.ppf((1 + level) / 2, n - 1)))


def normal_law_for_a_thousand_seeds(monkeypatch):
    """There it is right to a thousandth."""
    normal = NormalDist()
    monkeypatch.setattr(
        statistics,
        "t_quantile",
        lambda n, level=0.95: t_quantile(n, level) if n < 1000 else normal.inv_cdf((1 + level) / 2),
    )


def quantiles_of_a_printed_table(monkeypatch):
    table = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}
    monkeypatch.setattr(statistics, "t_quantile", lambda n, level=0.95: table[n])


PROOFS = [
    Proof(
        check,
        plant={
            quantile_of_the_normal_law: "the 95% interval of three seeds holds the true mean in 81% of 4000 cases",
            two_standard_errors: "holds the true mean in 82% of 4000 cases",
            n_degrees_of_freedom: "holds the true mean in 92% of 4000 cases",
            spread_over_n: "holds the true mean in 93% of 4000 cases",
            standard_deviation_as_error: "holds the true mean in 99% of 4000 cases",
            normal_law_on_the_log_scale_only: "ratios: found a factor of 1.132 on the log scale, expected 2.484",
        },
        innocent=[quantiles_of_scipy_stats, normal_law_for_a_thousand_seeds, quantiles_of_a_printed_table],
    )
]


def test_proof(case):
    case()


def test_what_the_normal_law_would_have_claimed_of_this_repository(monkeypatch):
    """The figures of the entry: verdicts whose whole interval agrees, and comparisons that show an order."""
    spec, records = load_spec(REFERENCE / "spec.yaml"), read_records(REFERENCE / "reports" / "records")

    def firm():
        judgements = judge_all(spec, records)
        settled = [one.settled for one in judgements if one.settled is not None]
        pairs = [one.pairs.interval for one in judgements if one.pairs]
        return sum(settled), len(settled), sum(1.0 not in interval for interval in pairs), len(pairs)

    by_t = firm()
    quantile_of_the_normal_law(monkeypatch)
    assert (by_t, firm()) == ((18, 45, 5, 19), (34, 45, 11, 19))
    assert round(T / Z, 1) == 2.2
