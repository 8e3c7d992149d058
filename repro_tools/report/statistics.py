"""What a few seeds say about a mean, about a ratio of two methods, and what they cannot say (SKILL section 9).

Quantiles come from scipy.special, which loads in a fraction of the time of scipy.stats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

from scipy.special import gammaincinv, stdtrit

LEVEL = 0.95
"""The confidence of every interval of a report."""
POWER = 0.8
"""How often a difference that is there is to be seen."""


@dataclass(frozen=True)
class Interval:
    """A two-sided Student t-interval for what `n` seeds have in common: their mean, or on the log scale their geometric mean.

    It holds if the seeds are independent and their values, or the logarithms of these, are near to normal. A few seeds cannot
    tell whether they are.
    """

    centre: float
    low: float
    high: float
    n: int
    level: float
    scale: Literal["linear", "log"]

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Pairs:
    """Two methods on the same seeds: the ratio A / B of each seed, and in how many A is the smaller."""

    ratios: list[float]
    interval: Interval | None
    below: int


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """The t-interval of the mean: mean ± t(n - 1) * s / sqrt(n), with s the standard deviation over the seeds.

    None for fewer than two values: one seed has no spread.
    """
    n = len(values)
    if n < 2:
        return None
    centre, half = fmean(values), t_quantile(n, level) * stdev(values) / math.sqrt(n)
    return Interval(centre, centre - half, centre + half, n, level, "linear")


def ratio_interval(ratios: Sequence[float], level: float = LEVEL) -> Interval | None:
    """The t-interval of the mean logarithm, carried back: an interval for the geometric mean of the ratios.

    On the log scale A / B and B / A are judged alike, and no end of the interval is negative. None for fewer than two ratios,
    and where one is not positive and has no logarithm.
    """
    if any(ratio <= 0 for ratio in ratios):
        return None
    logs = mean_interval([math.log(ratio) for ratio in ratios], level)
    if logs is None:
        return None
    return Interval(math.exp(logs.centre), math.exp(logs.low), math.exp(logs.high), logs.n, level, "log")


def compare(a: Sequence[float], b: Sequence[float]) -> Pairs:
    """A against B, seed by seed. Raises ValueError when they are not of the same seeds, or when one of B is 0."""
    if len(a) != len(b):
        raise ValueError(f"found {len(a)} and {len(b)} values, expected one of each for every seed")
    if 0 in b:
        raise ValueError("found a 0 to divide by")
    ratios = [one / other for one, other in zip(a, b, strict=True)]
    return Pairs(ratios, ratio_interval(ratios), sum(one < other for one, other in zip(a, b, strict=True)))


def t_quantile(n: int, level: float = LEVEL) -> float:
    """Student's t for a two-sided interval of `n` values: half of what is outside `level` lies beyond it on either side."""
    return float(stdtrit(n - 1, (1 + level) / 2))


def reach(n: int, level: float = LEVEL) -> float:
    """How far the t-interval of a mean reaches to either side, in standard deviations over the seeds."""
    return t_quantile(n, level) / math.sqrt(n)


def spread_range(n: int, level: float = LEVEL) -> tuple[float, float]:
    """The true standard deviation over that of `n` seeds: the ends of its interval, for normal values (chi-squared)."""
    ends = (2 * float(gammaincinv((n - 1) / 2, share)) for share in ((1 + level) / 2, (1 - level) / 2))
    low, high = (math.sqrt((n - 1) / quantile) for quantile in ends)
    return low, high


def sign_chance(n: int) -> float:
    """How often all `n` seeds prefer the same one of two methods that are alike: the two-sided sign test at its best."""
    return min(1.0, 2 * 0.5**n)


def seeds_for_difference(difference: float, spreads: tuple[float, float]) -> int:
    """Seeds of each of two methods with which an interval of their difference leaves 0 out in a share `POWER` of all tries.

    `spreads` are their standard deviations over seeds; the seeds are not paired. By the normal law: below ten seeds it is one or
    two too few.
    """
    per_seed = (spreads[0] ** 2 + spreads[1] ** 2) / difference**2
    normal = NormalDist()
    return math.ceil((normal.inv_cdf(0.5 + LEVEL / 2) + normal.inv_cdf(POWER)) ** 2 * per_seed)


def seeds_for_signs(level: float = LEVEL) -> int:
    """The fewest seeds whose signs alone, all of them alike, are rarer than 1 - `level` when the methods are alike."""
    return next(n for n in range(1, 64) if sign_chance(n) <= 1 - level)


def what_seeds_show(n: int) -> str:
    """What `n` seeds can and cannot show, in words; every number is computed."""
    if n < 2:
        return (
            "One seed has no spread. It shows that a value can occur, and neither how often it does nor which of two methods is the "
            "better one."
        )
    low, high = spread_range(n)
    tails = sign_chance(n)
    signs = (
        f"Two methods that are alike agree in sign in all {n} seeds with a chance of {tails:.2g}, so signs alone "
        + (
            f"prove no order; {seeds_for_signs()} seeds could."
            if tails > 1 - LEVEL
            else "can prove an order if all agree."
        )
    )
    return (
        f"{n} seeds: the {LEVEL:.0%} interval of a mean reaches {reach(n):.2g} standard deviations to either side (with 10 seeds "
        f"{reach(10):.2g}). The standard deviation is itself uncertain: the true one may be {low:.2g} to {high:.2g} times as large. {signs} "
        "A difference far beyond the spread shows; a small one does not, and an interval that holds both answers is no evidence that two "
        "methods are equal."
    )
