"""`repro preflight` compares the whole state of a phase: what no state_dict shows is found in whichever leaf it reaches, and named.

In most cases the networks and the curves of the two ways are equal: only another leaf tells.
"""

import struct
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from repro.loop import Loop
from repro.phases import Phase, SingleLossPhase
from repro.runtime import Runtime
from repro_tools.preflight.checks import Findings
from repro_tools.preflight.trial import STEPS, Trial, try_phases
from repro_tools.preflight.whole import first_difference, leaves, whole


def tried(make_phase, folder):
    """Failed rows of a phase, by their check."""
    findings = Findings("hidden")
    try_phases(
        Trial(
            phases=lambda: [make_phase()], wider=None, batch_sizes={}, ignored_iterations={}, seed=0,
            runtime=Runtime(torch.device("cpu"), Path("data")), folder=folder,
        ),
        findings,
    )  # fmt: skip
    return {row.check: row.text for row in findings.rows if row.status == "fail"}


class Memory:
    """Rows that are written one after another, and an unwritten one is not a number. `complete`: its state_dict has the position."""

    def __init__(self, complete: bool):
        self.rows, self.position, self.complete = torch.full((8, 2), float("nan")), 0, complete

    def add(self, row):
        self.rows[self.position] = row
        self.position += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows} | ({"position": self.position} if self.complete else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.position = state_dict["rows"].clone(), state_dict.get("position", 0)


class Environment:
    """A ball that falls. `complete`: its state_dict has the speed."""

    def __init__(self, complete: bool):
        self.height, self.speed, self.complete = 0.0, 0.0, complete

    def step(self):
        self.height, self.speed = self.height - self.speed, self.speed + 1

    def state_dict(self) -> dict[str, Any]:
        return {"height": self.height} | ({"speed": self.speed} if self.complete else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.height, self.speed = state_dict["height"], state_dict.get("speed", 0.0)


class Halving(torch.optim.lr_scheduler.LambdaLR):
    """Torch's, whose state_dict is empty where it is not `complete`."""

    def __init__(self, optimiser, complete: bool):
        self.complete = complete
        super().__init__(optimiser, lambda step: 0.5**step)

    def state_dict(self):
        return super().state_dict() if self.complete else {}

    def load_state_dict(self, state_dict):
        if state_dict:
            super().load_state_dict(state_dict)


@dataclass
class State:
    network: nn.Module
    optimiser: torch.optim.Optimizer
    average: AveragedModel
    memory: Memory
    environment: Environment
    scheduler: Halving | None = None
    calls: int = 0
    stage: str = "cold"
    table: torch.Tensor = field(default_factory=lambda: torch.full((4,), -torch.inf))
    noise: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    chance: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))
    nested: dict[str, Any] = field(default_factory=lambda: {"rates": [(1.0, None)]})


class Masked(nn.Linear):
    """With a mask of infinities in a buffer, and a counter that is no buffer."""

    def __init__(self):
        super().__init__(2, 1)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.calls = 0


class Learner(Phase[State]):
    """A loop of its own. `use` does something with the number of the step, which the phase counts itself: in the state where that is
    `complete`, else in an attribute."""

    name, steps = "learner", STEPS
    complete = True

    def __init__(self):
        self.calls = 0

    def setup(self, earlier):
        network = Masked()
        return State(
            network,
            torch.optim.Adam(network.parameters(), lr=0.1),
            AveragedModel(network),
            Memory(True),
            Environment(True),
        )

    def minibatch(self, step, draw):
        return {"x": torch.randn(4, 2, generator=draw)}

    def train_step(self, state, batch, update):
        for part in update.parts(batch):
            with update.autocast():
                loss = state.network(part["x"]).square().mean()
            update.backward(loss)
        update.log("loss", update.step(state.optimiser))
        self.use(state, self.count(state), update)

    def count(self, state):
        holder = state if self.complete else self
        holder.calls += 1
        return holder.calls

    def use(self, state, count, update):
        state.memory.add(torch.ones(2))
        state.environment.step()

    def networks(self, state):
        return {"network": state.network}


# --- a counter of the phase that is in no state, and each kind of leaf that it can reach


def rate(state, count, update):
    state.optimiser.param_groups[0]["lr"] = 0.1 / count


def moments(state, count, update):
    if count == STEPS:
        for one in state.optimiser.state.values():
            one["exp_avg"].zero_()


def average(state, count, update):
    with torch.no_grad():
        state.average.module.weight.lerp_(state.network.weight, 1 / count)


def number_in_a_list(state, count, update):
    state.nested["rates"].append((1 / count, None))


def text(state, count, update):
    state.stage = "warm" if count < STEPS else "hot"


