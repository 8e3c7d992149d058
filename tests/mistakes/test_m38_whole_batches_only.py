"""m38: whole batches only, from a set that is small.

A minibatch has as many rows as the phase's configuration says, also where the set or the pool has fewer; and over the steps every row is drawn, each about as often as
the others.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from proof import Proof
from torch.utils.data import DataLoader

from nsgf import images
from nsgf.images import ImageSet
from nsgf.phases import VelocityField, make_phases
from repro.config import load
from repro.runtime import Runtime
from repro_tools.minibatch import draw

CPU = torch.device("cpu")
SEED, ROWS = 0, 12  # the training split of `image_sets`, and the pool
DRAWS = 1_800  # about 150 of each row, with a standard deviation of 12
COLUMNS = {"straight_flow": "y", "time_predictor": "y", "feature_classifier": "x"}


def judge(of, batch_size, batches):
    """Of the numbers of the rows, batch after batch."""
    counts = Counter()
    for step, rows in enumerate(batches):
        assert len(rows) == batch_size, f"{of}: step {step} has {len(rows)} rows, expected {batch_size}"
        counts.update(rows)
    never = [row for row in range(ROWS) if not counts[row]]
    assert not never, f"{of}: in {counts.total()} draws from {ROWS} rows, never drawn are {never}"
    assert min(counts.values()) > 90 and max(counts.values()) < 210, f"{of}: drawn unevenly, {sorted(counts.values())}"


def check_images(project, image_sets, batch_size):
    """Of every phase that draws images."""
    config, _ = load(
        project.config_class("mnist"), project.experiments()["mnist"], [f"phases.*.batch_size={batch_size}"]
    )
    stored = images.load("mnist", "train", image_sets).images()
    numbers = {image.numpy().tobytes(): number for number, image in enumerate(stored)}
    for phase in make_phases(config, Runtime(CPU, image_sets)):
        if phase.name in COLUMNS:
            steps = range(DRAWS // batch_size)
            drawn = (draw(phase, step, SEED, {})[COLUMNS[phase.name]] for step in steps)
            judge(phase.name, batch_size, ([numbers[image.numpy().tobytes()] for image in batch] for batch in drawn))


def check_pool(project, batch_size):
    settings = [f"phases.*.batch_size={batch_size}"]
    config, _ = load(project.config_class("2d-moons"), project.experiments()["2d-moons"], settings)
    phase, pool = make_phases(config, Runtime(CPU))[0], {"t": torch.arange(ROWS)}
    drawn = (draw(phase, step, SEED, pool)["t"] for step in range(DRAWS // batch_size))
    judge("pool", batch_size, (batch.int().tolist() for batch in drawn))


def drawn_by(monkeypatch, make):
    """`make` gives an endless supply of batches of row numbers of (rows, batch size), for images and for pools."""
    supplies = {}

    def rows(owner, n):
        supply = supplies.setdefault(
            (id(owner), n), (owner, make(len(owner), n))
        )  # the owner, so that no other gets its id
        return next(supply[1])

    def image_rows(self, n, generator, flip):
        index = rows(self, n)
        return self.images(index), self.labels[index]

    def pool_rows(self, step, draw):
        return {name: column[rows(column, self.config.batch_size)] for name, column in draw.collected.items()}

    monkeypatch.setattr(ImageSet, "draw", image_rows)
    monkeypatch.setattr(VelocityField, "minibatch", pool_rows)


def endless(loader):
    """Epoch after epoch. From no batches at all a loop would wait for ever; here an empty batch."""
    while True:
        yield from loader
        if not len(loader):
            yield torch.empty(0, dtype=torch.long)


def epochs(monkeypatch, order_of):
    """A loader with drop_last, in an order that `order_of` gives of the rows."""

    def make(rows, n):
        order = order_of(rows)
        return (torch.as_tensor(batch) for batch in endless(DataLoader(range(rows), n, sampler=order, drop_last=True)))

    drawn_by(monkeypatch, make)


def drop_last(monkeypatch):
    """In the order of the file."""
    epochs(monkeypatch, range)


def shuffled_once(monkeypatch):
    """As by a DistributedSampler that is never told the epoch: the same rows are left over every time."""
    epochs(monkeypatch, lambda rows: torch.randperm(rows, generator=torch.Generator().manual_seed(SEED)).tolist())


class Anew:
    """Another order for each epoch."""

    def __init__(self, rows):
        self.rows, self.stream = rows, torch.Generator().manual_seed(SEED)

    def __iter__(self):
        return iter(torch.randperm(self.rows, generator=self.stream).tolist())

    def __len__(self):
        return self.rows


def shuffled_for_each_epoch(monkeypatch):
    """drop_last leaves over others every time."""
    epochs(monkeypatch, Anew)


def epochs_joined(monkeypatch):
    """What is left over of an epoch begins the next one."""

    def make(rows, n):
        order, rest = Anew(rows), []
        while True:
            while len(rest) < n:
                rest += list(order)
            yield torch.tensor(rest[:n])
            rest = rest[n:]

    drawn_by(monkeypatch, make)


def drawn_with_weights(monkeypatch):
    """With replacement, as now, each row with the same weight."""

    def make(rows, n):
        stream = torch.Generator().manual_seed(SEED)
        while True:
            yield torch.multinomial(torch.ones(rows), n, replacement=True, generator=stream)

    drawn_by(monkeypatch, make)


def epochs_of_the_round(monkeypatch):
    """The kit's own, for a pool: what is left over is dropped, in another order each time."""

    def minibatch(self, step, draw):
        rows = draw.round_rows(self.config.batch_size, last="drop")
        return {name: column[rows] for name, column in draw.collected.items()}

    monkeypatch.setattr(VelocityField, "minibatch", minibatch)


