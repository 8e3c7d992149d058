"""m61: unequal shares of a minibatch weighed equally.

Two processes with unequal numbers of rows, or of tokens, move the weights as one process with the whole minibatch does.
"""

from functools import partial

import pytest
from processes import in_processes
from proof import Proof
from sequences import Sequences, real_of_all, stepped, weights_of, what_is_said

from repro.loop import Loop
from repro.runtime import CPU
from repro.update import Update

RIGHT = {"places": None, "tokens": real_of_all}
ROWS = {"places": 7, "tokens": 7}
"""Four rows and three, with 11 tokens and 7."""


def step(runtime, mean, rows):
    return stepped(runtime, mean, rows, RIGHT[mean]).tolist()


def check(mean, in_each_process, tmp_path):
    found = in_processes(2, in_each_process, step, mean, ROWS[mean], folder=tmp_path / mean)
    assert found[0] == found[1], f"mean over {mean}: two processes have other weights"
    off = distance(found[0], stepped(CPU, mean, ROWS[mean], RIGHT[mean]).tolist())
    assert off < 1e-5, f"mean over {mean}: the weights of two processes are {off:.3f} from those of one"


def distance(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def mean_of_means():
    """What averaging gradients over processes does: each process counts the same."""
    Update._share = lambda self: 1 / self._part.of
    by_rows()


def by_rows():
    RIGHT["tokens"] = None


def averaged(in_each_process):
    in_each_process.append(mean_of_means)


def weighed_by_rows(in_each_process):
    """Of a mean over tokens."""
    in_each_process.append(by_rows)


def averaged_where_shares_are_equal(in_each_process, monkeypatch):
    """Of eight rows each second one; of ten, sequences of the same five lengths."""
    monkeypatch.setitem(ROWS, "places", 8)
    monkeypatch.setitem(ROWS, "tokens", 10)
    in_each_process.append(mean_of_means)


PLACES, TOKENS = (f"mean over {mean}: the weights of two processes are 0." for mean in RIGHT)
PROOFS = [
    Proof(
        partial(check, "places"), plant={averaged: PLACES}, innocent=[averaged_where_shares_are_equal, weighed_by_rows]
    ),
    Proof(
        partial(check, "tokens"),
        plant={averaged: TOKENS, weighed_by_rows: TOKENS},
        innocent=[averaged_where_shares_are_equal],
    ),
]


def test_proof(case):
    case()


def said(runtime):
    return [what_is_said(runtime, "tokens", ROWS["tokens"], weights) for weights in (real_of_all, None)]


def test_a_mean_over_tokens_that_is_weighed_by_rows_is_refused_before_the_first_step(tmp_path):
    for right, wrong in in_processes(2, [], said, folder=tmp_path / "processes"):
        assert not right and "a mean over another count than rows" in wrong


@pytest.mark.parametrize(
    ("mean", "plant", "off"),
    [("places", mean_of_means, 0.06), ("tokens", mean_of_means, 0.1), ("tokens", by_rows, 0.03)],
)
def test_the_figures_of_the_entry(tmp_path, mean, plant, off):
    """How far a step ends from the right one, in lengths of the right one."""
    found, _ = in_processes(2, [plant], step, mean, ROWS[mean], folder=tmp_path / "processes")
    begun = weights_of(Loop(Sequences(mean, ROWS[mean]), seed=0, runtime=CPU, earlier={})).tolist()
    right = stepped(CPU, mean, ROWS[mean], RIGHT[mean]).tolist()
    assert distance(found, right) / distance(right, begun) == pytest.approx(off, abs=0.005)
