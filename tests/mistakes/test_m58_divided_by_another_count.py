"""m58: accumulated losses that are not divided, or by another count than they are a mean over.

A step in unequal micro-batches moves the weights as the whole does; one with parts that are weighed wrongly is refused.
"""

from functools import partial

import pytest
import sequences
import torch
from proof import Proof
from sequences import Sequences, real_of_all, stepped, weights_of, what_is_said

from repro import split
from repro.errors import RunFailed
from repro.loop import Loop
from repro.runtime import CPU, Runtime
from repro.update import Update

ROWS, MICRO_BATCHES = 8, 3
RIGHT = {"places": None, "tokens": real_of_all}


def in_micro_batches():
    return Runtime(torch.device("cpu"), micro_batches={"sequences": MICRO_BATCHES})


def check(mean):
    whole = stepped(CPU, mean, ROWS, RIGHT[mean])
    off = float((stepped(in_micro_batches(), mean, ROWS, RIGHT[mean]) - whole).norm())
    assert off < 1e-5, f"mean over {mean}: the weights after micro-batches are {off:.2f} from those of the whole"
    if mean == "tokens":
        moved = float((stepped(CPU, mean, ROWS, RIGHT[mean], 3.0) - whole).norm())
        assert moved == 0, f"mean over {mean}: what stands in the padding moved the weights by {moved:.2f}"


def weighed_by_rows(monkeypatch):
    """Of a mean over tokens."""
    monkeypatch.setitem(RIGHT, "tokens", None)


def not_divided(monkeypatch):
    """Each micro-batch counts as a minibatch, and nobody adds up what they count."""
    monkeypatch.setattr(Update, "_require_whole", lambda self, off: None)
    monkeypatch.setattr(Update, "_share", lambda self: 1.0)
    weighed_by_rows(monkeypatch)


def divided_by_their_number(monkeypatch):
    monkeypatch.setattr(Update, "_share", lambda self: 1 / self._part.of)
    weighed_by_rows(monkeypatch)


def padding_counts(monkeypatch):
    monkeypatch.setattr(
        Sequences, "loss", lambda self, net, part: (net(part["x"]).squeeze(2) - part["x"].sum(2)).square().mean()
    )
    weighed_by_rows(monkeypatch)


def _divided_by_the_number_of_equal_ones(rows, monkeypatch):
    monkeypatch.setitem(globals(), "ROWS", rows)
    divided_by_their_number(monkeypatch)


def other_micro_batches(monkeypatch):
    monkeypatch.setitem(globals(), "MICRO_BATCHES", 5)


WRONG = {
    "a mean over tokens that is weighed by rows": None,
    "parts that are not divided": lambda part, batch: 1.0,
    "parts that are divided by their number": lambda part, batch: 1 / MICRO_BATCHES,
}


def check_refusals():
    said = what_is_said(in_micro_batches(), "tokens", ROWS, real_of_all)
    assert not said, f"the right weights: found a refusal: {said}"
    for name, weights in WRONG.items():
        assert what_is_said(in_micro_batches(), "tokens", ROWS, weights), f"{name}: found no refusal"


def nearly_the_same_is_the_same(monkeypatch):
    """Gradients within their own length of each other pass."""
    monkeypatch.setattr(split, "OFF", 1.0)


def tried_on_sequences_of_one_length(monkeypatch):
    """Rows that hide it, as those of a test often are."""

    def split_test(phase, batches, *rest):
        full = {step: {**batch, "real": torch.ones_like(batch["real"])} for step, batch in batches.items()}
        return split.split_test(phase, full, *rest)

    monkeypatch.setattr(sequences, "split_test", split_test)


def a_tenth_of_the_tolerance(monkeypatch):
    monkeypatch.setattr(split, "OFF", split.OFF / 10)


def more_rows_are_tried(monkeypatch):
    monkeypatch.setattr(split, "ROWS", 5)


PLACES, TOKENS = (f"mean over {mean}: the weights after micro-batches are " for mean in RIGHT)
PROOFS = [
    Proof(
        partial(check, "places"),
        plant={not_divided: PLACES, divided_by_their_number: PLACES},
        innocent=[partial(_divided_by_the_number_of_equal_ones, 9), other_micro_batches],
    ),
    Proof(
        partial(check, "tokens"),
        plant={
            not_divided: TOKENS,
            divided_by_their_number: TOKENS,
            weighed_by_rows: TOKENS,
            padding_counts: "mean over tokens: what stands in the padding moved the weights by",
        },
        # Of fifteen rows each third one: sequences of the same five lengths in each part.
        innocent=[partial(_divided_by_the_number_of_equal_ones, 15), other_micro_batches],
    ),
    Proof(
        check_refusals,
        plant=dict.fromkeys(
            [nearly_the_same_is_the_same, tried_on_sequences_of_one_length],
            "a mean over tokens that is weighed by rows: found no refusal",
        ),
        innocent=[a_tenth_of_the_tolerance, more_rows_are_tried],
    ),
]


def test_proof(case):
    case()


def test_weights_that_do_not_sum_to_one_end_the_step():
    with pytest.raises(RunFailed, match="found weights that sum to 3 over all parts, expected 1"):
        stepped(in_micro_batches(), "places", ROWS, lambda part, batch: 1.0)


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
    begun = weights_of(Loop(Sequences(mean, ROWS), seed=0, runtime=CPU, earlier={}))
    right = stepped(CPU, mean, ROWS, RIGHT[mean])
    plant(monkeypatch)
    found = stepped(in_micro_batches(), mean, ROWS, RIGHT[mean])
    assert float((found - right).norm() / (right - begun).norm()) == pytest.approx(off, abs=0.01)
