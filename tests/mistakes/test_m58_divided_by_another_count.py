"""m58: accumulated losses that are not divided, or by another count than they are a mean over.

A step in unequal micro-batches moves the weights as the whole minibatch does; one whose parts are weighed wrongly is refused.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from proof import Proof
from torch import nn

from repro import split
from repro.errors import RunFailed
from repro.loop import Loop
from repro.phases import Phase
from repro.runtime import Runtime
from repro.update import Update

ROWS, MICRO_BATCHES, LENGTH = 8, 3, 5


@dataclass
class State:
    net: nn.Module
    sgd: torch.optim.Optimizer


class Sequences(Phase[State]):
    """Errors at the places of sequences of unequal length: a mean over all places, or over those that are no padding.

    `weights` is what each part counts, from the part and the whole; None for the engine's own. In the padding stands `junk`.
    """

    name, steps = "sequences", 1

    def __init__(self, mean, weights=None, junk=0.0):
        self.mean, self.weights, self.junk = mean, weights, junk

    def setup(self, earlier):
        net = nn.Linear(4, 1)
        return State(net, torch.optim.SGD(net.parameters(), lr=1.0))

    def minibatch(self, step, draw):
        real = torch.arange(LENGTH) < torch.arange(ROWS)[:, None] % LENGTH + 1
        x = torch.randn(ROWS, LENGTH, 4, generator=draw)
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


RIGHT = {"places": None, "tokens": real_of_all}


def runtime(micro_batches):
    return Runtime(torch.device("cpu"), micro_batches={"sequences": micro_batches})


def stepped(phase, micro_batches=1):
    """The weights after one step. Raises RunFailed where it is refused."""
    loop = Loop(phase, seed=0, runtime=runtime(micro_batches), earlier={})
    loop.one_step(loop.next_batch())
    loop.numbers()
    return torch.cat([weight.detach().flatten() for weight in loop.state.net.parameters()])


def check(mean):
    whole = stepped(Sequences(mean, RIGHT[mean]))
    off = float((stepped(Sequences(mean, RIGHT[mean]), MICRO_BATCHES) - whole).norm())
    assert off < 1e-5, f"mean over {mean}: the weights after micro-batches are {off:.2f} from those of the whole"
    if mean == "tokens":
        moved = float((stepped(Sequences(mean, RIGHT[mean], junk=3.0)) - whole).norm())
        assert moved == 0, f"mean over {mean}: what stands in the padding moved the weights by {moved:.2f}"


def no_sum_is_checked(monkeypatch):
    monkeypatch.setattr(Update, "_require_whole", lambda self, off: None)


def not_divided(monkeypatch):
    """Each micro-batch counts as a minibatch."""
    no_sum_is_checked(monkeypatch)
    monkeypatch.setattr(Update, "_share", lambda self: 1.0)
    monkeypatch.setitem(RIGHT, "tokens", None)


def divided_by_their_number(monkeypatch):
    monkeypatch.setattr(Update, "_share", lambda self: 1 / self._part.of)
    monkeypatch.setitem(RIGHT, "tokens", None)


def weighed_by_rows(monkeypatch):
    """Of a mean over tokens."""
    monkeypatch.setitem(RIGHT, "tokens", None)


def padding_counts(monkeypatch):
    monkeypatch.setattr(
        Sequences, "loss", lambda self, net, part: (net(part["x"]).squeeze(2) - part["x"].sum(2)).square().mean()
    )
    monkeypatch.setitem(RIGHT, "tokens", None)


def by_number_of_equal_ones(monkeypatch):
    """Nine rows in three micro-batches."""
    monkeypatch.setitem(globals(), "ROWS", 9)
    monkeypatch.setattr(Update, "_share", lambda self: 1 / self._part.of)


def tokens_by_number_of_equal_ones(monkeypatch):
    """Every part has sequences of the same lengths."""
    monkeypatch.setitem(globals(), "ROWS", 15)
    monkeypatch.setitem(globals(), "MICRO_BATCHES", 3)
    monkeypatch.setattr(Update, "_share", lambda self: 1 / self._part.of)
    monkeypatch.setitem(RIGHT, "tokens", None)


def other_micro_batches(monkeypatch):
    monkeypatch.setitem(globals(), "MICRO_BATCHES", 5)


WRONG = {
    "a mean over tokens that is weighed by rows": None,
    "parts that are not divided": lambda part, batch: 1.0,
}


def what_is_said(weights):
    """What ends a run of a mean over tokens with these weights, before its first step or in it; nothing where it goes on."""
    phase, ways = Sequences("tokens", weights), runtime(MICRO_BATCHES)
    batch = Loop(phase, seed=0, runtime=ways, earlier={}).draw(0)
    try:
        verdict = split.split_test(phase, batch, 0, 0, ways, {})
        return verdict.why if verdict.outcome == "refused" else ""
    except RunFailed as error:
        return str(error)


def check_refusals():
    said = what_is_said(real_of_all)
    assert not said, f"the right weights: found a refusal: {said}"
    for name, weights in WRONG.items():
        assert what_is_said(weights), f"{name}: found no refusal"


def nearly_the_same_is_the_same(monkeypatch):
    """Gradients within their own length of each other pass."""
    monkeypatch.setattr(split, "OFF", 1.0)


def sequences_of_one_length(monkeypatch):
    """Tried on rows that hide it, as those of a test often are."""
    real = split.split_test

    def split_test(phase, batch, *rest):
        return real(phase, batch | {"real": torch.ones_like(batch["real"])}, *rest)

    monkeypatch.setattr(split, "split_test", split_test)


def a_tenth_of_the_tolerance(monkeypatch):
    monkeypatch.setattr(split, "OFF", split.OFF / 10)


def more_rows_are_tried(monkeypatch):
    monkeypatch.setattr(split, "ROWS", 5)


PLACES, TOKENS = (f"mean over {mean}: the weights after micro-batches are " for mean in RIGHT)
PROOFS = [
    Proof(
        partial(check, "places"),
        plant={not_divided: PLACES, divided_by_their_number: PLACES},
        innocent=[by_number_of_equal_ones, other_micro_batches],
    ),
    Proof(
        partial(check, "tokens"),
        plant={
            not_divided: TOKENS,
            divided_by_their_number: TOKENS,
            weighed_by_rows: TOKENS,
            padding_counts: "mean over tokens: what stands in the padding moved the weights by",
        },
        innocent=[tokens_by_number_of_equal_ones, other_micro_batches],
    ),
    Proof(
        check_refusals,
        plant={
            nearly_the_same_is_the_same: "a mean over tokens that is weighed by rows: found no refusal",
            sequences_of_one_length: "a mean over tokens that is weighed by rows: found no refusal",
        },
        innocent=[a_tenth_of_the_tolerance, more_rows_are_tried],
    ),
]


def test_proof(case):
    case()


def test_weights_that_do_not_sum_to_one_end_the_step():
    with pytest.raises(RunFailed, match="found weights that sum to 3 over all parts, expected 1"):
        stepped(Sequences("places", lambda part, batch: 1.0), MICRO_BATCHES)


@pytest.mark.parametrize(
    ("mean", "plant", "off"),
    [
        ("places", not_divided, 1.87),
        ("places", divided_by_their_number, 0.07),
        ("tokens", weighed_by_rows, 0.08),
        ("tokens", divided_by_their_number, 0.14),
    ],
)
def test_the_figures_of_the_entry(monkeypatch, mean, plant, off):
    """How far a step ends from the right one, in lengths of the right one."""
    start = Loop(Sequences(mean), seed=0, runtime=runtime(1), earlier={}).state.net
    begun = torch.cat([weight.detach().flatten() for weight in start.parameters()])
    right = stepped(Sequences(mean, RIGHT[mean]))
    plant(monkeypatch)
    found = stepped(Sequences(mean, RIGHT[mean]), MICRO_BATCHES)
    assert float((found - right).norm() / (right - begun).norm()) == pytest.approx(off, abs=0.01)
