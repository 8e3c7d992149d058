"""What a state may hold, what is refused before the first step, and what comes back from a checkpoint."""

import collections
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR, StepLR
from torch.optim.swa_utils import AveragedModel

from repro import checkpoint
from repro import checkpoint as state
from repro.errors import BadInput, RunFailed
from repro.phases import Replayed


@dataclass
class One:
    value: Any


@dataclass
class Two:
    network: nn.Module
    optimiser: torch.optim.Optimizer
    other: Any = None


def two(other: Any = None) -> Two:
    network = nn.Linear(2, 2)
    return Two(network, torch.optim.Adam(network.parameters(), lr=0.1), other)


def through_a_file(tmp_path, before: Any) -> dict:
    checkpoint.save(tmp_path / "state.safetensors", state.saved(before))
    return checkpoint.load(tmp_path / "state.safetensors")


def step(one: Two) -> None:
    one.network(torch.ones(1, 2)).sum().backward()
    one.optimiser.step()
    one.optimiser.zero_grad()


def test_what_an_optimiser_made_at_its_beginning_follows_its_weights():
    """Adagrad makes its sums when it is made, on the CPU: before the networks are moved to the device."""
    meta = torch.device("meta")
    network = nn.Linear(2, 2, device=meta)
    one = Two(network, torch.optim.Adagrad(network.parameters()))
    for own in one.optimiser.state.values():
        own["sum"] = torch.zeros(own["sum"].shape)
    state.move(one, meta)
    assert {own["sum"].device for own in one.optimiser.state.values()} == {meta}
    assert {own["step"].device for own in one.optimiser.state.values()} == {torch.device("cpu")}


class Memory:
    """A replay memory with a writer position."""

    def __init__(self) -> None:
        self.rows, self.position = torch.zeros(4), 0

    def state_dict(self) -> dict:
        return {"rows": self.rows, "position": self.position}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows, self.position = state_dict["rows"], state_dict["position"]


@dataclass
class Nested:
    part: One


VALUES = {
    "number": (3, 0),
    "text": ("warm", ""),
    "nothing": (None, None),
    "tensor": (torch.arange(3.0), torch.zeros(3)),
    "tensor that grew": (torch.arange(5.0), torch.zeros(0)),
    "list of numbers that grew": ([1.0, 2.0], []),
    "dict": ({"a": 1, "b": torch.ones(2)}, {"a": 0, "b": torch.zeros(2)}),
    "tuple of tensors": ((torch.ones(2), 2), (torch.zeros(2), 0)),
    "dataclass in it": (One(torch.ones(1)), One(torch.zeros(1))),
}


@pytest.mark.parametrize("name", VALUES)
def test_plain_data_comes_back(name, tmp_path):
    before, new = (One(value) for value in VALUES[name])
    saved = through_a_file(tmp_path, before)
    state.restore(new, saved)
    assert checkpoint._pack(state.saved(new), "", {}) == checkpoint._pack(state.saved(before), "", {})
    tensors = [dict[str, torch.Tensor](), dict[str, torch.Tensor]()]
    for one, found in zip((before, new), tensors, strict=True):
        checkpoint._pack(state.saved(one), "", found)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_a_generator_goes_on_where_it_was(tmp_path):
    before, new = One(torch.Generator().manual_seed(1)), One(torch.Generator())
    torch.rand(3, generator=before.value)
    state.restore(new, through_a_file(tmp_path, before))
    assert torch.equal(torch.rand(3, generator=new.value), torch.rand(3, generator=before.value))


def test_a_replay_memory_comes_back_with_its_position(tmp_path):
    before, new = One(Memory()), One(Memory())
    before.value.rows, before.value.position = torch.arange(4.0), 3
    state.restore(new, through_a_file(tmp_path, before))
    assert new.value.position == 3
    assert torch.equal(new.value.rows, torch.arange(4.0))


SCHEDULERS = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=10),
    "steps": lambda o: StepLR(o, step_size=2, gamma=0.5),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.1),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=10),
    "one after the other": lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 8)], milestones=[3]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_torch_goes_on_with_its_rates(name, tmp_path):
    def made() -> Two:
        torch.manual_seed(0)
        one = two()
        one.other = SCHEDULERS[name](one.optimiser)
        state.check(one, "p")
        return one

    whole, half, resumed = made(), made(), made()
    for _ in range(3):
        step(half), half.other.step()
    state.restore(resumed, through_a_file(tmp_path, half))
    for one, steps in ((whole, 7), (resumed, 4)):
        for _ in range(steps):
            step(one), one.other.step()
    assert whole.optimiser.param_groups[0]["lr"] == resumed.optimiser.param_groups[0]["lr"]
    assert torch.equal(whole.network.weight, resumed.network.weight)


def test_modes_and_frozen_weights_come_back(tmp_path):
    before, new = (One(nn.Sequential(nn.Linear(1, 1), nn.Dropout())) for _ in range(2))
    before.value[1].eval()
    before.value[0].bias.requires_grad_(False)
    state.restore(new, through_a_file(tmp_path, before))
    assert [module.training for module in new.value.modules()] == [True, True, False]
    assert [p.requires_grad for p in new.value.parameters()] == [True, False]


