"""benchmarks/same_bits.py: what it takes for the same network and the same curve, and that it sees a difference."""

import math

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_bits import (
    CannotRun,
    Finished,
    curves_of,
    network_tensors,
    number_difference,
    rows,
    tensor_difference,
)

WEIGHT = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("before", ["model.", "state.model.", "state.networks.model."])
@pytest.mark.parametrize("within", ["0.weight", "model.0.weight"])
def test_a_tensor_is_known_by_its_name_within_the_network(tmp_path, before, within):
    save_file({before + within: WEIGHT, "state.optimiser.0": WEIGHT.clone()}, tmp_path / "model.safetensors")
    assert list(network_tensors(tmp_path / "model.safetensors")) == [within]


@pytest.mark.parametrize("names", [["state.optimiser.0"], ["state.model.0", "state.networks.model.0"]])
def test_no_network_and_two_networks_are_refused(tmp_path, names):
    save_file({name: WEIGHT.clone() for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(CannotRun, match="expected"):
        network_tensors(tmp_path / "model.safetensors")


def test_a_curve_is_the_same_alone_and_by_name():
    alone, by_name = [[5, 0.123457]], {"loss": [[5, 0.12345678]], "accuracy": [[5, 1.0]]}
    assert curves_of({"curves": {"a": alone}}) == curves_of({"curves": {"a": by_name}}) == {"a": [(5, 0.123457)]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"a": WEIGHT}, "equal"),
        ({"a": torch.nextafter(WEIGHT, WEIGHT + 1)}, "1 of 1 differ, most a: 2.4e-07"),
        ({"a": torch.tensor([1.0, math.nan])}, "1 of 1 differ, most a: nan"),
        ({"a": WEIGHT.double()}, "a: float32 (2,) became float64 (2,)"),
        ({"b": WEIGHT}, "gone: a; new: b"),
        ({}, "gone: a"),
    ],
)
def test_what_is_said_of_tensors(changed, words):
    assert tensor_difference({"a": WEIGHT}, changed) == words


def test_minus_zero_is_not_the_same_bits():
    assert tensor_difference({"a": torch.zeros(1)}, {"a": -torch.zeros(1)}) == "1 of 1 differ, most a: 0"


def test_what_is_said_of_numbers():
    assert number_difference({"a": math.nan, "b": 1.0}, {"a": math.nan, "b": 1.0}) == "equal"
    assert number_difference({"a": 1.0, "b": 1.0}, {"a": 1.5, "b": math.nan}) == "2 of 2 differ, most b: nan"


def test_a_phase_that_one_run_lacks_is_a_difference():
    first = Finished({"a": {"w": WEIGHT}}, {"a": [(1, 0.5)]}, {"m": 1.0})
    found = {part: difference for _, part, _, difference in rows("run", first, Finished({}, {}, {"m": 1.0}))}
    assert found == {"a": "gone: w", "a, curve": "gone: step 1", "metrics": "equal"}
