"""The engine changes nothing of a method's own loop: held against plain loops, and against kills at every step."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from torch import Tensor

from methods.plain.given import tensors
from methods.ppo import PPO, Agent
from repro import checkpoint
from repro.checkpoint import saved
from repro.config import Pace
from repro.loop import Loop, PhaseResult, run_phase
from repro.phases import Batch, Networks, Phase
from repro.runtime import Runtime
from repro.update import Update

CPU = Runtime(torch.device("cpu"))
LONGEST_FILE = 120
STEPS_AGAINST_PLAIN = 30
KILLS = {"wgan_gp": 13, "ppo": 26, "maml": 4, "sam": 13, "lbfgs": 5, "em": 5, "bank": 18, "language_model": 5}
"""Steps within which each is killed at every place: two rounds or epochs, where it has any, and their border."""
LEARNING = {
    "wgan_gp": (250, "critic", lambda first, last: abs(last) < 0.6 * abs(first)),
    "ppo": (180, "steps for each fall", lambda first, last: last > 3 * first),
    "maml": (200, "loss", lambda first, last: last < 0.8 * first),
    "sam": (300, "loss uphill", lambda first, last: last < 0.3 * first),
    "lbfgs": (40, "loss", lambda first, last: last < 0.1 * first),
    "em": (20, "log-likelihood", lambda first, last: last > first + 0.2),
    "bank": (120, "pseudo-labels", lambda first, last: last > 200 + first),
    "language_model": (150, "loss", lambda first, last: last < 0.8 * first),
}
"""After so many steps the mean over the last tenth of a curve against that over the first tenth."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_loop(name: str) -> Loop:
    """Without `prepare`, as one that is to be restored."""
    phase = import_module(f"methods.{name}").make_phase()
    return Loop(phase, seed=0, runtime=CPU, earlier={})


def begun(name: str, scratch: Path) -> Loop:
    loop = new_loop(name)
    loop.prepare(scratch)
    return loop


def step(loop: Loop) -> None:
    loop.collect_if_due()
    loop.one_step(loop.next_batch())
    loop.write_curves(loop.numbers())


def run_to_the_end(phase: Phase[Any], folder: Path) -> PhaseResult:
    pace = Pace(log_every=1, checkpoint_every=5)
    return run_phase(phase, folder=folder, identity={}, seed=0, runtime=CPU, pace=pace, earlier={})


def plain(name: str, steps: int) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, float]]]]:
    result: tuple[dict[str, Tensor], dict[str, list[tuple[int, float]]]]
    result = import_module(f"methods.plain.{name}").plain(0, steps)
    return result


