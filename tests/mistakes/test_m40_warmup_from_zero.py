"""m40: a warm-up that starts at zero, so that the first step does nothing.

The first step moves the weights, no later one moves them by less, and from the step after the warm-up on the rate is the full one.
"""

import math
from functools import partial

import pytest
import torch
from proof import Proof
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from repro.config import Pace
from repro.loop import run_phase
from repro.phases import PLAIN, SingleLossPhase
from repro.runtime import Runtime


class Walk(SingleLossPhase):
    """The gradient is -1 and the rate 1: without a warm-up the weight grows by 1 a step."""

    name, iterations = "walk", 8

    def __init__(self, warmup_steps):
        self.options = PLAIN.model_copy(update={"warmup_steps": warmup_steps})
        self.weights = [0.0]

    def make_model(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def make_optimiser(self, model):
        optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
        optimiser.register_step_post_hook(lambda *_: self.weights.append(model.weight.item()))
        return optimiser

    def minibatch(self, step, generator):
        return {"x": torch.ones(1, 1)}

    def loss(self, model, batch):
        return -model(batch["x"]).mean()

    @property
    def moves(self):
        return [round(after - before, 6) for before, after in zip(self.weights, self.weights[1:], strict=False)]


def walked(warmup_steps, folder):
    phase = Walk(warmup_steps)
    run_phase(
        phase,
        folder=folder,
        identity={},
        seed=0,
        runtime=Runtime(torch.device("cpu")),
        pace=Pace(log_every=8, checkpoint_every=8),
        earlier={},
    )
    return phase.moves


def check(warmup_steps, tmp_path):
    moves = walked(warmup_steps, tmp_path)
    assert moves[0] > 0, f"warm-up of {warmup_steps}: step 1 does nothing, the steps move the weight by {moves}"
    assert sorted(moves) == moves and set(moves[warmup_steps:]) == {1.0}, (
        f"warm-up of {warmup_steps}: found moves of {moves}, expected them to grow to 1"
    )


def ramp(monkeypatch, share):
    """The share of the rate, of the step's number from 0 and the length of the warm-up."""
    monkeypatch.setattr(SingleLossPhase, "_factor", lambda self, step: min(1.0, share(step, self.options.warmup_steps)))


def share_of_the_number_from_zero(monkeypatch):
    """As nanoGPT had it, and GPT-NeoX."""
    ramp(monkeypatch, lambda number, steps: number / steps)


def schedule_of_steps_done(monkeypatch):
    """As torchcfm has it: min(step, warmup) / warmup in a LambdaLR that is stepped after the optimiser."""
    real = SingleLossPhase.train_step

    def set_rates(self, state, step):
        if step == 0:
            steps = self.options.warmup_steps
            self.schedule = LambdaLR(state.optimiser, lambda done: min(done, steps) / steps)

    def train_step(self, state, batch, update):
        real(self, state, batch, update)
        self.schedule.step()

    monkeypatch.setattr(SingleLossPhase, "_set_rates", set_rates)
    monkeypatch.setattr(SingleLossPhase, "train_step", train_step)


def full_rate_one_step_later(monkeypatch):
    """As nanoGPT has it now."""
    ramp(monkeypatch, lambda number, steps: (number + 1) / (steps + 1))


def from_a_tenth(monkeypatch):
    ramp(monkeypatch, lambda number, steps: 0.1 + 0.9 * number / steps)


def along_a_cosine(monkeypatch):
    ramp(monkeypatch, lambda number, steps: (1 - math.cos(math.pi * min(1.0, (number + 1) / steps))) / 2)


PROOFS = [
    Proof(
        partial(check, steps),
        {
            share_of_the_number_from_zero: f"warm-up of {steps}: step 1 does nothing, the steps move the weight by [0.0, ",
            schedule_of_steps_done: f"warm-up of {steps}: step 1 does nothing, the steps move the weight by [0.0, ",
        },
        [full_rate_one_step_later, from_a_tenth, along_a_cosine],
    )
    for steps in (1, 4)
]


def test_proof(case):
    case()


@pytest.mark.parametrize(("steps", "moves"), [(0, [1.0] * 8), (4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])])
def test_the_steps_of_the_kit(tmp_path, steps, moves):
    assert walked(steps, tmp_path) == moves
