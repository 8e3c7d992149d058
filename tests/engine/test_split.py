"""The split test: what gives another gradient in parts is refused, what gives the same is not, and what cannot be decided is said."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_ranks
from methods.test_methods import differences
from torch import Tensor, nn
from torch.nn import functional as F

from repro.errors import RunFailed
from repro.loop import Loop
from repro.phases import Batch, Draw, Networks, Phase
from repro.runtime import Runtime, World, world_of_this_process
from repro.split import split_test
from repro.update import Update

ROWS, WIDTH, CLASSES = 16, 8, 5
METHODS = ["wgan_gp", "ppo", "maml", "sam", "lbfgs", "em", "bank", "language_model"]


@dataclass
class One:
    network: nn.Module
    optimiser: torch.optim.Optimizer
    numbers: dict[str, Tensor] = field(default_factory=dict)


class Classifier(Phase[One]):
    """A network of one kind on rows of one kind."""

    name, steps = "classifier", 4

    def __init__(self, *layers: nn.Module, zero: bool = False):
        self.layers, self.zero = layers, zero

    def setup(self, earlier: Mapping[str, Networks]) -> One:
        for layer in self.layers:
            for module in layer.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        last = nn.Linear(WIDTH, CLASSES)
        if self.zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        network = nn.Sequential(nn.Linear(WIDTH, WIDTH), *self.layers, last)
        return One(network, torch.optim.Adam(network.parameters()))

    def minibatch(self, step: int, draw: Draw) -> Batch:
        x = torch.randn(ROWS, WIDTH, generator=draw)
        length = torch.randint(1, WIDTH, (ROWS, 1), generator=draw)
        return {
            "x": x,
            "label": torch.randint(CLASSES, (ROWS,), generator=draw),
            "real": torch.arange(WIDTH) < length,
            "other": torch.randn(ROWS, WIDTH, generator=draw),
        }

    def train_step(self, state: One, batch: Batch, update: Update) -> None:
        for part in update.parts(batch):
            update.backward(self.loss(state, part, batch, update), weight=self.weight(part, batch))
        update.log("loss", update.step(state.optimiser))

    def weight(self, part: Batch, batch: Batch) -> Any:
        return None

    def loss(self, state: One, part: Batch, batch: Batch, update: Update) -> Tensor:
        return F.cross_entropy(state.network(part["x"]), part["label"])

    def networks(self, state: One) -> Mapping[str, nn.Module]:
        return {"network": state.network}


class Contrastive(Classifier):
    """Each row against all others of its part."""

    def loss(self, state, part, batch, update):
        one, other = self.views(state, part, update)
        return F.cross_entropy(one @ other.T, torch.arange(len(one), device=one.device))

    def views(self, state, part, update):
        return state.network(part["x"]), state.network(part["other"])


class GatheredContrastive(Contrastive):
    def views(self, state, part, update):
        return tuple(update.gather(view) for view in super().views(state, part, update))


class OwnRowsAgainstAll(Contrastive):
    """The rows of a process against those of all: a mean over its own rows."""

    def loss(self, state, part, batch, update):
        one, other = self.views(state, part, update)
        world = update._runtime.world
        first = sum(len(range(rank, len(batch["x"]), world.size)) for rank in range(world.rank))
        return F.cross_entropy(one @ update.gather(other).T, first + torch.arange(len(one), device=one.device))


class Padded(Classifier):
    """A mean over the real places of all rows of a part, each part as heavy as its rows."""

    def loss(self, state, part, batch, update):
        square = (state.network(part["x"]) - part["other"][:, :CLASSES]).square()
        return square[part["real"][:, :CLASSES]].mean()


class WeightedPadded(Padded):
    def weight(self, part, batch):
        return part["real"][:, :CLASSES].sum() / batch["real"][:, :CLASSES].sum()


class SumOverAConstant(Classifier):
    """Divides by the rows of the whole, although its part is weighed by its rows already."""

    def loss(self, state, part, batch, update):
        return F.cross_entropy(state.network(part["x"]), part["label"], reduction="sum") / len(batch["x"])


class Resting(Classifier):
    """Leaves layers out at random, as stochastic depth does."""

    def loss(self, state, part, batch, update):
        x = part["x"]
        for layer in state.network[:-1]:
            if torch.rand(()) < 0.5:
                x = x + layer(x)
        return F.cross_entropy(state.network[-1](x), part["label"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).reshape(len(x), 3, 2, WIDTH // 2, 1).unbind(1)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.3).flatten(1)


class Noisy(Classifier):
    """Noise on its inputs, drawn in the step."""

    def loss(self, state, part, batch, update):
        noise = torch.randn(part["x"].shape, generator=update.generator("noise")).to(update.device)
        return F.cross_entropy(state.network(part["x"] + noise), part["label"])


class FixedNoise(Classifier):
    """As many numbers as the whole minibatch has rows, of which each part takes the first."""

    def loss(self, state, part, batch, update):
        noise = torch.randn(ROWS, WIDTH)[: len(part["x"])]
        return F.cross_entropy(state.network(part["x"] + noise), part["label"])


class Shuffled(Classifier):
    """Mixes each row with another of its part."""

    def loss(self, state, part, batch, update):
        x = part["x"] + part["x"][torch.randperm(len(part["x"]))]
        return F.cross_entropy(state.network(x), part["label"])


class ByNumPy(Classifier):
    def loss(self, state, part, batch, update):
        return F.cross_entropy(state.network(part["x"]) * np.random.rand(), part["label"])


class ByPython(Classifier):
    def loss(self, state, part, batch, update):
        return F.cross_entropy(state.network(part["x"]) * random.random(), part["label"])


class Flat(Classifier):
    """No weight moves the loss."""

    def loss(self, state, part, batch, update):
        return 0 * F.cross_entropy(state.network(part["x"]), part["label"])


class Whole(Classifier):
    """Reads only minibatches of all rows."""

    def loss(self, state, part, batch, update):
        return F.cross_entropy(state.network(part["x"]).view(ROWS, CLASSES), part["label"])


class Counting(Classifier):
    """Two losses on all weights, statistics that are added up, a number of the parts."""

    def train_step(self, state, batch, update):
        count = torch.zeros(CLASSES, device=update.device)
        for part in update.parts(batch):
            guess = state.network(part["x"])
            update.log("hits", (guess.argmax(1) == part["label"]).float().mean())
            update.backward(F.cross_entropy(guess, part["label"]), retain_graph=True)
            update.backward(guess.square().mean())
            count += F.one_hot(part["label"], CLASSES).sum(0)
        update.backward(sum(weight.square().sum() for weight in state.network.parameters()))
        state.numbers["count"] = update.all_reduce(count)
        update.log("loss", update.step(state.optimiser, clip=0.1))


class MinibatchDeviation(Classifier):
    """StyleGAN's: how far the rows lie apart is an input of the last layer."""

    def loss(self, state, part, batch, update):
        x = state.network[0](part["x"])
        return F.cross_entropy(state.network[-1](x + x.std(0, correction=0).mean()), part["label"])


