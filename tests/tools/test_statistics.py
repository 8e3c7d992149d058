"""Intervals and comparisons against scipy.stats and against values worked out by hand; the usual slips give other numbers."""

import math
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from scipy import stats

from repro_tools.report.statistics import (
    compare,
    mean_interval,
    ratio_interval,
    reach,
    seeds_for_difference,
    seeds_for_signs,
    sign_chance,
    spread_range,
    t_quantile,
    what_seeds_show,
)


def test_the_interval_of_three_numbers_is_the_one_worked_out_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t(2) = 4.3027, half of it 4.3027 / sqrt(3) = 2.4841."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert (interval.centre, interval.n, interval.level, interval.scale) == (2.0, 3, 0.95, "linear")


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_that_of_scipy(n, level):
    values = np.random.default_rng(n).normal(5, 2, n)
    expected = stats.t.interval(level, n - 1, values.mean(), stats.sem(values))
    interval = mean_interval(list(values), level)
    assert (interval.low, interval.high) == pytest.approx(expected)


SLIPS = {
    "the standard deviation in the place of the standard error": lambda v: t_quantile(len(v)) * stdev(v),
    "the normal's quantile in the place of Student's": lambda v: NormalDist().inv_cdf(0.975) * stdev(v) / len(v) ** 0.5,
    "the spread of a population": lambda v: t_quantile(len(v)) * float(np.std(v)) / len(v) ** 0.5,
    "n degrees of freedom": lambda v: t_quantile(len(v) + 1) * stdev(v) / len(v) ** 0.5,
    "one tail": lambda v: t_quantile(len(v), 0.9) * stdev(v) / len(v) ** 0.5,
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_would_be_seen(slip):
    """Each slip moves the end of the interval by far more than the tolerance of the tests above."""
    values = [1.0, 2.0, 4.0]
    interval = mean_interval(values)
    assert abs(fmean(values) + SLIPS[slip](values) - interval.high) > 0.01


def test_it_covers_the_true_mean_as_often_as_it_says():
    """20,000 triples of a normal law: 95 percent, give or take four standard errors."""
    triples = np.random.default_rng(0).normal(size=(20_000, 3))
    covered = fmean(0.0 in mean_interval(list(triple)) for triple in triples)
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 20_000)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_seed_has_no_interval(values):
    assert mean_interval(values) is None and ratio_interval(values) is None


def test_equal_values_have_an_interval_without_width():
    assert mean_interval([2.0, 2.0, 2.0]).low == mean_interval([2.0, 2.0, 2.0]).high == 2.0


def test_a_ratio_and_its_inverse_are_judged_alike():
    """On the log scale; the interval of the mean ratio itself would not be."""
    ratios = [0.5, 0.8, 1.6]
    one, other = ratio_interval(ratios), ratio_interval([1 / ratio for ratio in ratios])
    assert (1 / one.high, 1 / one.centre, 1 / one.low) == pytest.approx((other.low, other.centre, other.high))
    plain, inverse = mean_interval(ratios), mean_interval([1 / ratio for ratio in ratios])
    assert 1 / plain.centre != pytest.approx(inverse.centre, rel=0.05)


def test_the_centre_of_a_ratio_is_the_geometric_mean():
    interval = ratio_interval([0.25, 1.0])
    assert interval.centre == pytest.approx(0.5) and interval.scale == "log" and interval.low > 0


def test_a_level_that_is_asked_for_is_the_one_that_is_used():
    ratios = [0.5, 0.8, 1.6]
    narrow, usual = ratio_interval(ratios, 0.5), ratio_interval(ratios)
    assert (narrow.n, narrow.level, usual.level) == (3, 0.5, 0.95)
    assert usual.low < narrow.low < narrow.high < usual.high
    assert reach(3, 0.5) == pytest.approx(stats.t.ppf(0.75, 2) / math.sqrt(3))
    assert seeds_for_signs(0.99) == 8 and seeds_for_signs(0.0) == 1


def test_the_ends_belong_to_an_interval():
    interval = mean_interval([1.0, 2.0, 4.0])
    assert interval.low in interval and interval.high in interval
    assert (
        math.nextafter(interval.low, -math.inf) not in interval
        and math.nextafter(interval.high, math.inf) not in interval
    )


@pytest.mark.parametrize("ratios", [[1.0, 0.0], [1.0, -2.0]])
def test_a_ratio_without_a_logarithm_has_no_interval(ratios):
    assert ratio_interval(ratios) is None


