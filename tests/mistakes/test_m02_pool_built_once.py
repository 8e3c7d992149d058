"""m02: the pool joined again at every step.

Bytes that drawing a minibatch allocates depend on the minibatch, not on the pool, in memory and on the disk; building a pool allocates one pool, and
what is not full is not drawn from.
"""

from functools import partial
from itertools import chain

import torch
from proof import Proof

from nsgf.phases import VelocityField, make_phases
from repro import rounds
from repro.config import load
from repro.loop import Loop
from repro.rounds import Rows
from repro.runtime import Runtime
from repro_tools.minibatch import draw

CPU = Runtime(torch.device("cpu"))
BATCH = 16
EXPERIMENTS = ["2d-moons", "digits"]


def phase_1(project, experiment, *settings):
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], list(settings))
    return make_phases(config, CPU)[0]


def bytes_made(storages, work):
    with storages() as counted:
        work()
    return counted.made


def check_sampling(project, storages, tmp_path):
    """In half precision, as a large pool may be stored."""
    phase = phase_1(project, "2d-moons", f"phases.*.batch_size={BATCH}")

    def pool(entries):
        return {name: torch.zeros(entries, *shape, dtype=torch.float16) for name, shape in columns.items()}

    columns = {"x_t": (2,), "v_t": (2,), "t": ()}
    on_the_disk = rounds.read(tmp_path / rounds.write(tmp_path, pool(10_000)))
    pools = {"100": pool(100), "10000": pool(10_000), "10000 on the disk": on_the_disk}
    found = {name: bytes_made(storages, lambda pool=pool: draw(phase, 0, 0, pool)) for name, pool in pools.items()}
    needed = BATCH * (8 + (2 + 2 + 1) * (2 + 4))  # indices, and the rows as they are stored and as they are trained on
    assert max(found.values()) <= 2 * needed, (
        f"drawing {BATCH} entries allocates by the size of the pool: {found} bytes, needed are {needed}"
    )


def check_building(project, storages):
    phase = phase_1(project, "2d-moons", "phases.*.pool.batches=20", "phases.*.pool.batch_size=64")
    phase.velocity = lambda x, y: y - x  # that of the Sinkhorn flow needs memory of its own
    loop = Loop(phase, seed=0, runtime=CPU, earlier={})
    with storages() as counted:
        loop.collect_if_due()
    pools = counted.peak / loop.round.rows.nbytes
    assert pools <= 1.2, f"building peaks at {pools:.1f} pools, expected one"


def check_refusal():
    pool = Rows(4, {"x": ()})
    pool.add(x=torch.zeros(3))
    try:
        pool.sample(2, torch.Generator())
    except ValueError as error:
        assert str(error) == "rows: found 3, expected all 4"
    else:
        raise AssertionError("a pool was sampled before it was full")


def check_phase(experiment, project, storages, tmp_path):
    """The same for a whole training step of phase 1, its pool on the disk: its minibatch and its loss."""
    made = {}
    for batches in (1, 20):
        phase = phase_1(
            project,
            experiment,
            "phases.*.pool.batch_size=16",
            f"phases.*.pool.batches={batches}",
            "phases.*.batch_size=8",
            "phases.velocity_field.flow.steps=2",
        )
        loop = Loop(phase, seed=0, runtime=CPU, earlier={}, folder=tmp_path / str(batches))
        loop.collect_if_due()
        step = lambda phase=phase, loop=loop: phase.loss(loop.state.model, loop.next_batch())  # noqa: E731
        made[loop.round.rows.count] = bytes_made(storages, step)
    assert len(set(made.values())) == 1, f"a step of phase 1 allocates by the size of the pool: {made} bytes"


def drawn_from(monkeypatch, change):
    """A minibatch is drawn from what `change` makes of the columns."""
    real = VelocityField.minibatch

    def minibatch(self, step, draw):
        draw.collected = Rows.of({name: change(column) for name, column in draw.collected.items()})
        return real(self, step, draw)

    monkeypatch.setattr(VelocityField, "minibatch", minibatch)