class Hardest(Classifier):
    """The mean over the quarter of the rows with the largest loss."""

    def loss(self, state, part, batch, update):
        losses = F.cross_entropy(state.network(part["x"]), part["label"], reduction="none")
        return losses.topk(-(-len(losses) // 4)).values.mean()


class DividedByPositives(Classifier):
    """As focal losses are: by the number of rows that hold something."""

    def loss(self, state, part, batch, update):
        losses = F.cross_entropy(state.network(part["x"]), part["label"], reduction="none")
        return losses.sum() / (part["label"] < 2).sum().clamp(min=1)


class Later(Classifier):
    """A term that couples rows comes in with the steps, as a warm-up has it."""

    def loss(self, state, part, batch, update):
        z = state.network(part["x"])
        return F.cross_entropy(z, part["label"]) + update.step_number * F.cross_entropy(z @ z.T, torch.arange(len(z)))


class RarelyWithout(Classifier):
    """One row of all has no label, and the mean is over those that have one."""

    def minibatch(self, step, draw):
        batch = super().minibatch(step, draw)
        return {**batch, "label": batch["label"].where(torch.arange(ROWS) != ROWS - 2, -100)}


class AveragedInTheLoop(Classifier):
    """Each part moves a running average of the loss."""

    def setup(self, earlier):
        made = super().setup(earlier)
        made.numbers["average"] = torch.ones(3)
        return made

    def loss(self, state, part, batch, update):
        state.numbers["average"] = state.numbers["average"] * 0.9
        return super().loss(state, part, batch, update)


class SteppingByHand(Classifier):
    """Its optimiser steps in each part, and the engine knows nothing of it."""

    def train_step(self, state, batch, update):
        for part in update.parts(batch):
            update.backward(self.loss(state, part, batch, update))
            state.optimiser.step()
            state.optimiser.zero_grad()


class Undivided(Classifier):
    """Takes the whole minibatch in each part."""

    def train_step(self, state, batch, update):
        update.backward(F.cross_entropy(state.network(batch["x"]), batch["label"]))
        update.log("loss", update.step(state.optimiser))


class TimesFirst(nn.Module):
    """Attention over places that come before rows, whose weights are dropped for all heads of all rows in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        places = x.unflatten(1, (WIDTH // 2, 2)).transpose(0, 1)
        attended, _ = self.attention(places, places, places)
        return F.dropout(attended, 0.2).transpose(0, 1).flatten(1)


class StatisticsOfParts(Classifier):
    parts_define = "the statistics of batch norm, as in section 3"


def normed(**named: Any) -> Classifier:
    return Classifier(nn.BatchNorm1d(WIDTH), nn.ReLU(), **named)


UNSOUND = {
    "batch norm": (normed, "its batch norm takes the statistics of a part"),
    "batch norm before a layer of zeros": (lambda: normed(zero=True), "its batch norm takes the statistics of a part"),
    "contrastive": (Contrastive, "the loss couples rows, is a mean over another count than rows"),
    "contrastive before a layer of zeros": (lambda: Contrastive(zero=True), "the loss couples rows"),
    "padding": (Padded, "the loss couples rows, is a mean over another count than rows"),
    "padding before a layer of zeros": (
        lambda: Padded(nn.Tanh(), zero=True),
        "the loss couples rows, is a mean over",
    ),
    "minibatch deviation": (MinibatchDeviation, "the loss couples rows"),
    "the hardest rows": (Hardest, "the loss couples rows"),
    "divided by positives": (DividedByPositives, "is a mean over another count than rows"),
    "a later term": (Later, "the loss couples rows"),
    "a rare row without a label": (RarelyWithout, "is a mean over another count than rows"),
    "stepping by hand": (SteppingByHand, "the step leaves network.state_dict.0.weight off by"),
    "divided twice": (SumOverAConstant, "the loss couples rows, is a mean over another count than rows"),
}
SOUND = {
    "linear": Classifier,
    "a layer of zeros": lambda: Classifier(zero=True),
    "layer norm": lambda: Classifier(nn.LayerNorm(WIDTH)),
    "group norm": lambda: Classifier(nn.GroupNorm(2, WIDTH)),
    "dropout": lambda: Classifier(nn.ReLU(), nn.Dropout(0.4)),
    "attention with dropout": lambda: Classifier(Attention()),
    "attention by heads with places first": lambda: Classifier(TimesFirst()),
    "layers that rest": lambda: Resting(nn.Linear(WIDTH, WIDTH)),
    "padding by its weight": WeightedPadded,
    "padding by its weight before a layer of zeros": lambda: WeightedPadded(nn.Tanh(), zero=True),
    "noise": Noisy,
    "several losses": Counting,
    "batch norm at rest": lambda: Classifier(nn.BatchNorm1d(WIDTH, momentum=0.0).eval()),
}
OF_PROCESSES = {
    "gathered": GatheredContrastive,
    "own rows against all": OwnRowsAgainstAll,
    "averaged in the loop": AveragedInTheLoop,
    "spectral norm": lambda: Classifier(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
}
UNCLEAR = {
    "fixed noise": (FixedNoise, "the step draws (16, 8), not by rows"),
    "shuffled": (Shuffled, "the step draws by aten::randperm"),
    "by NumPy": (ByNumPy, "the step draws from NumPy or Python"),
    "by Python": (ByPython, "the step draws from NumPy or Python"),
    "flat": (Flat, "its gradient is zero"),
    "whole minibatches": (Whole, "on 8 rows alone the step raises RuntimeError"),
}


ALONE = World()


def verdict(
    phase: Phase[Any], world: World = ALONE, micro_batches: int = 1, device: str = "cpu"
) -> tuple[str, str, bool]:
    """Of a phase that is about to begin."""
    runtime = Runtime(torch.device(device), world=world, micro_batches={"*": micro_batches})
    loop = Loop(phase, seed=0, runtime=runtime, earlier={})
    loop.prepare(Path())
    loop.collect_if_due()
    found = split_test(phase, {step: loop.draw(0) for step in (0, 1)}, 0, runtime, {})
    assert (found.processes, found.micro_batches) == (world.size, micro_batches)
    return found.outcome, found.why, found.draws


def all_verdicts(folder: Path) -> int:
    made = {name: make for name, (make, _) in {**UNSOUND, **UNCLEAR}.items()} | SOUND | OF_PROCESSES
    made |= {name: import_module(f"methods.{name}").make_phase for name in METHODS}
    with world_of_this_process() as world:
        found = {name: verdict(make(), world) for name, make in made.items()}
        (folder / f"{world.rank}.json").write_text(json.dumps(found))
    return 0


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("two")
    assert run_ranks([all_verdicts] * 2, folder, output=folder / "log") == [0, 0], (folder / "log").read_text()
    one, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert {name: found[0] for name, found in one.items()} == {name: found[0] for name, found in other.items()}
    return one


@pytest.fixture(params=[(2, 1), (1, 4), (1, 8)], ids=["2 processes", "4 micro-batches", "8 micro-batches"])
def found_for(request: pytest.FixtureRequest, in_two_processes: dict[str, list[Any]]) -> Any:
    processes, micro_batches = request.param
    if processes == 2:
        return lambda name, make: in_two_processes[name]
    return lambda name, make: verdict(make(), micro_batches=micro_batches)


@pytest.mark.parametrize("name", UNSOUND)
def test_a_step_whose_parts_give_another_gradient_is_refused(name: str, found_for: Any) -> None:
    make, why = UNSOUND[name]
    outcome, told, _ = found_for(name, make)
    assert outcome == "refused" and why in told, told


@pytest.mark.parametrize("name", SOUND)
def test_a_step_whose_parts_give_the_same_gradient_is_not_refused(name: str, found_for: Any) -> None:
    assert found_for(name, SOUND[name])[:2] in (("same", ""), ["same", ""])


@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_refused(name: str, found_for: Any) -> None:
    assert found_for(name, import_module(f"methods.{name}").make_phase)[0] == "same"


@pytest.mark.parametrize("name", OF_PROCESSES)
def test_a_loss_that_gathers_its_rows_is_not_refused_in_processes(name: str, in_two_processes: Any) -> None:
    assert in_two_processes[name][:2] == ["same", ""]


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_decided_is_not_measured(name: str) -> None:
    make, why = UNCLEAR[name]
    outcome, told, _ = verdict(make(), micro_batches=4)
    assert outcome == "not measured" and why in told, told


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_decided_is_not_refused_in_processes(name: str, in_two_processes: Any) -> None:
    assert in_two_processes[name][0] in ("not measured", "same")


@pytest.mark.parametrize(
    ("make", "draws"), [(SOUND["dropout"], True), (Noisy, True), (ByNumPy, True), (Classifier, False)]
)
def test_it_says_whether_the_step_draws(make: Any, draws: bool) -> None:
    assert verdict(make(), micro_batches=4)[2] == draws


def test_a_step_by_which_nothing_is_divided_is_said_to_be_one() -> None:
    assert verdict(Undivided(), micro_batches=4)[:2] == (
        "same",
        "each part does the whole minibatch: nothing is divided",
    )


def test_a_state_that_each_micro_batch_moves_is_refused(in_two_processes: Any) -> None:
    """Processes move it once each, as one does."""
    assert in_two_processes["averaged in the loop"][:2] == ["same", ""]
    outcome, why, _ = verdict(AveragedInTheLoop(), micro_batches=4)
    assert outcome == "refused" and why.startswith("the step leaves numbers.average off by 27.1%")


def test_what_each_pass_changes_is_refused_in_micro_batches(in_two_processes: Any) -> None:
    """A power iteration in each: one process alone would do fewer. Processes do one each, as one does."""
    assert in_two_processes["spectral norm"][:2] == ["same", ""]
    outcome, why, _ = verdict(OF_PROCESSES["spectral norm"](), micro_batches=4)
    assert outcome == "refused" and why.endswith("its spectral norm takes an iteration in each part")


@pytest.mark.parametrize(("weight", "total"), [(1.0, "4"), (0.25, "0.25"), (torch.tensor(0.25), "0.25")])
def test_weights_that_do_not_sum_to_one_are_refused(weight: Any, total: str) -> None:
    """Those for four micro-batches sum to one in four, and are right where all have equally many rows: by luck."""

    class Given(Classifier):
        def weight(self, part, batch):
            return weight

    with pytest.raises(RunFailed, match=f"found weights that sum to {total} over all parts, expected 1: each part's"):
        verdict(Given(), micro_batches=4)


def test_rows_of_other_micro_batches_cannot_be_gathered() -> None:
    with pytest.raises(RunFailed, match=r"step 1: update.gather: found 4 micro-batches, expected one"):
        verdict(GatheredContrastive(), micro_batches=4)


def test_a_step_that_only_parts_cannot_do_ends_in_one_line() -> None:
    with pytest.raises(
        RunFailed, match=r"found ValueError \(Expected more than 1 value per channel.* with 16 parts of 16"
    ):
        verdict(normed(), micro_batches=ROWS)


def test_what_the_paper_means_per_part_is_not_tried() -> None:
    found = verdict(StatisticsOfParts(nn.BatchNorm1d(WIDTH)), micro_batches=4)
    assert found == ("per part", "the paper means the statistics of batch norm, as in section 3", False)


def test_numbers_that_parts_give_otherwise_are_named() -> None:
    class Largest(Classifier):
        def loss(self, state, part, batch, update):
            update.log("largest", part["x"].max())
            return super().loss(state, part, batch, update)

    outcome, why, _ = verdict(Largest(), micro_batches=4)
    assert outcome == "same" and why.startswith("what is logged as largest is not that of the whole minibatch: log it")


class Hoarding(Classifier):
    """Keeps its network where no state holds it."""

    def setup(self, earlier):
        made = super().setup(earlier)
        self.network = made.network
        return made


def test_nothing_of_the_run_is_touched(tmp_path: Path) -> None:
    """Neither state nor phase, nor what is drawn later."""
    phase = Hoarding(nn.Dropout(0.5))
    runtime = Runtime(torch.device("cpu"), micro_batches={"*": 4})
    loop = Loop(phase, seed=0, runtime=runtime, earlier={})
    before, network = copy.deepcopy(loop.snapshot()), phase.network
    assert split_test(phase, {step: loop.draw(0) for step in (0, 1)}, 0, runtime, {}).outcome == "same"
    assert differences(before, loop.snapshot()) == [] and phase.network is network
    assert all(weight.grad is None for weight in network.parameters())


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", [*SOUND, *UNSOUND])
def test_a_gpu_gives_the_same_verdicts(name: str) -> None:
    """Its attention and its dropout draw by operations of their own."""
    make, expected = (SOUND[name], "same") if name in SOUND else (UNSOUND[name][0], "refused")
    assert verdict(make(), micro_batches=4, device="cuda")[0] == expected