def tensor(state, count, update):
    state.table[count] = 1.0


def generator(state, count, update):
    torch.rand(count, generator=state.chance)


def mode(state, count, update):
    state.network.train(count < STEPS)


def frozen(state, count, update):
    state.network.bias.requires_grad_(count < STEPS)


def row_of_the_memory(state, count, update):
    state.memory.add(torch.full((2,), float(count)))


def environment(state, count, update):
    state.environment.speed = float(count)


def logged(state, count, update):
    update.log("count", count)


REACHED = {
    rate: "state.optimiser.param_groups.0.lr: found 0.1 at the end, expected 0.05",
    moments: "state.optimiser.state.0.exp_avg: found other bits at the end; other leaves differ in state.optimiser",
    average: "state.average.module.weight: found other bits at the end",
    number_in_a_list: "state.nested.rates.2.0: found 1.0 at the end, expected 0.5",
    text: "state.stage: found 'warm' at the end, expected 'hot'",
    tensor: "state.table: found other bits at the end",
    generator: "state.chance: found other bits at the end",
    mode: "state.network.resting.0: found nothing at the end, expected ''",
    frozen: "state.network.frozen.0: found nothing at the end, expected 'bias'",
    row_of_the_memory: "state.memory.rows: found other bits at the end",
    environment: "state.environment.speed: found 1.0 at the end, expected 2.0",
    logged: "logged.count.1: found 1.0 at the end, expected 2.0; other leaves differ in curves.count",
}


@pytest.mark.parametrize("use", REACHED, ids=[use.__name__ for use in REACHED])
def test_a_counter_outside_the_state_is_found_in_the_leaf_that_it_reaches(tmp_path, use):
    methods = {"use": staticmethod(use)}
    planted = type("Planted", (Learner,), methods | {"complete": False})
    assert tried(planted, tmp_path / "planted") == {"resume": REACHED[use]}
    assert tried(type("Innocent", (Learner,), methods), tmp_path / "innocent") == {}


class Rounds(Learner):
    """A round at each step; what it makes is no part of the loss."""

    collect_every = 1

    def collect(self, state, update):
        return {"seen": torch.full((4, 1), float(self.count(state)))}

    def use(self, state, count, update):
        pass


class HiddenRounds(Rounds):
    complete = False


def test_a_counter_is_found_in_the_data_of_a_round(tmp_path):
    assert tried(HiddenRounds, tmp_path / "planted") == {"resume": "round.rows.seen: found other bits at the end"}
    assert tried(Rounds, tmp_path / "innocent") == {}


class FromSeed(Learner):
    """One round for both steps, a function of the seed."""

    collect_every = STEPS
    collects_from_seed = True

    def collect(self, state, update):
        return {"seen": torch.randn(4, 1, generator=update.generator("seen"))}


class FromTheState(FromSeed):
    """Says so, and reads a weight, which has moved when the round is made again."""

    def collect(self, state, update):
        (weight, *_) = state.network.parameters()
        return {"seen": super().collect(state, update)["seen"] + weight.detach().square().sum()}


def test_a_round_that_is_no_function_of_the_seed_is_found(tmp_path):
    assert tried(FromTheState, tmp_path / "planted") == {"resume": "round.rows.seen: found other bits at the end"}
    assert tried(FromSeed, tmp_path / "innocent") == {}


class Scaled(Learner):
    """Sets the scale of the loss in fp16 itself."""

    precision = "fp16"

    def use(self, state, count, update):
        update.scaler.load_state_dict(update.scaler.state_dict() | {"scale": 2.0**count})


class HiddenScaled(Scaled):
    complete = False


def test_a_counter_is_found_in_the_scale_of_fp16(tmp_path):
    assert tried(HiddenScaled, tmp_path / "planted") == {"resume": "scaler.scale: found 2.0 at the end, expected 4.0"}
    assert tried(Scaled, tmp_path / "innocent") == {}


class CountsCalls(Learner):
    """The network counts its calls, in an attribute or in a buffer."""

    def setup(self, earlier):
        state = super().setup(earlier)
        if self.complete:
            del state.network.calls
            state.network.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        return state

    def count(self, state):
        state.network.calls += 1
        return int(state.network.calls)

    def use(self, state, count, update):
        state.nested["exploration"] = 1 / count


class HidesCalls(CountsCalls):
    complete = False


def test_an_attribute_of_a_network_that_is_no_buffer_is_found(tmp_path):
    words = "state.nested.exploration: found 1.0 at the end, expected 0.5"
    assert tried(HidesCalls, tmp_path / "planted") == {"resume": words}
    assert tried(CountsCalls, tmp_path / "innocent") == {}


# --- a state_dict that leaves something out, and one that does not


