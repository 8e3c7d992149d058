"""What `repro diagnose` measures of a phase, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from repro_tools.diagnose.instruments import Flatness

FASTER = 1000.0
"""Times the learning rate: a network that trains better still at so many times it was given far too little."""
FITTED = 0.5
"""A few rows count as fitted when their loss is below this share of the loss of the best constant."""


@dataclass(frozen=True)
class Column:
    """A tensor of a minibatch, or an argument of the network: over several minibatches."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    least: float
    most: float
    finite: bool
    constant: bool
    """Whether every row of every minibatch is the same."""
    constant_places: int
    """Places within a row that never change."""


@dataclass(frozen=True)
class Rows:
    """How the loss treats its rows, on `rows` of them, the network fresh and in eval mode."""

    rows: int
    ratio: float | None
    """Loss of the rows together over the mean of their losses one by one: 1 for a mean, `rows` for a sum. None: not measured."""
    unpaired: float | None
    """Relative change of the loss when the network's outputs change places among the rows: 0 when it does not matter which is whose."""
    tables: tuple[str, ...]
    """Operations that made a table of rows by rows out of two columns."""
    random: bool
    """Whether the loss itself draws random numbers."""


@dataclass(frozen=True)
class Parameters:
    """Of the network, by name, over the steps that were trained."""

    gradients: Mapping[str, float]
    """Norm of the gradient at the first step, of those parameters that got one."""
    none: tuple[str, ...]
    """Trainable, and the loss does not reach them."""
    frozen: tuple[str, ...]
    """Given to the optimiser with requires_grad False."""
    outside: tuple[str, ...]
    """Trainable, and not given to the optimiser."""
    still: tuple[str, ...] = ()
    """Given to the optimiser, trainable, and to the last bit where they began."""
    pulls: Mapping[str, float] = field(default_factory=dict)
    """Norm of the gradient times norm of the weights, for each matrix that got one: what the loss would change, to first order, if the weights
    changed by their own size. The largest of the first ten steps: behind a layer of zeros it is 0 at the first, and much later training may have
    mended what was wrong."""
    updates: Mapping[str, float] = field(default_factory=dict)
    """log10 of root mean square of a step over that of the weights, the median of the later half of the steps; for each matrix."""


@dataclass(frozen=True)
class Fit:
    """A few fixed rows, fitted for `steps` steps with everything that is drawn inside the loss held fixed too."""

    rows: int
    steps: int
    begun: float
    """What counts as not having begun: the loss of the best constant on these rows, or the first loss where a constant fits them."""
    losses: Mapping[float, float]
    """Loss at the end by factor of the learning rate; inf where it was not finite."""

    def fitted(self, factor: float = 1.0) -> bool:
        return self.losses.get(factor, math.inf) < FITTED * self.begun


@dataclass(frozen=True)
class Learning:
    """`steps` steps of real training, judged on other minibatches; and the same with outputs and targets paired at random."""

    steps: int
    true: float
    shuffled: float | None
    broke_at: int | None
    """The first step whose loss was not finite."""
    faster: float | None = None
    """`true` with FASTER times the learning rate; tried where a few rows are not fitted to a thousandth, and training is not done."""

    def worse_than(self, initial: float, constant: float | None) -> bool:
        """Whether training left the network clearly worse than it was, and than a constant is."""
        return self.broke_at is not None or not self.true <= 1.25 * max(initial, constant or 0.0)


@dataclass(frozen=True)
class Measured:
    """All that was measured of a phase. What could not be is None, with the reason in `skipped`."""

    phase: str
    seed: int
    columns: tuple[Column, ...] = ()
    arguments: tuple[Column, ...] = ()
    batch_rows: int = 0
    repeated: float = 0.0
    """Share of the rows of a minibatch that occur in it twice or more."""
    same_minibatch: bool = False
    lengths_differ: bool = False
    """Whether the columns have not all as many rows: then nothing else was measured."""
    raised: str | None = None
    """The error of the first loss."""
    bad_rows: Mapping[str, tuple[float, float]] | None = None
    """Where the loss of a fresh network is not finite: range of each one-dimensional column over those rows. None: nowhere seen."""
    bad_count: tuple[int, int] = (0, 0)
    warnings: tuple[str, ...] = ()
    initial: float | None = None
    zero: float | None = None
    constant: float | None = None
    expected: float | None = None
    rows: Rows | None = None
    flat: tuple[Flatness, ...] = ()
    flat_after: tuple[Flatness, ...] = ()
    parameters: Parameters | None = None
    fit: Fit | None = None
    learning: Learning | None = None
    ignored: tuple[str, ...] = ()
    """Arguments of the network that do not change its output after training."""
    unused: tuple[str, ...] = ()
    """Columns of the minibatch that do not change the loss after training."""
    affine_layers: int | None = None
    """Layers with weights, when the network is nothing but an affine map of its input; else None."""
    times: tuple[tuple[float, float | None] | None, ...] = ()
    """In ten bins of time in [0, 1], after training: the loss, and that of the bin's own best constant; None for an empty bin."""
    skipped: Mapping[str, str] = field(default_factory=dict)