def test_a_trainable_tensor_stays_the_one_that_its_optimiser_holds(tmp_path):
    def made(value: float) -> Two:
        temperature = nn.Parameter(torch.tensor(value))
        return Two(nn.Linear(1, 1), torch.optim.SGD([temperature], lr=0.1), temperature)

    before, new = made(2.0), made(0.0)
    state.check(new, "p")
    state.restore(new, through_a_file(tmp_path, before))
    new.other.sum().backward()
    new.optimiser.step()
    assert float(new.other.detach()) == pytest.approx(1.9)


def test_lazy_layers_come_back(tmp_path):
    before, new = two(nn.LazyLinear(3)), two(nn.LazyLinear(3))
    before.other(torch.ones(1, 5))
    state.check(new, "p")
    state.restore(new, through_a_file(tmp_path, before))
    assert torch.equal(new.other.weight, before.other.weight)


class Cartpole:
    pass


@dataclass(frozen=True)
class Frozen:
    value: int = 0


REFUSED = {
    "an environment without state": (
        lambda: two(Cartpole()),
        "state.other: found Cartpole, expected what has state_dict",
    ),
    "a function": (lambda: two(len), "state.other: found builtin_function_or_method"),
    "one in a list": (lambda: two([1, Cartpole()]), "state.other.1: found Cartpole"),
    "a frozen dataclass": (Frozen, "setup: found Frozen, expected a dataclass that is not frozen"),
    "a dict": (dict, "setup: found dict, expected a dataclass"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_by_name(name):
    make, words = REFUSED[name]
    with pytest.raises(BadInput, match="^phase p: ") as caught:
        state.check(make(), "p")
    assert words in str(caught.value)


def test_weights_of_no_network_in_the_state_are_refused():
    outside = nn.Linear(2, 3)
    with pytest.raises(BadInput, match=r"state.other: found a weight of shape \(3, 2\) of no network in the state"):
        state.check(two(torch.optim.SGD(outside.parameters(), lr=0.1)), "p")


def test_one_weight_in_two_optimisers_is_refused_unless_both_are_named():
    one = two()
    one.other = torch.optim.SGD(one.network.parameters(), lr=0.1)
    with pytest.raises(BadInput, match="state.other: found a weight that state.optimiser holds as well"):
        state.check(one, "p")
    state.check(one, "p", shared=("optimiser", "other"))


def test_a_scheduler_outside_the_state_is_refused():
    one = two()
    scheduler = StepLR(one.optimiser, 1)
    with pytest.raises(BadInput, match="state.optimiser: found a scheduler of its rates outside the state"):
        state.check(one, "p")
    one.other = {"of the rates": scheduler}
    state.check(one, "p")


def test_an_average_and_tied_weights_are_sound():
    one = two()
    one.network = nn.ModuleList([one.network, one.network])
    one.other = AveragedModel(one.network)
    state.check(one, "p")


def test_weights_that_are_not_finite_are_named_and_a_mask_is_not():
    one = two(nn.Linear(1, 1))
    one.network.register_buffer("mask", torch.tensor([-float("inf")]))
    state.require_finite(one, "p", 3)
    with torch.no_grad():
        one.other.bias.fill_(float("nan"))
    with pytest.raises(RunFailed, match="phase p, step 3: the weights of other.bias are not finite"):
        state.require_finite(one, "p", 3)


@dataclass
class Another:
    network: nn.Module
    second: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))


def test_a_state_of_other_parts_is_named(tmp_path):
    saved = through_a_file(tmp_path, two())
    with pytest.raises(ValueError, match=r"state: found \['network', 'optimiser', 'other'\], expected the parts"):
        state.restore(Another(nn.Linear(2, 2)), saved)


def test_networks_in_a_list_cannot_become_more(tmp_path):
    saved = through_a_file(tmp_path, One([nn.Linear(1, 1)]))
    with pytest.raises(ValueError, match="state.value: found the parts"):
        state.restore(One([nn.Linear(1, 1), nn.Linear(1, 1)]), saved)


class Wheel:
    """An environment without state: an angle that is moved by actions, with noise of its own."""

    def reset(self, seed: int) -> float:
        self._generator = torch.Generator().manual_seed(seed)
        self.angle = float(torch.rand((), generator=self._generator))
        return self.angle

    def step(self, action: float) -> float:
        self.angle += float(action) + float(torch.rand((), generator=self._generator))
        return self.angle


def test_an_environment_without_state_resumes_by_its_actions(tmp_path):
    def made() -> One:
        return One(Replayed(Wheel, seed=3))

    before, new = made(), made()
    for _ in range(2):
        before.value.reset()
        for action in (1, 0.5, torch.tensor(2.0)):
            before.value.step(action)
    state.check(before, "p")
    state.restore(new, through_a_file(tmp_path, before))
    assert new.value.environment.angle == before.value.environment.angle
    assert new.value.step(1) == before.value.step(1)
    assert new.value.reset() == before.value.reset()


def test_a_counter_of_a_scheduler_is_plain_data():
    packed = checkpoint._pack({"milestones": collections.Counter([2, 4])}, "state", {})
    assert packed == {"dict": [["milestones", {"dict": [[2, {"value": 1}], [4, {"value": 1}]]}]]}


def test_what_is_loaded_is_aligned(tmp_path):
    """Sums of numbers that are not aligned to 64 bytes round differently, and optimisers keep the tensors they are given."""
    loaded = through_a_file(tmp_path, One({f"{n}": torch.ones(n) for n in range(1, 20)}))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded["value"].values())
