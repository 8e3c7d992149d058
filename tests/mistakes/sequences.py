"""A phase whose loss is a mean over unequal sequences, for the proofs of parts that count unequally."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from repro.errors import RunFailed
from repro.loop import Loop
from repro.phases import Phase
from repro.split import split_test

LENGTH = 5


@dataclass
class State:
    net: nn.Module
    sgd: torch.optim.Optimizer


class Sequences(Phase[State]):
    """Errors at the places of sequences of unequal length: a mean over all places, or over those that are no padding.

    `weights` gives what a part counts, of the part and the whole; None for the engine's. In the padding is `junk`.
    """

    name, steps = "sequences", 1

    def __init__(self, mean, rows, weights=None, junk=0.0):
        self.mean, self.rows, self.weights, self.junk = mean, rows, weights, junk

    def setup(self, earlier):
        net = nn.Linear(4, 1)
        return State(net, torch.optim.SGD(net.parameters(), lr=1.0))

    def minibatch(self, step, draw):
        real = torch.arange(LENGTH) < torch.arange(self.rows)[:, None] % LENGTH + 1
        x = torch.randn(self.rows, LENGTH, 4, generator=draw)
        return {"x": torch.where(real[..., None], x, torch.tensor(self.junk)), "real": real}

    def loss(self, net, part):
        errors = (net(part["x"]).squeeze(2) - part["x"].sum(2)).square()
        return errors.mean() if self.mean == "places" else errors[part["real"]].mean()

    def train_step(self, state, batch, update):
        for part in update.parts(batch):
            weight = self.weights and self.weights(part, batch)
            update.backward(self.loss(state.net, part), weight=weight)
        update.log("loss", update.step(state.sgd))

    def networks(self, state):
        return {"net": state.net}


def real_of_all(part, batch):
    """A part's fraction of the places that are no padding."""
    return part["real"].sum() / batch["real"].sum()


def stepped(runtime, *phase):
    """The weights after one step. Raises RunFailed where it is refused."""
    loop = Loop(Sequences(*phase), seed=0, runtime=runtime, earlier={})
    loop.one_step(loop.next_batch())
    loop.numbers()
    return weights_of(loop)


def weights_of(loop):
    return torch.cat([weight.detach().flatten() for weight in loop.state.net.parameters()])


def what_is_said(runtime, *phase):
    """What ends a run of this phase before its first step; nothing where it goes on."""
    loop = Loop(Sequences(*phase), seed=0, runtime=runtime, earlier={})
    try:
        verdict = split_test(loop.phase, {0: loop.draw(0)}, 0, runtime, {})
        return verdict.why if verdict.outcome == "refused" else ""
    except RunFailed as error:
        return str(error)
