"""Minibatches that workers draw ahead: the same bits for any number of them, and nothing lost when one ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import end, start
from methods.test_methods import differences
from torch import nn
from toy_method import Line

from repro import checkpoint
from repro import run as running
from repro.__main__ import main
from repro.errors import BadInput
from repro.loop import Loop
from repro.phases import Phase
from repro.runtime import Runtime, deterministic

ENDED = "repro: ended by SIGTERM; go on with the same command and --resume\n"
METHODS = ["wgan_gp", "ppo", "bank", "language_model"]
"""With epochs, rounds, rounds of unequal size, and no data."""


def new_loop(phase: Phase[Any], workers: int, device: str = "cpu") -> Loop:
    return Loop(phase, seed=0, runtime=Runtime(torch.device(device), workers=workers), earlier={})


def to(loop: Loop, steps: int) -> dict[str, Any]:
    loop.prepare(Path())
    while loop.step < steps:
        loop.collect_if_due()
        loop.one_step(loop.next_batch())
        loop.write_curves(loop.numbers())
    loop.close()
    return loop.snapshot()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_any_number_of_workers_gives_the_same_bits(name: str, workers: int) -> None:
    make = import_module(f"methods.{name}").make_phase
    assert differences(to(new_loop(make(), 0), 26), to(new_loop(make(), workers), 26)) == []


@pytest.mark.parametrize("name", METHODS)
def test_resumed_with_workers_a_method_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    """In the middle of a round, and with minibatches drawn that nobody took."""
    make = import_module(f"methods.{name}").make_phase
    checkpoint.save(tmp_path / "state.safetensors", to(new_loop(make(), 2), 11))
    resumed = new_loop(make(), 2)
    resumed.restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert differences(to(new_loop(make(), 0), 26), to(resumed, 26)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_workers_of_a_gpu_give_the_same_bits_in_pinned_memory() -> None:
    make = import_module("methods.wgan_gp").make_phase
    with deterministic(torch.device("cuda")):
        own, others = to(new_loop(make(), 0, "cuda"), 26), to(new_loop(make(), 2, "cuda"), 26)
    assert differences(own, others) == []


class Everything(Line):
    """Draws from all generators, and says on how many threads and in which process it was drawn."""

    def __init__(self) -> None:
        self.name, self.iterations = "line", 8

    def prepare(self, seed: int, scratch: Path, earlier: Any) -> None:
        pass

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def minibatch(self, step: int, draw: Any) -> dict[str, Any]:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), generator=draw))]
        where = [torch.get_num_threads(), os.getpid()]
        x = torch.tensor([[*drawn, *where]], dtype=torch.float64)
        return {"x": x[:, :1].float(), "y": x[:, :1].float(), "drawn": x[:, :4], "where": x[:, 4:]}


def drawn_by(workers: int) -> list[dict[str, Any]]:
    loop = new_loop(Everything(), workers)
    batches = []
    while loop.step < 8:
        batches.append(loop.next_batch())
        loop.one_step(batches[-1])
    loop.close()
    return batches


def test_workers_draw_what_the_process_itself_draws_from_every_generator() -> None:
    """NumPy's too, of which a worker is a copy like all others: two steps never draw alike."""
    own, others = drawn_by(0), drawn_by(2)
    assert [batch["drawn"].tolist() for batch in own] == [batch["drawn"].tolist() for batch in others]
    assert len({tuple(batch["drawn"][0].tolist()) for batch in own}) == 8
    assert len({float(batch["where"][0, 1]) for batch in others}) == 2
    assert {float(batch["where"][0, 1]) for batch in own} == {os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_minibatch_is_drawn_on_one_thread(workers: int) -> None:
    """Sums over many numbers have other bits on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert {float(batch["where"][0, 0]) for batch in drawn_by(workers)} == {1.0}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_a_minibatch_refuses_is_refused_in_its_words() -> None:
    class Refusing(Everything):
        def minibatch(self, step: int, draw: Any) -> Any:
            raise BadInput("data/x.pt: found no file, expected one")

    with pytest.raises(BadInput, match=r"^data/x.pt: found no file, expected one$"):
        drawn_with(Refusing())


def drawn_with(phase: Phase[Any]) -> Any:
    loop = new_loop(phase, 1)
    try:
        return loop.next_batch()
    finally:
        loop.close()


# Whole runs.


def train(arguments: list[str], act: Callable[[int], None] | None = None) -> int:
    """The toy in a process group of its own, in which `act` is called before the minibatch of each step is taken."""
    os.setpgid(0, 0)
    running.imported_versions = dict
    take = Loop.next_batch

    def next_batch(self: Loop) -> Any:
        if act is not None and self.phase.name == "line":
            act(self.step)
        return take(self)

    Loop.next_batch = next_batch  # type: ignore[method-assign]
    return main(arguments)


def asking_all(step: int) -> None:
    if step == 3:
        os.killpg(0, signal.SIGTERM)


def killing_itself(step: int) -> None:
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)


def killing_a_worker(step: int) -> None:
    if step == 7:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)


@pytest.fixture
def toy(project: Path) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """Exit code, output and the states of a run."""

    def run(act: Callable[[int], None] | None, runs: str, *options: str) -> tuple[int, str, dict[str, Any]]:
        arguments, log = ["run", "toy", "--device", "cpu", "--runs", runs, *options], project / f"{runs}.log"
        log.unlink(missing_ok=True)
        code = end(start(train, arguments, act, output=log, daemon=False))
        folders = sorted((project / runs).glob("toy/seed-0/*/model.safetensors"))
        kept = {path.parent.name: checkpoint.load(path) for path in folders}
        return code, log.read_text(), {name: (one["networks"], one["curves"]) for name, one in kept.items()}

    return run


def test_sigterm_to_the_whole_group_saves_and_exits_as_without_workers(project: Path, toy: Any) -> None:
    assert toy(asking_all, "runs", "--workers", "2")[:2] == (143, ENDED)
    assert checkpoint.load(project / "runs/toy/seed-0/1-line/running.safetensors")["steps_done"] == 4
    code, _, resumed = toy(None, "runs", "--workers", "2", "--resume")
    assert code == 0 and resumed.keys() == {"1-line", "2-constant"}
    assert differences(toy(None, "whole")[2], resumed) == []


def test_a_killed_run_goes_on_at_once_to_the_same_bits(toy: Any) -> None:
    """Its workers live for some seconds more. The lock of the run is not theirs."""
    assert toy(killing_itself, "runs", "--workers", "2")[0] == -signal.SIGKILL
    code, log, resumed = toy(None, "runs", "--workers", "2", "--resume")
    assert code == 0, log
    assert differences(toy(None, "whole")[2], resumed) == []


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_nothing_is_lost(toy: Any) -> None:
    code, log, _ = toy(killing_a_worker, "runs", "--workers", "2")
    assert code == 1 and len(log.splitlines()) == 1, log
    assert log.startswith("repro: phase line: a worker that draws minibatches ended (DataLoader worker (pid")
    assert log.endswith("the last saved state is kept, go on with the same command and --resume\n")
    code, log, resumed = toy(None, "runs", "--workers", "2", "--resume")
    assert code == 0, log
    assert differences(toy(None, "whole")[2], resumed) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_the_record_says_how_many_workers_there_were(project: Path, toy: Any, workers: int) -> None:
    assert toy(None, "runs", "--workers", str(workers))[0] == 0
    record = json.loads((project / "runs/toy/seed-0/record.json").read_text())
    assert record.get("workers", 0) == workers and "micro_batches" not in record and "parts" not in record