class HiddenPosition(Learner):
    def setup(self, earlier):
        state = super().setup(earlier)
        state.memory.complete = False
        return state


def test_a_memory_that_forgets_where_it_writes_is_found_in_its_rows(tmp_path):
    assert tried(HiddenPosition, tmp_path / "planted") == {"resume": "state.memory.rows: found other bits at the end"}
    assert tried(Learner, tmp_path / "innocent") == {}


class HiddenSpeed(Learner):
    def setup(self, earlier):
        state = super().setup(earlier)
        state.environment.complete = False
        return state


def test_an_environment_that_forgets_a_part_of_itself_is_found(tmp_path):
    words = "state.environment.height: found 0.0 at the end, expected -1.0"
    assert tried(HiddenSpeed, tmp_path) == {"resume": words}


class Scheduled(Learner):
    def setup(self, earlier):
        state = super().setup(earlier)
        state.scheduler = Halving(state.optimiser, self.complete)
        return state

    def use(self, state, count, update):
        state.scheduler.step()


class HiddenScheduled(Scheduled):
    complete = False


def test_a_scheduler_that_begins_again_is_found_in_the_rate(tmp_path):
    words = "state.optimiser.param_groups.0.lr: found 0.05 at the end, expected 0.025"
    assert tried(HiddenScheduled, tmp_path / "planted")["resume"].startswith(words)
    assert tried(Scheduled, tmp_path / "innocent") == {}


class Draws(Learner):
    """Noise of a generator, in the state or in an attribute."""

    def __init__(self):
        super().__init__()
        self.chance = torch.Generator().manual_seed(1)

    def use(self, state, count, update):
        state.noise.copy_(torch.rand(3, generator=(state if self.complete else self).chance))


class HiddenDraws(Draws):
    complete = False


def test_a_generator_outside_the_state_is_found_in_what_it_drew(tmp_path):
    assert tried(HiddenDraws, tmp_path / "planted") == {"resume": "state.noise: found other bits at the end"}
    assert tried(Draws, tmp_path / "innocent") == {}


class Wrapper(torch.optim.Optimizer):
    """Leaves its step to an Adam, whose moments are in the state_dict where it is `complete`."""

    def __init__(self, parameters, complete):
        super().__init__(parameters, {"lr": 0.1})
        self.base, self.complete = torch.optim.Adam(self.param_groups, lr=0.1), complete

    def step(self, closure=None):
        self.base.step()

    def state_dict(self):
        return super().state_dict() | ({"base": self.base.state_dict()} if self.complete else {})

    def load_state_dict(self, state_dict):
        base = state_dict.get("base")
        super().load_state_dict({key: part for key, part in state_dict.items() if key != "base"})
        self.base.param_groups = self.param_groups
        if base:
            self.base.load_state_dict(base)


class Wrapped(SingleLossPhase):
    """One loss, with the wrapper for its optimiser."""

    name, iterations, complete = "wrapped", STEPS, True

    def make_model(self):
        return nn.Linear(2, 1)

    def make_optimiser(self, model):
        return Wrapper(model.parameters(), self.complete)

    def minibatch(self, step, generator):
        return {"x": torch.randn(4, 2, generator=generator)}

    def rehearse(self, earlier):
        return {"x": torch.zeros(4, 2)}

    def loss(self, model, batch):
        return (model(batch["x"]) - 3).square().mean()


class HiddenWrapped(Wrapped):
    complete = False


def test_the_moments_of_an_optimiser_within_another_are_missed(tmp_path):
    found = tried(HiddenWrapped, tmp_path / "planted")
    assert set(found) == {"resume"} and found["resume"].startswith("state.model.weight: found other bits at the end")
    assert tried(Wrapped, tmp_path / "innocent") == {}


class SetsRate(Wrapped):
    """Sets the rate of the step to come in the loss: of one loss too, the state has other leaves than the network's."""

    def __init__(self):
        self.calls = 0

    def make_optimiser(self, model):
        self.optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        self.optimiser.register_step_post_hook(self.after_step)
        return self.optimiser

    def after_step(self, optimiser, *_):
        (group,) = optimiser.param_groups
        self.calls += 1
        group["lr"] = group["lr"] / 2 if self.complete else 0.1 / 2**self.calls


class HidesRate(SetsRate):
    complete = False


def test_of_one_loss_too_the_rate_is_compared(tmp_path):
    words = "state.optimiser.param_groups.0.lr: found 0.05 at the end, expected 0.025"
    assert tried(HidesRate, tmp_path / "planted") == {"resume": words}
    assert tried(SetsRate, tmp_path / "innocent") == {}