LARGER, FEWER = 100, 5  # a batch that no set fills, and one that leaves two rows over
NONE, LEFT = "step 0 has 0 rows, expected 100", "in 1800 draws from 12 rows, never drawn are"
PROOFS = [
    Proof(
        partial(check_images, batch_size=LARGER),
        plant={drop_last: f"straight_flow: {NONE}", shuffled_for_each_epoch: f"straight_flow: {NONE}"},
        innocent=[epochs_joined, drawn_with_weights],
    ),
    Proof(
        partial(check_images, batch_size=FEWER),
        plant={drop_last: f"straight_flow: {LEFT} [10, 11]", shuffled_once: f"straight_flow: {LEFT}"},
        innocent=[shuffled_for_each_epoch, epochs_joined, drawn_with_weights],
    ),
    Proof(
        partial(check_pool, batch_size=LARGER),
        plant={drop_last: f"pool: {NONE}"},
        innocent=[epochs_joined, drawn_with_weights],
    ),
    Proof(
        partial(check_pool, batch_size=FEWER),
        plant={drop_last: f"pool: {LEFT} [10, 11]", shuffled_once: f"pool: {LEFT}"},
        innocent=[shuffled_for_each_epoch, epochs_joined, epochs_of_the_round],
    ),
]


def test_proof(case):
    case()


def test_the_symptoms_are_what_pytorch_and_python_say():
    """A set of 12 and batches of 128: an epoch without a step."""
    loader = DataLoader(range(ROWS), 128, drop_last=True)
    assert len(loader) == 0 and list(loader) == []
    with pytest.raises(StopIteration, match=r"^$"):
        next(iter(loader))
    with pytest.raises(ZeroDivisionError, match=r"^division by zero$"):
        sum(loader) / len(loader)


def test_what_a_set_loses_in_every_epoch():
    """digits in batches of 256: 217 of 1,497 images."""
    rows = len(images.load("digits", "train", Path()))
    assert (rows, rows - 256 * len(DataLoader(range(rows), 256, drop_last=True))) == (1497, 217)
