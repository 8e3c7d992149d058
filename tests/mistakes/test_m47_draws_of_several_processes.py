"""m47: the same draws on every rank, or a seed for each rank.

What two processes train on in a step is the minibatch of one process, each row once. Dropout, which no two of them may share, differs.
"""

import os
from functools import partial

import numpy as np
import pytest
import torch
from proof import Proof

from nsgf import phases as methods
from repro import loop, update
from repro.config import Pace
from repro.run import plan
from repro.runtime import Runtime, World

STEPS, BATCH, SIZE = 3, 8, 2
TINY = [f"phases.*.iterations={STEPS}", f"phases.*.batch_size={BATCH}", "phases.*.network.width=8"]


@pytest.fixture(scope="module")
def config(project):
    return plan(project, "2d-moons", TINY).config


def trained_on(rank, size, config, folder):
    """The rows that the losses of one process get, step by step, and the seeds of their dropout. No process waits for another."""
    rows, seeds = [], []

    def noting(real):
        def loss(model, batch):
            columns = [batch[name].reshape(len(batch["t"]), -1) for name in ("x_0", "y", "t")]
            rows.append([tuple(row) for row in torch.cat(columns, 1).tolist()])
            seeds.append(torch.initial_seed())
            return real(model, batch)

        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        # Each process alone, as if the others had the same.
        patch.setattr(World, "_meet", lambda self, place, *numbers: [list(numbers)] * self.size)
        patch.setattr(World, "_wait", lambda self, exchange, *tensors: None)
        patch.setattr(World, "gather", lambda self, rows, place: torch.cat([rows] * self.size))
        patch.setattr(loop, "_try_parts", lambda *given: None)
        runtime = Runtime(torch.device("cpu"), world=World(rank, size))
        (phase,) = (phase for phase in methods.make_phases(config, runtime) if phase.name == "ot_cfm")
        phase.loss = noting(phase.loss)
        pace = Pace(log_every=STEPS, checkpoint_every=STEPS)
        loop._train(loop.Loop(phase, seed=0, runtime=runtime, earlier={}, folder=folder), folder, {}, pace)
    return rows, seeds


def pairs_drawn_by_numpy(x_0, y):
    """Pairs drawn from a plan by NumPy's global generator, as torchcfm's `OTPlanSampler.sample_map` draws them."""
    plan = torch.softmax(-torch.cdist(x_0, y).square().double(), 1).numpy()
    return torch.tensor([np.random.choice(len(y), p=row) for row in plan])


def check(pairs, config, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        if pairs == "drawn":
            patch.setattr(methods, "optimal_assignment", pairs_drawn_by_numpy)
        alone, _ = trained_on(0, 1, config, tmp_path / "alone")
        ranks = [trained_on(rank, SIZE, config, tmp_path / str(rank)) for rank in range(SIZE)]
    for step in range(STEPS):
        together = [row for rows, _ in ranks for row in rows[step]]
        twice = len(together) - len(set(together))
        assert not twice, f"step {step}: {twice} of {len(together)} rows are trained on by both processes"
        foreign = len(set(together) - set(alone[step]))
        assert not foreign, f"step {step}: {foreign} of {len(together)} rows are none of one process's minibatch"
        assert len(together) == BATCH, f"step {step}: found {len(together)} rows in all, expected {BATCH}"
        seeds = {seeds[step] for _, seeds in ranks}
        assert len(seeds) == SIZE, f"step {step}: the processes drop the same units"


def rank_of_this_process():
    return int(os.environ["RANK"])


def a_seed_for_each_rank(monkeypatch):
    """`seed + rank`: each process draws a minibatch of its own and trains on a part of it."""
    real = loop.Draw
    monkeypatch.setattr(loop, "Draw", lambda seed, *parts, **more: real(seed + rank_of_this_process(), *parts, **more))


def the_same_rows_for_every_rank(monkeypatch):
    """The batch is made smaller by the number of processes, the seed is not changed: each draws what the others draw."""
    monkeypatch.setattr(update, "rows_of", lambda part, parts: slice(BATCH // parts))


def the_whole_minibatch_for_every_rank(monkeypatch):
    monkeypatch.setattr(update, "rows_of", lambda part, parts: slice(None))
    monkeypatch.setattr(update.Update, "_require_whole", lambda self, off: None)  # which finds it too


def global_generators_of_the_rank(monkeypatch):
    """They get the rank's seed before the minibatch is drawn, which dropout needs, and which a library that draws pairs must not have."""
    real = loop.seed_global_generators
    monkeypatch.setattr(loop, "seed_global_generators", lambda *parts: real(*parts, rank_of_this_process()))


def dropout_of_one_process(monkeypatch):
    """No draw knows the rank, not even dropout."""
    monkeypatch.setattr(update.Update, "draw_apart", lambda self, *names: None)


def halves(monkeypatch):
    """Rows that lie beside each other go to one process, not every second one."""
    size = BATCH // SIZE
    monkeypatch.setattr(
        update, "rows_of", lambda part, parts: slice(part * size, (part + 1) * size) if parts > 1 else slice(None)
    )


def shuffled_before_it_is_shared_out(monkeypatch):
    """By an order that all processes draw alike."""
    real, order = update.rows_of, torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(update, "rows_of", lambda part, parts: order[real(part, parts)])


def dropout_by_another_key(monkeypatch):
    """The part may enter the seed of dropout in any way."""
    real = update.Update.draw_apart
    monkeypatch.setattr(update.Update, "draw_apart", lambda self, *names: real(self, "dropout of", *names))


INNOCENT = [halves, shuffled_before_it_is_shared_out, dropout_by_another_key]
BOTH = "rows are trained on by both processes"
FOREIGN = "rows are none of one process's minibatch"
PROOFS = [
    Proof(
        partial(check, "matched"),
        plant={
            a_seed_for_each_rank: FOREIGN,
            the_same_rows_for_every_rank: "step 0: 4 of 8 " + BOTH,
            the_whole_minibatch_for_every_rank: "step 0: 8 of 16 " + BOTH,
            dropout_of_one_process: "step 0: the processes drop the same units",
        },
        innocent=INNOCENT,
    ),
    Proof(
        partial(check, "drawn"),
        plant={a_seed_for_each_rank: FOREIGN, global_generators_of_the_rank: FOREIGN},
        innocent=INNOCENT,
    ),
]


def test_proof(case):
    case()
