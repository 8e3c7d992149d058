"""m57: a state that is changed by looking at it before the first step.

A loop of which a snapshot was taken before its first step ends in the same bits as one that nobody looked at.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from proof import Proof
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import get_state_dict

from repro import checkpoint
from repro.loop import Loop
from repro.phases import Phase
from repro.runtime import CPU

STEPS, RATE = 3, 0.1
OPTIMISERS = {
    "Adam": optim.Adam,
    "AdamW": optim.AdamW,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "SGD with dampening": partial(optim.SGD, momentum=0.9, dampening=0.5),
    "SGD": optim.SGD,
    "SGD with momentum": partial(optim.SGD, momentum=0.9),
    "RMSprop": optim.RMSprop,
    "Adagrad": optim.Adagrad,
}


@dataclass
class State:
    net: nn.Module
    optimiser: optim.Optimizer


class Fit(Phase[State]):
    name, steps = "fit", STEPS

    def __init__(self, make_optimiser):
        self.make_optimiser = make_optimiser

    def setup(self, earlier):
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        return State(net, self.make_optimiser(net.parameters(), lr=RATE))

    def minibatch(self, step, draw):
        return {"x": torch.randn(16, 3, generator=draw)}

    def train_step(self, state, batch, update):
        for part in update.parts(batch):
            update.backward((state.net(part["x"]).squeeze(1) - part["x"].sum(1)).square().mean())
        update.log("loss", update.step(state.optimiser))

    def networks(self, state):
        return {"net": state.net}


def weights_after(steps, optimiser, looks_at=()):
    """The weights after so many steps, with a snapshot before each of the steps `looks_at`."""
    loop = Loop(Fit(OPTIMISERS[optimiser]), seed=0, runtime=CPU, earlier={})
    for step in range(steps):
        if step in looks_at:
            loop.snapshot()
        loop.one_step(loop.next_batch())
    return torch.cat([weight.detach().flatten() for weight in loop.state.net.parameters()])


def check(before):
    off = float((weights_after(STEPS, "Adam", [before]) - weights_after(STEPS, "Adam")).abs().max())
    assert off == 0, f"a snapshot before step {before + 1} moved a weight by {off:.3f} after {STEPS} steps"


def _saved_by(get, monkeypatch):
    """Network and optimiser of a state are saved by `get`."""
    real = checkpoint.saved

    def saved(value):
        kept = real(value)
        if isinstance(value, State) and (got := get(value)):
            kept["net"]["state_dict"], kept["optimiser"] = got
        return kept

    monkeypatch.setattr(checkpoint, "saved", saved)


def get_state_dict_of_torch(monkeypatch):
    _saved_by(lambda state: get_state_dict(state.net, state.optimiser), monkeypatch)


def a_step_to_fill_it(monkeypatch):
    """By hand: a step with zero gradients and a rate of zero makes the tensors that are to be loaded."""

    def get(state):
        (group,) = state.optimiser.param_groups
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
        group["lr"] = 0.0
        state.optimiser.step()
        state.optimiser.zero_grad()
        group["lr"] = RATE

    _saved_by(get, monkeypatch)


def get_state_dict_where_there_is_one(monkeypatch):
    """Before the first step there is nothing to save of Adam."""
    _saved_by(lambda s: s.optimiser.state and get_state_dict(s.net, s.optimiser), monkeypatch)


def get_state_dict_and_back_to_zero(monkeypatch):
    """What the step has counted is taken back."""

    def get(state):
        fresh = not state.optimiser.state
        got = get_state_dict(state.net, state.optimiser)
        for held in state.optimiser.state.values() if fresh else ():
            for tensor in held.values():
                tensor.zero_()
        return got

    _saved_by(get, monkeypatch)


MOVED = "a snapshot before step 1 moved a weight by 0.0"
PROOFS = [
    Proof(
        partial(check, 0),
        plant={get_state_dict_of_torch: MOVED, a_step_to_fill_it: MOVED},
        innocent=[get_state_dict_where_there_is_one, get_state_dict_and_back_to_zero],
    )
]


def test_proof(case):
    case()


def test_after_the_first_step_it_changes_nothing(monkeypatch):
    get_state_dict_of_torch(monkeypatch)
    check(1)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_which_optimisers_it_shifts(monkeypatch, optimiser):
    """Those that count steps into the size of a step, and those whose first step is another one."""
    right = weights_after(STEPS, optimiser)
    get_state_dict_of_torch(monkeypatch)
    off = float((weights_after(STEPS, optimiser, [0]) - right).abs().max())
    shifts = optimiser in ("Adam", "AdamW", "NAdam", "RAdam", "SGD with dampening")
    assert off > 0.01 if shifts else off == 0, off


def test_the_first_step_of_adam_is_shorter(monkeypatch):
    """0.744 of the rate for a weight with a gradient, by the corrections of a second step."""
    start = weights_after(0, "Adam")
    get_state_dict_of_torch(monkeypatch)
    moved = (weights_after(1, "Adam", [0]) - start).abs().max()
    assert float(moved) / RATE == pytest.approx(0.1 / 0.19 / (0.001 / 0.001999) ** 0.5, abs=1e-3)
    assert float(moved) / RATE == pytest.approx(0.744, abs=1e-3)


def test_the_figure_of_the_entry(monkeypatch):
    right = weights_after(STEPS, "Adam")
    get_state_dict_of_torch(monkeypatch)
    assert float((weights_after(STEPS, "Adam", [0]) - right).abs().max()) == pytest.approx(0.05, abs=0.01)


def test_weight_decay_fills_the_averages():
    net = nn.Linear(3, 1)
    adam = optim.Adam(net.parameters(), lr=RATE, weight_decay=0.01)
    get_state_dict(net, adam)
    assert adam.state[net.weight]["exp_avg"].abs().max() > 0
