"""How a learning rate falls: factors for `Phase.learning_rate_factor`, each a function of the step alone.

A step is counted from 0. What comes after a warm-up may count from its end, `cosine(step - warmup, steps - warmup)`, or from the first step:
libraries do both, and papers seldom say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi


def cosine(step: int, steps: int, least: float = 0.0) -> float:
    """Half a cosine from 1 at step 0 to `least` at `steps`, one after the last step, and `least` from there on.

    Loshchilov & Hutter 2017 (arXiv 1608.03983), equation 5 without restarts; torch's CosineAnnealingLR with T_max = steps.
    """
    return least + (1 - least) * (1 + cos(pi * _share(step, steps))) / 2


def linear(step: int, steps: int, least: float = 0.0) -> float:
    """A straight line from 1 at step 0 to `least` at `steps`, one after the last step, and `least` from there on."""
    return 1 - (1 - least) * _share(step, steps)


def milestones(step: int, at: Sequence[int], factor: float) -> float:
    """`factor` once for each number of steps in `at` that has been done, as He et al. 2016 divide by 10; torch's MultiStepLR."""
    return factor ** sum(step >= one for one in at)


def _share(step: int, steps: int) -> float:
    """The share of `steps` that is done before this one, between 0 and 1."""
    return min(max(step / steps, 0.0), 1.0)
