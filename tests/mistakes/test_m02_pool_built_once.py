"""m02: the pool joined again at every step.

Bytes that drawing a minibatch allocates depend on the minibatch, not on the pool; building a pool allocates one pool.
"""

from functools import partial

import pytest
import torch
from proof import Proof

from nsgf.phases import make_phases
from repro.config import load
from repro.pool import Pool
from repro.runtime import Runtime

COLUMNS = {"x": (2,), "v": (2,), "t": ()}
BATCH = 16
EXPERIMENTS = ["2d-moons", "digits"]


def filled_pool(capacity, pieces=10):
    pool = Pool(capacity, COLUMNS)
    size = capacity // pieces
    for _ in range(pieces):
        pool.add(x=torch.zeros(size, 2), v=torch.zeros(size, 2), t=torch.zeros(size))
    return pool


def bytes_made(storages, work):
    with storages() as counted:
        work()
    return counted.made


def check_sampling(storages, tmp_path):
    draw = lambda pool: bytes_made(storages, lambda: pool.sample(BATCH, torch.Generator().manual_seed(0)))  # noqa: E731
    small, large = filled_pool(100), filled_pool(10_000)
    large.save(tmp_path / "pool.safetensors")
    found = {
        "100": draw(small),
        "10000": draw(large),
        "10000 from a file": draw(Pool.load(tmp_path / "pool.safetensors")),
    }
    needed = BATCH * (4 * (2 + 2 + 1) + 8)  # the rows in float32, and their indices
    assert max(found.values()) <= 2 * needed, (
        f"drawing {BATCH} entries allocates by the size of the pool: {found} bytes, needed are {needed}"
    )


def check_building(storages):
    with storages() as counted:
        pool = Pool(1000, COLUMNS)
        rows = {name: torch.zeros(100, *shape) for name, shape in COLUMNS.items()}
        for _ in range(10):
            pool.add(**rows)
    assert counted.peak <= 1.2 * pool.nbytes, f"building peaks at {counted.peak / pool.nbytes:.1f} pools, expected one"


def check_refusal():
    pool = Pool(4, {"x": ()})
    pool.add(x=torch.zeros(3))
    try:
        pool.sample(2, torch.Generator())
    except ValueError as error:
        assert str(error) == "pool: found 3 entries, expected all 4"
    else:
        raise AssertionError("a pool was sampled before it was full")


def check_phase(experiment, project, storages, tmp_path):
    """The same for a whole training step of phase 1: its minibatch and its loss."""
    made = {}
    for batches in (1, 20):
        settings = [
            "phases.*.pool.batch_size=16",
            f"phases.*.pool.batches={batches}",
            "phases.*.batch_size=8",
            "phases.velocity_field.flow.steps=2",
        ]
        config, _ = load(project.config_class(experiment), project.experiments()[experiment], settings)
        phase = make_phases(config, Runtime(torch.device("cpu")))[0]
        scratch = tmp_path / str(batches)
        scratch.mkdir()
        phase.prepare(0, scratch, {})
        model = phase.make_model()
        made[len(phase.pool)] = bytes_made(
            storages, lambda: phase.loss(model, phase.minibatch(0, torch.Generator().manual_seed(0)))
        )
    assert len(set(made.values())) == 1, f"a step of phase 1 allocates by the size of the pool: {made} bytes"


def joined_at_every_draw(monkeypatch):
    real = Pool.sample

    def sample(self, n, generator):
        self._rows = torch.cat(self._rows.split(10))
        return real(self, n, generator)

    monkeypatch.setattr(Pool, "sample", sample)


def shuffled_at_every_draw(monkeypatch):
    real = torch.randint
    shuffled = lambda high, size, generator: torch.randperm(high, generator=generator)[: size[0]]  # noqa: E731
    monkeypatch.setattr(
        "repro.pool.torch.randint",
        lambda high, size, **rest: shuffled(high, size, **rest) if rest else real(high, size),
    )


def grown_by_joining(monkeypatch):
    real = Pool.add

    def add(self, **rows):
        self._rows = torch.cat([self._rows])
        real(self, **rows)

    monkeypatch.setattr(Pool, "add", add)


def sampled_before_it_is_full(monkeypatch):
    real = Pool.sample

    def sample(self, n, generator):
        self._filled = len(self._rows)
        return real(self, n, generator)

    monkeypatch.setattr(Pool, "sample", sample)


def own_copy(monkeypatch):
    real = Pool.sample
    monkeypatch.setattr(
        Pool,
        "sample",
        lambda self, n, generator: {name: rows.clone() for name, rows in real(self, n, generator).items()},
    )


def rows_in_order(monkeypatch):
    real = torch.randint
    monkeypatch.setattr("repro.pool.torch.randint", lambda *args, **rest: real(*args, **rest).sort().values)


def added_in_two_halves(monkeypatch):
    real = Pool.add

    def add(self, **rows):
        middle = len(rows["x"]) // 2
        real(self, **{name: column[:middle] for name, column in rows.items()})
        real(self, **{name: column[middle:] for name, column in rows.items()})

    monkeypatch.setattr(Pool, "add", add)


BY_SIZE = "drawing 16 entries allocates by the size of the pool: {'100': "
STEP_BY_SIZE = "a step of phase 1 allocates by the size of the pool: {32: "
CORRECT = [own_copy, rows_in_order]
PROOFS = [
    Proof(check_sampling, {joined_at_every_draw: BY_SIZE, shuffled_at_every_draw: BY_SIZE}, CORRECT),
    Proof(check_building, {grown_by_joining: "building peaks at "}, [added_in_two_halves]),
    Proof(check_refusal, {sampled_before_it_is_full: "a pool was sampled before it was full"}, CORRECT),
    *(
        Proof(
            partial(check_phase, experiment),
            {joined_at_every_draw: STEP_BY_SIZE, shuffled_at_every_draw: STEP_BY_SIZE},
            CORRECT,
        )
        for experiment in EXPERIMENTS
    ),
]


def test_proof(case):
    case()


def test_a_pool_is_not_sampled_before_it_is_full_by_way_of_a_file(tmp_path):
    pool = Pool(4, {"x": ()})
    pool.add(x=torch.zeros(3))
    with pytest.raises(ValueError, match="found 3 entries, expected all 4"):
        pool.save(tmp_path / "pool.safetensors")
