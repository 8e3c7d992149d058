"""m26: random state or data order lost on resume.

Each step of a resumed run trains on the rows, and drops the units, that the same step of an uninterrupted run does.
"""

import hashlib

import torch
from proof import Proof
from tiny_phase import STEPS, TinyPhase, train

from repro import checkpoint, loop, randomness

KILLED_AT, RESUMED_AT = 5, 4


def check(tmp_path):
    whole = train(TinyPhase(), tmp_path / "whole")
    train(TinyPhase(KILLED_AT), tmp_path / "killed")
    resumed = train(TinyPhase(), tmp_path / "killed")
    assert resumed.done == list(range(RESUMED_AT, STEPS))
    for what, found, expected in (
        ("trains on the rows", resumed.rows, whole.rows),
        ("drops the units", resumed.dropped, whole.dropped),
    ):
        assert len({str(one) for one in expected}) == STEPS  # or one step would pass for another
        for step, one in zip(resumed.done, found, strict=True):
            whose = f"step {expected.index(one)}" if one in expected else "no step"
            assert one == expected[step], f"step {step} of a resumed run {what} of {whose} of an uninterrupted one"


def dropout_seeded_once_a_process(monkeypatch):
    """Global generators get their seed where the network is initialised, and no other. The rows are functions of the step still."""
    real = loop.seed_global_generators

    def seed_global_generators(*parts):
        if "initialise" in parts:
            real(*parts)

    monkeypatch.setattr(loop, "seed_global_generators", seed_global_generators)


def all_seeded_once_a_process(monkeypatch):
    """`torch.manual_seed(seed)` at the start, and everything drawn from there."""
    dropout_seeded_once_a_process(monkeypatch)
    monkeypatch.setattr(loop, "Draw", lambda *parts, **more: torch.default_generator)


def another_seed_after_a_resume(monkeypatch):
    """Nothing is replayed, but the order is not that of one run: within an epoch rows come twice and others never."""
    real, newest = loop.Draw, checkpoint.newest
    session = []

    def noting(*arguments):
        found = newest(*arguments)
        session[:] = ["session"] * (found is not None)
        return found

    monkeypatch.setattr(checkpoint, "newest", noting)
    monkeypatch.setattr(loop, "Draw", lambda *parts, **more: real(*parts, *session, **more))


def random_state_saved_with_the_weights(monkeypatch):
    """One stream for the whole run, put back where it was."""
    all_seeded_once_a_process(monkeypatch)
    save, load = checkpoint.save, loop.Loop.restore

    def restore(self, before):
        load(self, before)
        torch.set_rng_state(before["random"])

    monkeypatch.setattr(checkpoint, "save", lambda path, state: save(path, state | {"random": torch.get_rng_state()}))
    monkeypatch.setattr(loop.Loop, "restore", restore)


def another_function_of_the_step(monkeypatch):
    """Other draws by the same rule."""
    monkeypatch.setattr(
        randomness, "derive_seed", lambda *parts: int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)
    )


PROOFS = [
    Proof(
        check,
        plant={
            all_seeded_once_a_process: "step 4 of a resumed run trains on the rows of step 0 of an uninterrupted one",
            another_seed_after_a_resume: "step 4 of a resumed run trains on the rows of no step of an uninterrupted one",
            dropout_seeded_once_a_process: "step 4 of a resumed run drops the units of step 0 of an uninterrupted one",
        },
        innocent=[random_state_saved_with_the_weights, another_function_of_the_step],
    )
]


def test_proof(case):
    case()