class HandsOnAnother(Learner):
    """What comes out is an average that the state does not have."""

    def setup(self, earlier):
        self.out = Masked()
        return super().setup(earlier)

    def use(self, state, count, update):
        with torch.no_grad():
            self.out.weight.lerp_(state.network.weight, 0.5)

    def networks(self, state):
        return {"network": self.out}


def test_a_network_that_is_handed_on_from_outside_the_state_is_found(tmp_path):
    assert tried(HandsOnAnother, tmp_path) == {"resume": "networks.network.weight: found other bits at the end"}


class BrokenBuffer(Learner):
    def use(self, state, count, update):
        state.network.mask.fill_(float("nan"))


def test_a_buffer_may_hold_infinities_and_not_what_is_no_number(tmp_path):
    words = "found values that are not finite in network.mask after 2 steps"
    assert tried(BrokenBuffer, tmp_path / "planted") == {"training": words}
    assert tried(Learner, tmp_path / "innocent") == {}


# --- where it is not the resume that is wrong


class DropsWhatItLoads(Memory):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict | {"position": 0})


class LoadsHalf(Learner):
    def setup(self, earlier):
        state = super().setup(earlier)
        state.memory = DropsWhatItLoads(True)
        return state


def test_what_load_state_dict_leaves_out_is_named_where_it_was_put_back(tmp_path):
    words = "state.memory.position: found 0 when it was put back, expected 1"
    assert tried(LoadsHalf, tmp_path) == {"resume": words}


class Flushes(Memory):
    def state_dict(self):
        found = super().state_dict()
        self.position = 0
        return found


class ShiftedBySaving(Learner):
    def setup(self, earlier):
        state = super().setup(earlier)
        state.memory = Flushes(True)
        return state


def test_a_state_dict_that_changes_what_it_shows_is_no_fault_of_the_boundary(tmp_path):
    words = "state.memory.rows: found other bits at the end after a save; other leaves differ in state.memory"
    assert tried(ShiftedBySaving, tmp_path) == {"checkpoint": words}


COUNTED = []
"""Python's memory: it outlives a phase, and no process."""


class CountsInPython(Learner):
    def use(self, state, count, update):
        COUNTED.append(count)
        state.nested["counted"] = len(COUNTED)


def test_a_counter_in_pythons_memory_fails_where_a_phase_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("test_hidden_state.COUNTED", [])
    assert tried(CountsInPython, tmp_path) == {
        "boundary": "state.nested.counted: found 4 at the end, expected 2",
    }


# --- what two leaves are


def of_bits(bits):
    """A float32 of these bits."""
    return torch.frombuffer(bytearray(struct.pack("<I", bits)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (of_bits(0x7FC00000), of_bits(0x7FC00001), "a: found other bits now"),
        (torch.zeros(1), -torch.zeros(1), "a: found other bits now"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "a: found float64 (2,) now, expected float32 (2,)"),
        (torch.zeros(2), torch.zeros(1, 2), "a: found float32 (1, 2) now, expected float32 (2,)"),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), "a: found other bits now"),
        (torch.zeros(()), 0.0, "a: found 0.0 now, expected float32 ()"),
        (1, True, "a: found True now, expected 1"),
        (0.0, -0.0, "a: found -0.0 now, expected 0.0"),
        ([1, 2], [1], "a.1: found nothing now, expected 2"),
        ({}, {"b": "x"}, "a.b: found 'x' now, expected nothing"),
        ({0: 1}, {"0": 1}, "a.0: found nothing now, expected 1; other leaves differ in a.0"),
        ("x" * 99, "y", f"a: found 'y' now, expected '{'x' * 56}..."),
    ],
)
def test_what_is_another_leaf(was, now, words):
    assert first_difference(leaves({"a": was}), leaves({"a": now}), "now") == words


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (of_bits(0x7FC00001), of_bits(0x7FC00001)),
        (float("nan"), float("nan")),
        (torch.full((2,), -torch.inf), torch.full((2,), -torch.inf)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous()),
        (nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        ([(1, None)], ((1, None),)),
        (OrderedDict(b=1, c=2), {"c": 2, "b": 1}),
    ],
)
def test_what_is_the_same_leaf(was, now):
    assert first_difference(leaves({"a": was}), leaves({"a": now}), "now") is None


def test_no_time_is_a_leaf():
    loop = Loop(Learner(), seed=0, runtime=Runtime(torch.device("cpu")), earlier={})
    loop.one_step(loop.next_batch())
    parts = {place[0] for place in whole(loop)}
    assert parts == {"steps_done", "state", "logged", "round", "networks"}


def test_no_copy_of_a_tensor_is_kept():
    tensor = torch.zeros(2)
    before = leaves({"a": tensor})
    tensor += 1
    assert first_difference(before, leaves({"a": tensor}), "now") == "a: found other bits now"
