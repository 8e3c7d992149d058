"""m02: the pool joined again at every step.

Bytes that drawing a minibatch allocates depend on the minibatch, not on the pool; building a pool allocates one pool.
"""

import pytest
import torch

from nsgf.phases import make_phases
from repro.pool import Pool
from repro.run import plan
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


def check_sampling(storages, folder):
    draw = lambda pool: bytes_made(storages, lambda: pool.sample(BATCH, torch.Generator().manual_seed(0)))  # noqa: E731
    small, large = filled_pool(100), filled_pool(10_000)
    large.save(folder / "pool.safetensors")
    found = {
        "100": draw(small),
        "10000": draw(large),
        "10000 from a file": draw(Pool.load(folder / "pool.safetensors")),
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


def check_phase(project, storages, folder, experiment):
    """The same for a whole training step of phase 1: its minibatch and its loss."""
    made = {}
    for batches in (1, 20):
        settings = [
            "phases.*.pool.batch_size=16",
            f"phases.*.pool.batches={batches}",
            "phases.*.batch_size=8",
            "phases.velocity_field.flow.steps=2",
        ]
        config = plan(project, experiment, settings).config
        phase = make_phases(config, Runtime(torch.device("cpu")))[0]
        scratch = folder / experiment / str(batches)
        scratch.mkdir(parents=True, exist_ok=True)
        phase.prepare(0, scratch, {})
        model = phase.make_model()
        made[len(phase.pool)] = bytes_made(
            storages, lambda: phase.loss(model, phase.minibatch(0, torch.Generator().manual_seed(0)))
        )
    assert len(set(made.values())) == 1, f"a step of phase 1 allocates by the size of the pool: {made} bytes"


def plant_join_at_every_draw(monkeypatch):
    real = Pool.sample

    def sample(self, n, generator):
        self._rows = torch.cat(self._rows.split(10))
        return real(self, n, generator)

    monkeypatch.setattr(Pool, "sample", sample)


def plant_shuffle_at_every_draw(monkeypatch):
    real = torch.randint
    shuffled = lambda high, size, generator: torch.randperm(high, generator=generator)[: size[0]]  # noqa: E731
    monkeypatch.setattr(
        "repro.pool.torch.randint",
        lambda high, size, **rest: shuffled(high, size, **rest) if rest else real(high, size),
    )


def plant_grow_by_joining(monkeypatch):
    real = Pool.add

    def add(self, **rows):
        self._rows = torch.cat([self._rows])
        real(self, **rows)

    monkeypatch.setattr(Pool, "add", add)


def plant_no_refusal(monkeypatch):
    real = Pool.sample

    def sample(self, n, generator):
        self._filled = len(self._rows)
        return real(self, n, generator)

    monkeypatch.setattr(Pool, "sample", sample)


def _innocent_own_copy(monkeypatch):
    real = Pool.sample
    monkeypatch.setattr(
        Pool,
        "sample",
        lambda self, n, generator: {name: rows.clone() for name, rows in real(self, n, generator).items()},
    )


def _innocent_rows_in_order(monkeypatch):
    real = torch.randint
    monkeypatch.setattr("repro.pool.torch.randint", lambda *args, **rest: real(*args, **rest).sort().values)


innocent = [_innocent_own_copy, _innocent_rows_in_order]


def test_holds(project, storages, tmp_path):
    check_sampling(storages, tmp_path)
    check_building(storages)
    check_refusal()
    for experiment in EXPERIMENTS:
        check_phase(project, storages, tmp_path, experiment)


@pytest.mark.parametrize("variant", innocent)
def test_silent_on(proof, project, storages, tmp_path, variant):
    proof.silent(lambda: check_sampling(storages, tmp_path), variant)
    for experiment in EXPERIMENTS:
        proof.silent(lambda: check_phase(project, storages, tmp_path, experiment), variant)


@pytest.mark.parametrize("plant", [plant_join_at_every_draw, plant_shuffle_at_every_draw])
def test_catches_work_that_grows_with_the_pool(proof, project, storages, tmp_path, plant):
    proof.caught(
        lambda: check_sampling(storages, tmp_path),
        plant,
        "drawing 16 entries allocates by the size of the pool: {'100': ",
    )
    for experiment in EXPERIMENTS:
        proof.caught(
            lambda: check_phase(project, storages, tmp_path, experiment),
            plant,
            "a step of phase 1 allocates by the size of the pool: {32: ",
        )


def test_catches_a_second_pool_while_building(proof, storages):
    proof.caught(lambda: check_building(storages), plant_grow_by_joining, "building peaks at ")


def test_a_pool_is_not_sampled_before_it_is_full_by_way_of_a_file(tmp_path):
    pool = Pool(4, {"x": ()})
    pool.add(x=torch.zeros(3))
    with pytest.raises(ValueError, match="found 3 entries, expected all 4"):
        pool.save(tmp_path / "pool.safetensors")


def test_catches_sampling_before_the_pool_is_full(proof):
    proof.caught(check_refusal, plant_no_refusal, "a pool was sampled before it was full")
