"""What the rest of the project, and the tools, take for granted of `repro/`: look here first after you have edited it."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from torch import nn

from repro import INTERFACE, checkpoint
from repro.errors import BadInput, RunFailed
from repro.loop import Loop
from repro.phases import Phase
from repro.randomness import Draw
from repro.runtime import CPU
from repro.update import Update

STEPS, ROUND = 8, 4


@dataclass
class Pair:
    network: nn.Module
    other: nn.Module
    adam: torch.optim.Adam
    schedule: torch.optim.lr_scheduler.StepLR
    place: torch.Tensor


class Example(Phase[Pair]):
    """Two networks, dropout, a scheduler, and rounds whose data depend on the state."""

    name, steps, collect_every = "example", STEPS, ROUND

    def setup(self, earlier):
        network, other = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 2)), nn.Linear(2, 2)
        adam = torch.optim.Adam(network.parameters(), lr=0.1)
        return Pair(network, other, adam, torch.optim.lr_scheduler.StepLR(adam, 3), torch.zeros(2))

    def collect(self, state, update):
        state.place = state.place + torch.randn(2, generator=update.generator("walk"))
        return {"x": state.place + torch.arange(12.0).view(6, 2)}

    def minibatch(self, step, draw):
        return {"x": draw.collected["x"][draw.round_rows(3, last="drop")] + torch.randn(3, 2, generator=draw)}

    def train_step(self, state, batch, update):
        for part in update.parts(batch):
            update.backward(state.other(state.network(part["x"])).square().mean(), inputs=state.network)
        update.log("loss", update.step(state.adam, clip=1.0))
        state.schedule.step()

    def networks(self, state):
        return {"network": state.network}


def going(upto, before=None, phase=None):
    """A loop that has gone on, from its beginning or from a snapshot, to a step."""
    loop = Loop(phase or Example(), seed=0, runtime=CPU, earlier={})
    if before is not None:
        loop.restore(before)
    while loop.step < upto:
        loop.collect_if_due()
        loop.one_step(loop.next_batch())
        loop.write_curves(loop.numbers())
    return loop


def contents(path):
    """The hash of all that a checkpoint holds."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()["sha256"]


@pytest.mark.parametrize("killed_at", range(1, STEPS))
def test_a_phase_goes_on_to_the_same_bits(killed_at, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("half", "whole", "resumed")]
    checkpoint.save(paths[0], going(killed_at).snapshot())
    checkpoint.save(paths[1], going(STEPS).snapshot())
    checkpoint.save(paths[2], going(STEPS, checkpoint.load(paths[0])).snapshot())
    assert contents(paths[2]) == contents(paths[1])


def test_a_step_moves_what_it_was_given_and_nothing_else():
    loop = Loop(Example(), seed=0, runtime=CPU, earlier={})
    before = [[weight.clone() for weight in one.parameters()] for one in (loop.state.network, loop.state.other)]
    loop.collect_if_due()
    loop.one_step(loop.next_batch())
    after = [list(one.parameters()) for one in (loop.state.network, loop.state.other)]
    assert not any(map(torch.equal, before[0], after[0]))
    assert all(map(torch.equal, before[1], after[1]))


class LeavesGradients(Example):
    def train_step(self, state, batch, update):
        update.backward(state.other(state.network(batch["x"])).square().mean())
        update.step(state.adam)


class NoState(Example):
    def setup(self, earlier):
        return super().setup(earlier).__dict__


@pytest.mark.parametrize(
    ("phase", "error", "words"),
    [(LeavesGradients, RunFailed, "a gradient left on other.weight"), (NoState, BadInput, "expected a dataclass")],
)
def test_what_no_checkpoint_could_hold_is_refused(phase, error, words):
    with pytest.raises(error, match=words):
        going(1, phase=phase())


def test_the_tools_find_what_they_call():
    assert INTERFACE == 2
    assert list(inspect.signature(Loop).parameters) == ["phase", "seed", "runtime", "earlier", "folder", "make_update"]
    assert list(inspect.signature(Update).parameters) == ["phase", "seed", "runtime"]
    for owner, names in (
        (Loop, ("restore", "prepare", "collect_if_due", "next_batch", "one_step", "numbers", "snapshot")),
        (Update, ("begin", "end", "parts", "backward", "step", "gradient", "log", "generator", "autocast")),
        (Draw, ("epoch_rows", "round_rows")),
    ):
        assert [name for name in names if not callable(getattr(owner, name, None))] == []