def all_tensors(state: Any) -> dict[str, Tensor]:
    """Of the networks, the environment and the bare tensors of a state."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    elsewhere = torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler
    return tensors(**{name: part for name, part in parts.items() if not isinstance(part, elsewhere)})


def differences(one: Any, other: Any, name: str = "snapshot") -> list[str]:
    """The names of what is not the same to the bit."""
    if type(one) is not type(other):
        return [name]
    if isinstance(one, Tensor):
        return [name] if (one.dtype, one.shape, bits(one)) != (other.dtype, other.shape, bits(other)) else []
    if isinstance(one, dict):
        if list(one) != list(other):
            return [name]
        return [found for key in one for found in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [name]
        return [
            found
            for index, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{name}.{index}")
        ]
    return [] if one == other else [name]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("name", KILLS)
def test_a_method_ends_in_the_bits_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    loop = begun(name, tmp_path)
    for _ in range(STEPS_AGAINST_PLAIN):
        step(loop)
    expected, curves = plain(name, STEPS_AGAINST_PLAIN)
    assert differences(dict(sorted(all_tensors(loop.state).items())), dict(sorted(expected.items())), "state") == []
    assert loop.curves == curves


@pytest.mark.parametrize("name", KILLS)
def test_a_plain_loop_learns(name: str) -> None:
    """Otherwise both could have the same fault."""
    steps, curve, learns = LEARNING[name]
    values = [value for _, value in plain(name, steps)[1][curve]]
    tenth = max(1, len(values) // 10)
    assert learns(sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth)


@pytest.mark.parametrize("name", KILLS)
def test_killed_at_any_step_a_method_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    steps, whole, watched = KILLS[name], begun(name, tmp_path), begun(name, tmp_path)
    for _ in range(steps):
        step(whole)
    for _ in range(steps):
        checkpoint.save(tmp_path / f"{watched.step}.safetensors", watched.snapshot())
        watched.collect_if_due()
        checkpoint.save(tmp_path / f"{watched.step}-collected.safetensors", watched.snapshot())
        step(watched)
    assert differences(whole.snapshot(), watched.snapshot()) == []  # to save changes nothing

    for kept in tmp_path.glob("*.safetensors"):
        resumed = new_loop(name)
        resumed.restore(checkpoint.load(kept))
        resumed.prepare(tmp_path)
        while resumed.step < steps:
            step(resumed)
        assert differences(whole.snapshot(), resumed.snapshot()) == [], kept.stem


@pytest.mark.parametrize("name", KILLS)
def test_a_method_hands_on_the_networks_that_its_loop_ends_with(name: str, tmp_path: Path) -> None:
    """Of a run of three steps. A schedule that depends on the number of steps is made for three in both."""
    phase_class = type(import_module(f"methods.{name}").make_phase())
    short = type(phase_class.__name__, (phase_class,), {"steps": 3})
    loop = Loop(short(), seed=0, runtime=CPU, earlier={})
    loop.prepare(tmp_path)
    for _ in range(3):
        step(loop)
    result = run_to_the_end(short(), tmp_path)
    expected = Networks(dict(loop.phase.networks(loop.state)))
    assert differences(dict(result.networks.state_dict()), dict(expected.state_dict())) == []
    assert result.curves == loop.curves


@pytest.mark.parametrize("name", KILLS)
def test_a_method_is_short(name: str) -> None:
    assert len(Path(__file__).with_name(f"{name}.py").read_text().splitlines()) < LONGEST_FILE


class Mortal(PPO):
    """Dies by SIGKILL at a place of a step. Its last step keeps the whole state."""

    steps = 30

    def __init__(self, place: str, killed_at: int, end: Path):
        self.place, self.killed_at, self.end = place, killed_at, end

    def collect(self, state: Agent, update: Update) -> Batch:
        rows = super().collect(state, update)
        self.die("collected", update.step_number)
        return rows

    def train_step(self, state: Agent, batch: Batch, update: Update) -> None:
        self.die("drawn", update.step_number)
        super().train_step(state, batch, update)
        self.die("stepped", update.step_number)
        if update.step_number + 1 == self.steps:
            checkpoint.save(self.end, saved(state))

    def die(self, place: str, step: int) -> None:
        if (place, step) == (self.place, self.killed_at):
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, place: str = "", killed_at: int = -1) -> int:
    run_to_the_end(Mortal(place, killed_at, folder / "end.safetensors"), folder)
    return 0


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never-killed")
    assert run(train, folder, output=folder / "output") == 0
    return folder


@pytest.mark.parametrize("place, killed_at", [("collected", 12), ("drawn", 17), ("stepped", 23)])
def test_a_process_that_was_killed_goes_on_to_the_same_bits(
    place: str, killed_at: int, never_killed: Path, tmp_path: Path
) -> None:
    assert run(train, tmp_path, place, killed_at, output=tmp_path / "output") == -signal.SIGKILL
    assert not (tmp_path / "end.safetensors").exists()
    assert run(train, tmp_path, output=tmp_path / "output") == 0
    ends, results = (
        [checkpoint.load(folder / name) for folder in (never_killed, tmp_path)]
        for name in ("end.safetensors", "model.safetensors")
    )
    assert differences(ends[0], ends[1]) == []
    one, other = ({key: result[key] for key in ("networks", "curves")} for result in results)
    assert differences(one, other) == []
