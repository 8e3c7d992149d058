"""Training phases (SKILL sections 5 and 6): each owns its model, optimiser and data, and can be killed and resumed.

What a step draws is a pure function of (seed, phase, step). So model, optimiser and step number are the whole
state of a phase, and a resumed run ends in the same bits as an uninterrupted one on the same machine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repro import checkpoint
from repro.config import Pace, digest
from repro.errors import BadInput, RunFailed, Terminated
from repro.progress import progress
from repro.randomness import generator, seed_global_generators
from repro.runtime import Runtime
from repro.step import PLAIN, StepOptions, Stepper, arithmetic
from repro.termination import deferred_termination


@dataclass(frozen=True)
class Work:
    """What is done on the device beside the optimiser steps: calling `run` does it once, a run does it `times` times.

    `run` makes all its tensors itself, on the CPU, with any values: it is called on fake tensors too, where no value can be read.
    """

    name: str
    run: Callable[[], object]
    times: int


class Phase(ABC):
    """One training phase. A method subclasses it; the trainer below runs it.

    `name` is its key under `phases` in the configuration, `iterations` its number of optimiser steps, `options` how a step is done.
    """

    name: str
    iterations: int
    options: StepOptions = PLAIN

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A freshly initialised network, on the CPU."""

    @abstractmethod
    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The phase's own optimiser."""

    @abstractmethod
    def minibatch(self, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The named tensors of one minibatch, on the CPU, every draw from `generator` (a CPU generator).

        Each has one row per example. Several processes draw the same minibatch and take a share of its rows.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a minibatch, or of a share of it, that lies on the device."""

    def check(self, folder: Path) -> list[str]:
        """What the phase needs of the machine and of `folder`, where it will lie. Called for all phases before any work.

        Returns what is worth saying, a line each. Raises BadInput for what the machine does not have.
        """
        return []

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, nn.Module]) -> None:
        """Builds what the phase trains on, before its first step. Every process of a run calls it.

        `earlier` holds the networks of the phases before this one, by name: on the device, in eval mode, frozen.
        Files in `scratch` survive a kill and are deleted when the phase ends.
        """

    def release(self) -> None:
        """Drops what `prepare` built, so that the next phase starts with the memory free."""

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        """Brings the phase as far as `loss` needs it and returns a minibatch of the right shapes, with any values.

        `repro memory` calls it on fake tensors, where no value can be read. A phase that needs data, or builds for more
        than a second, overrides `prepare`'s part of this; `repro preflight` holds the shapes against a real minibatch.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self.prepare(0, Path(scratch), earlier)
            return self.minibatch(0, generator(0, self.name, "rehearsal"))

    def work(self) -> Sequence[Work]:
        """What the phase does on the device outside its steps, such as building a pool."""
        return []

    def storage(self) -> Mapping[str, int]:
        """Bytes that the phase keeps on the host, in memory or on the disk, by name."""
        return {}


@dataclass(frozen=True)
class PhaseResult:
    """A finished phase: its network in eval mode, its loss curve as (step, loss), its cost."""

    model: nn.Module
    curve: list[tuple[int, float]]
    wall_s: float
    prepare_s: float
    peak_device_bytes: int


def run_phase(
    phase: Phase,
    *,
    folder: Path,
    identity: dict[str, Any],
    seed: int,
    runtime: Runtime,
    pace: Pace,
    earlier: Mapping[str, nn.Module],
) -> PhaseResult:
    """Runs `phase` to its end, from the newest state in `folder` if there is one.

    `identity` is what must not change between start and resume (the resolved configuration); a state of another
    identity is refused with BadInput. Raises RunFailed when the loss stops being finite, Terminated after the state
    was saved because of a SIGTERM.
    """
    finished = folder / "model.safetensors"
    if not finished.exists():
        # A function of its own, so that model, optimiser and graph are gone before the result is loaded.
        _train(phase, folder, finished, identity, seed, runtime, pace, earlier)
        phase.release()
    runtime.world.barrier()
    # Here and not after training: a kill between the last save and these lines must not leave a pool behind.
    if runtime.world.first:
        for state in folder.glob("running.safetensors*"):
            state.unlink()
        shutil.rmtree(folder / "scratch", ignore_errors=True)
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return _load_finished(phase, finished, identity, runtime.device)


def _train(
    phase: Phase,
    folder: Path,
    finished: Path,
    identity: dict[str, Any],
    seed: int,
    runtime: Runtime,
    pace: Pace,
    earlier: Mapping[str, nn.Module],
) -> None:
    device, world = runtime.device, runtime.world
    running, scratch = folder / "running.safetensors", folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    _start_peak_memory(device)
    seed_global_generators(seed, phase.name, "initialise")
    model = phase.make_model().to(device)
    stepper = Stepper(model, phase.make_optimiser(model), phase.options, device)
    start, spent_s, curve = 0, 0.0, []
    if running.exists():
        state = _matching(checkpoint.load(running), running, identity)
        model.load_state_dict(state["model"])
        stepper.load_state_dict(state)
        start, spent_s, curve = state["steps_done"], state["wall_s"], state["curve"]
        del state
    log = _Log(folder / "log.jsonl", curve, writes=world.first)

    began = time.perf_counter()
    phase.prepare(seed, scratch, earlier)
    prepare_s = time.perf_counter() - began

    def save(path: Path, network: nn.Module, steps_done: int, rest: dict[str, Any]) -> None:
        wall_s = spent_s + time.perf_counter() - began
        progress_so_far = {"identity": digest(identity), "steps_done": steps_done, "wall_s": wall_s, "curve": log.curve}
        if world.first:
            checkpoint.save(path, {**progress_so_far, "model": network.state_dict(), **rest})

    model.train()
    shared = world.wrap(model, device)
    steps = range(start, phase.iterations)
    with arithmetic(phase.options.precision), deferred_termination() as stop:
        for step in progress(steps, phase.name, total=phase.iterations, initial=start, shown=world.first):
            # Global generators too: dropout inside a network draws from them.
            seed_global_generators(seed, phase.name, "step", step, *world.rank_part)
            minibatch = phase.minibatch(step, generator(seed, phase.name, "draws", step))
            batch = {name: column.to(device) for name, column in world.share_of(minibatch, phase.name).items()}
            with stepper.autocast():
                loss = phase.loss(shared, batch)
            stepper.step(loss, step)
            steps_done = step + 1
            ends = steps_done == phase.iterations
            stops = world.any(stop.made) and not ends
            saves = not ends and (stops or steps_done % pace.checkpoint_every == 0)
            logs = ends or steps_done % pace.log_every == 0
            if logs or saves:
                value = _finite(world.mean(float(loss.detach())), phase, steps_done)
            if logs:
                log.write(steps_done, value)
            if saves:
                save(running, model, steps_done, stepper.state_dict())
            if stops:
                raise Terminated

        cost = {"prepare_s": prepare_s, "peak_device_bytes": _peak_memory(device)}
        save(finished, stepper.result, phase.iterations, cost)
        if world.any(stop.made):
            raise Terminated


def _load_finished(phase: Phase, path: Path, identity: dict, device: torch.device) -> PhaseResult:
    state = _matching(checkpoint.load(path), path, identity)
    model = phase.make_model()
    model.load_state_dict(state["model"])
    curve = [tuple(point) for point in state["curve"]]
    return PhaseResult(
        model.to(device).eval().requires_grad_(False),
        curve,
        state["wall_s"],
        state["prepare_s"],
        state["peak_device_bytes"],
    )


def _matching(state: dict, path: Path, identity: dict) -> dict:
    if state["identity"] != digest(identity):
        raise BadInput(
            f"{path}: found a state of configuration {state['identity']}, expected {digest(identity)}; "
            "resume with the configuration the run began with, or start another run folder"
        )
    return state


def _finite(value: float, phase: Phase, steps_done: int) -> float:
    if value != value or abs(value) == float("inf"):
        raise RunFailed(f"phase {phase.name}, step {steps_done}: the loss is {value}; the last saved state is kept")
    return value


class _Log:
    """The loss curve, and a copy of it to watch: one JSON line per logged step.

    A resumed phase takes the curve from its state and writes the copy anew: a kill may have cut the copy short anywhere.
    """

    def __init__(self, path: Path, curve: list[tuple[int, float]], writes: bool):
        self._path, self._writes, self.curve = path, writes, curve
        if writes:
            path.write_text("".join(self._line(*point) for point in curve))

    def write(self, step: int, loss: float) -> None:
        self.curve.append((step, loss))
        if self._writes:
            with self._path.open("a") as file:
                file.write(self._line(step, loss))

    @staticmethod
    def _line(step: int, loss: float) -> str:
        return json.dumps({"step": step, "loss": loss}) + "\n"


def _start_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