def test_pairs_take_out_what_both_methods_share():
    """A is a tenth below B at every seed, while the seeds lie far apart: paired that is sure, unpaired it is not."""
    b = [1.0, 3.0, 9.0]
    a = [0.9 * value * factor for value, factor in zip(b, (0.999, 1.0, 1.001), strict=True)]
    paired = compare(a, b)
    assert paired.interval.high < 1 and paired.below == 3
    assert paired.ratios == pytest.approx([0.9 * 0.999, 0.9, 0.9 * 1.001])
    unpaired = stats.ttest_ind(np.log(a), np.log(b))
    assert unpaired.confidence_interval().high > 0
    shuffled = compare(a, [9.0, 1.0, 3.0])
    assert 1 in shuffled.interval and shuffled.below != 3


def test_a_comparison_is_the_paired_t_test_on_the_logarithms():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(size=(2, 5))
    expected = stats.ttest_rel(np.log(a), np.log(b)).confidence_interval()
    interval = compare(list(a), list(b)).interval
    assert (math.log(interval.low), math.log(interval.high)) == pytest.approx(tuple(expected))


def test_a_tie_is_no_win():
    assert compare([1.0, 1.0], [1.0, 2.0]).below == 1


def test_a_dropped_seed_is_refused():
    with pytest.raises(ValueError, match="found 2 and 3 values"):
        compare([1.0, 2.0], [1.0, 2.0, 3.0])


def test_nothing_is_divided_by_zero():
    with pytest.raises(ValueError, match="^found a 0 to divide by$"):
        compare([1.0], [0.0])


@pytest.mark.parametrize("n, expected", [(2, 8.985), (3, 2.484), (5, 1.242), (10, 0.715)])
def test_how_far_an_interval_reaches(n, expected):
    assert reach(n) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_range_of_the_spread_is_that_of_chi_squared(n):
    low, high = (math.sqrt((n - 1) / stats.chi2.ppf(share, n - 1)) for share in (0.975, 0.025))
    assert spread_range(n) == pytest.approx((low, high))


def test_signs_alone_need_six_seeds():
    assert sign_chance(3) == stats.binomtest(3, 3).pvalue == 0.25
    assert sign_chance(0) == sign_chance(1) == 1.0
    assert seeds_for_signs() == 6
    assert stats.binomtest(5, 5).pvalue > 0.05 > stats.binomtest(6, 6).pvalue


@pytest.mark.parametrize(
    ("n", "numbers", "signs"),
    [
        (2, ("9", "0.45 to 32", "all 2 seeds with a chance of 0.5"), "prove no order; 6 seeds could."),
        (3, ("2.5", "0.52 to 6.3", "all 3 seeds with a chance of 0.25"), "prove no order; 6 seeds could."),
        (7, ("0.92", "0.64 to 2.2", "all 7 seeds with a chance of 0.016"), "can prove an order if all agree."),
    ],
)
def test_what_a_few_seeds_show_is_computed(n, numbers, signs):
    reach_of_mean, spread, chance = numbers
    assert what_seeds_show(n) == (
        f"{n} seeds: the 95% interval of a mean reaches {reach_of_mean} standard deviations to either side (with 10 seeds 0.72). The standard "
        f"deviation is itself uncertain: the true one may be {spread} times as large. Two methods that are alike agree in sign in {chance}, "
        f"so signs alone {signs} A difference far beyond the spread shows; a small one does not, and an interval that holds both answers is "
        "no evidence that two methods are equal."
    )


def test_one_seed_shows_no_spread():
    assert what_seeds_show(1) == (
        "One seed has no spread. It shows that a value can occur, and neither how often it does nor which of two methods is the better one."
    )


@pytest.mark.parametrize(("difference", "spreads"), [(0.5, (1.0, 1.0)), (0.4, (0.5, 1.5)), (1.0, (0.0, 2.0))])
def test_so_many_seeds_show_a_difference_in_four_of_five_tries(difference, spreads):
    """By the law of the mean of n draws, for which no draw is made."""
    n = seeds_for_difference(difference, spreads)
    for seeds, enough in ((n, True), (n - 1, False)):
        scatter = ((spreads[0] ** 2 + spreads[1] ** 2) / seeds) ** 0.5
        seen = 1 - NormalDist(difference / scatter).cdf(NormalDist().inv_cdf(0.975))
        assert (seen >= 0.8) is enough
