"""m60: workers of a DataLoader that draw alike.

Minibatches that workers draw differ from step to step, and are those of a run without workers, whatever draws them.
"""

import random

import numpy as np
import pytest
import torch
from proof import Proof
from torch import nn
from torch.utils.data import DataLoader, Dataset

from repro import loop, randomness
from repro.loop import Loop
from repro.phases import SingleLossPhase
from repro.runtime import Runtime
from repro_tools.minibatch import draw

STEPS, WORKERS = 4, 2


class Augmented(SingleLossPhase):
    """Each minibatch is four numbers of each generator that a library may draw from."""

    name, iterations = "augmented", STEPS

    def make_model(self):
        return nn.Linear(1, 1)

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(self, model, batch):
        return model(batch["torch"][:, None]).mean()

    def augmentation(self, draw):
        """From NumPy, as a library does it."""
        return np.random.random(4)

    def minibatch(self, step, draw):
        return {
            "numpy": torch.from_numpy(self.augmentation(draw)),
            "python": torch.tensor([random.random() for _ in range(4)]),
            "torch": torch.rand(4),
            "draw": torch.rand(4, generator=draw),
        }


def drawn(workers):
    """The minibatches of STEPS steps."""
    made = Loop(Augmented(), seed=0, runtime=Runtime(torch.device("cpu"), workers=workers), earlier={})
    batches = []
    for _ in range(STEPS):
        batches.append(made.next_batch())
        made.step += 1
    made.close()
    return batches


def check():
    ahead = drawn(WORKERS)
    for name in ahead[0]:
        alike = [
            (one, other)
            for other in range(STEPS)
            for one in range(other)
            if torch.equal(ahead[one][name], ahead[other][name])
        ]
        assert not alike, f"{name}: steps {alike[0][0]} and {alike[0][1]} have the same numbers from {WORKERS} workers"
    for step, (one, other) in enumerate(zip(drawn(0), ahead, strict=True)):
        for name in one:
            assert torch.equal(one[name], other[name]), f"{name}: step {step} has other numbers from {WORKERS} workers"


def not_seeded_by_the_step(monkeypatch):
    """What DataLoader does by itself: each worker gets a seed of its own."""
    real = loop.seed_global_generators
    monkeypatch.setattr(loop, "seed_global_generators", lambda *parts: None if "step" in parts else real(*parts))


def one_seed_for_all_workers(monkeypatch):
    """As DataLoader did it until 2021: each worker has the state of NumPy that it was forked with."""
    not_seeded_by_the_step(monkeypatch)
    monkeypatch.setattr(randomness, "_deaf", lambda worker: np.random.seed(0))


def a_generator_that_is_kept(monkeypatch):
    """Made once, and copied into each worker with what holds it."""
    kept = np.random.default_rng(0)
    monkeypatch.setattr(Augmented, "augmentation", lambda self, draw: kept.random(4))


def a_generator_of_the_step(monkeypatch):
    """NumPy's own, of a seed that comes from the draw."""

    def augmentation(self, draw):
        return np.random.default_rng(int(torch.randint(2**31, (), generator=draw))).random(4)

    monkeypatch.setattr(Augmented, "augmentation", augmentation)


def a_kept_generator_with_a_seed_of_the_step(monkeypatch):
    kept = np.random.RandomState()

    def augmentation(self, draw):
        kept.seed(draw.initial_seed())
        return kept.random_sample(4)

    monkeypatch.setattr(Augmented, "augmentation", augmentation)


def one_worker(monkeypatch):
    monkeypatch.setitem(globals(), "WORKERS", 1)


def a_seed_for_each_worker(monkeypatch):
    """What a worker begins with does not matter: each step is seeded."""
    monkeypatch.setattr(randomness, "_deaf", np.random.seed)


PROOFS = [
    Proof(
        check,
        plant={
            one_seed_for_all_workers: "numpy: steps 0 and 1 have the same numbers from 2 workers",
            a_generator_that_is_kept: "numpy: steps 0 and 1 have the same numbers from 2 workers",
            not_seeded_by_the_step: "numpy: step 0 has other numbers from 2 workers",
        },
        innocent=[
            a_generator_of_the_step,
            a_kept_generator_with_a_seed_of_the_step,
            one_worker,
            a_seed_for_each_worker,
        ],
    )
]


def test_proof(case):
    case()


class Numbers(Dataset):
    """Eight items, each a number."""

    def __init__(self, kind):
        self.kind, self.kept = kind, np.random.default_rng(0)

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return float(self.kept.random() if self.kind == "kept" else np.random.random())


def seeded_with_its_number(worker):
    """Of a `worker_init_fn` that many projects have."""
    np.random.seed(7 + worker)


@pytest.mark.parametrize(
    ("dataset", "options", "in_an_epoch", "again"),
    [
        ("global", {}, 8, False),
        ("global", {"worker_init_fn": seeded_with_its_number}, 8, True),
        ("kept", {}, 4, True),
        ("kept", {"worker_init_fn": seeded_with_its_number}, 4, True),
        ("kept", {"persistent_workers": True}, 4, False),
    ],
)
def test_what_torch_does(dataset, options, in_an_epoch, again):
    """How many different numbers two workers draw for eight items, and whether the next epoch has the same ones."""
    loader = DataLoader(Numbers(dataset), batch_size=2, num_workers=2, multiprocessing_context="fork", **options)
    first, second = (torch.cat(list(loader)).tolist() for _ in range(2))
    assert (len(set(first)), first == second) == (in_an_epoch, again)


def test_two_draws_of_one_step_tell(monkeypatch):
    """What `repro preflight` compares in its row `minibatch`: a generator that is kept goes on between them."""
    a_generator_that_is_kept(monkeypatch)
    one, other = (draw(Augmented(), 0, 0, {})["numpy"] for _ in range(2))
    assert not torch.equal(one, other)
    a_generator_of_the_step(monkeypatch)
    one, other = (draw(Augmented(), 0, 0, {})["numpy"] for _ in range(2))
    assert torch.equal(one, other)
