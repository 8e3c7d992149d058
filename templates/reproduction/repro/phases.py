"""Training phases (SKILL sections 5 and 6): each owns its model, optimiser and data, and can be killed and resumed.

What a step draws is a pure function of (seed, phase, step). So model, optimiser and step number are the whole
state of a phase, and a resumed run ends in the same bits as an uninterrupted one on the same machine.
"""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repro import checkpoint
from repro.config import Pace, digest
from repro.errors import BadInput, RunFailed
from repro.progress import progress
from repro.randomness import generator, seed_global_generators


class Phase(ABC):
    """One training phase. A method subclasses it; the trainer below runs it.

    `name` is its key under `phases` in the configuration, `iterations` its number of optimiser steps.
    """

    name: str
    iterations: int

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A freshly initialised network, on the CPU."""

    @abstractmethod
    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The phase's own optimiser."""

    @abstractmethod
    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The scalar loss of one minibatch, every draw of it from `generator` (a CPU generator)."""

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, nn.Module]) -> None:
        """Builds what the phase trains on, before its first step.

        `earlier` holds the networks of the phases before this one, by name: on the device, in eval mode, frozen.
        Files in `scratch` survive a kill and are deleted when the phase ends.
        """

    def release(self) -> None:
        """Drops what `prepare` built, so that the next phase starts with the memory free."""


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
    device: torch.device,
    pace: Pace,
    earlier: Mapping[str, nn.Module],
) -> PhaseResult:
    """Runs `phase` to its end, from the newest state in `folder` if there is one.

    `identity` is what must not change between start and resume (the resolved configuration); a state of another
    identity is refused with BadInput. Raises RunFailed when the loss stops being finite.
    """
    finished = folder / "model.safetensors"
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # A function of its own, so that model, optimiser and graph are gone before the result is loaded.
        _train(phase, folder, finished, identity, seed, device, pace, earlier)
        phase.release()
    # Here and not after training: a kill between the last save and these lines must not leave a pool behind.
    (folder / "running.safetensors").unlink(missing_ok=True)
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _load_finished(phase, finished, identity, device)


def _train(
    phase: Phase,
    folder: Path,
    finished: Path,
    identity: dict[str, Any],
    seed: int,
    device: torch.device,
    pace: Pace,
    earlier: Mapping[str, nn.Module],
) -> None:
    running = folder / "running.safetensors"
    _start_peak_memory(device)
    seed_global_generators(seed, phase.name, "initialise")
    model = phase.make_model().to(device)
    optimiser = phase.make_optimiser(model)
    start, spent_s = 0, 0.0
    if running.exists():
        state = _matching(checkpoint.load(running), running, identity)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start, spent_s = state["steps_done"], state["wall_s"]
        del state
    log = _Log(folder / "log.jsonl", start)

    began = time.perf_counter()
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    phase.prepare(seed, scratch, earlier)
    prepare_s = time.perf_counter() - began

    def progress_so_far(steps_done: int) -> dict[str, Any]:
        wall_s = spent_s + time.perf_counter() - began
        return {"identity": digest(identity), "steps_done": steps_done, "model": model.state_dict(), "wall_s": wall_s}

    model.train()
    for step in progress(range(start, phase.iterations), phase.name, total=phase.iterations, initial=start):
        # Global generators too: dropout inside a network draws from them.
        seed_global_generators(seed, phase.name, "step", step)
        loss = phase.loss(model, generator(seed, phase.name, "draws", step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        steps_done = step + 1
        if steps_done % pace.log_every == 0 or steps_done == phase.iterations:
            log.write(steps_done, _finite(loss, phase, steps_done))
        if steps_done % pace.checkpoint_every == 0 and steps_done < phase.iterations:
            _finite(loss, phase, steps_done)
            checkpoint.save(running, {**progress_so_far(steps_done), "optimiser": optimiser.state_dict()})

    cost = {"prepare_s": prepare_s, "peak_device_bytes": _peak_memory(device)}
    checkpoint.save(finished, {**progress_so_far(phase.iterations), **cost, "curve": log.curve})


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


def _finite(loss: Tensor, phase: Phase, steps_done: int) -> float:
    value = float(loss.detach())
    if value != value or abs(value) == float("inf"):
        raise RunFailed(f"phase {phase.name}, step {steps_done}: the loss is {value}; the last saved state is kept")
    return value


class _Log:
    """One JSON line per logged step. What a killed run wrote beyond its last saved state is dropped on resume."""

    def __init__(self, path: Path, start: int):
        self._path = path
        self.curve: list[tuple[int, float]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the line that the kill cut short
                    continue
                if entry["step"] <= start:
                    self.curve.append((entry["step"], entry["loss"]))
        self._path.write_text("".join(self._line(*point) for point in self.curve))

    def write(self, step: int, loss: float) -> None:
        self.curve.append((step, loss))
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