def joined_at_every_draw(monkeypatch):
    drawn_from(monkeypatch, lambda column: torch.cat(column.split(10)))


def converted_at_every_draw(monkeypatch):
    """To the precision of the training, and only then are the rows taken."""
    drawn_from(monkeypatch, torch.Tensor.double)


def drawn_by(monkeypatch, numbers):
    """`numbers` gives those of the rows, of how many there are, of the size of the minibatch, and of the generator."""

    def minibatch(self, step, draw):
        rows = numbers(len(draw.collected["t"]), self.config.batch_size, draw)
        return {name: column[rows].float() for name, column in draw.collected.items()}

    monkeypatch.setattr(VelocityField, "minibatch", minibatch)


def shuffled_at_every_draw(monkeypatch):
    drawn_by(monkeypatch, lambda rows, n, draw: torch.randperm(rows, generator=draw)[:n])


def rows_in_order(monkeypatch):
    drawn_by(monkeypatch, lambda rows, n, draw: torch.randint(rows, (n,), generator=draw).sort().values)


def own_copy(monkeypatch):
    real = VelocityField.minibatch
    copied = lambda *arguments: {name: rows.clone() for name, rows in real(*arguments).items()}  # noqa: E731
    monkeypatch.setattr(VelocityField, "minibatch", copied)


def states_of(phase):
    return chain.from_iterable(map(phase.trajectory, range(phase.config.pool.batches)))


def grown_by_joining(monkeypatch):
    def collect(self, state, update):
        pool = {}
        for rows in states_of(self):
            pool = {name: torch.cat([pool[name], column]) for name, column in rows.items()} if pool else rows
        return pool

    monkeypatch.setattr(VelocityField, "collect", collect)


def joined_at_the_end(monkeypatch):
    def collect(self, state, update):
        states = list(states_of(self))
        return {name: torch.cat([rows[name] for rows in states]) for name in states[0]}

    monkeypatch.setattr(VelocityField, "collect", collect)


def filled(monkeypatch, make, parts=1):
    """State behind state, each in so many parts, into what `make` gives for the method's number of rows."""

    def collect(self, state, update):
        pool = make(update, self.config.pool.batches * self.entries_of_batch, self.columns)
        for rows in states_of(self):
            for part in zip(*(column.chunk(parts) for column in rows.values()), strict=True):
                pool.add(**dict(zip(rows, part, strict=True)))
        return pool

    monkeypatch.setattr(VelocityField, "collect", collect)


def filled_in_two_halves(monkeypatch):
    filled(monkeypatch, lambda update, *size: update.room(*size), parts=2)


def in_rows_of_its_own(monkeypatch):
    filled(monkeypatch, lambda update, *size: Rows(*size))


def sampled_before_it_is_full(monkeypatch):
    monkeypatch.setattr(Rows, "full", True)


def full_by_its_last_row(monkeypatch):
    """Who asks for all rows asks for the last one."""
    monkeypatch.setattr(Rows, "full", property(lambda self: not self.filled < self.count))


BY_SIZE = "drawing 16 entries allocates by the size of the pool: {'100': "
STEP_BY_SIZE = "a step of phase 1 allocates by the size of the pool: {32: "
CORRECT = [own_copy, rows_in_order]
PROOFS = [
    Proof(
        check_sampling,
        {joined_at_every_draw: BY_SIZE, shuffled_at_every_draw: BY_SIZE, converted_at_every_draw: BY_SIZE},
        CORRECT,
    ),
    Proof(
        check_building,
        {grown_by_joining: "building peaks at 2.0 pools", joined_at_the_end: "building peaks at 2.0 pools"},
        [filled_in_two_halves, in_rows_of_its_own],
    ),
    Proof(
        check_refusal,
        {sampled_before_it_is_full: "a pool was sampled before it was full"},
        [full_by_its_last_row],
    ),
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
