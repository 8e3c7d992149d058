"""Training phases (SKILL sections 5 and 6): each owns its model, optimiser and data, and can be killed and resumed.

What a step draws is a pure function of (seed, phase, step). So model, optimiser and step number are the whole
state of a phase, and a resumed run ends in the same bits as an uninterrupted one on the same machine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repro import checkpoint
from repro.config import Pace, differences
from repro.distributed import World
from repro.errors import BadInput, RunFailed, Terminated
from repro.progress import progress
from repro.randomness import generator, seed_global_generators
from repro.runtime import Runtime
from repro.step import PLAIN, StepOptions, Stepper, arithmetic
from repro.termination import deferred_termination

RUNNING = "running.safetensors"
"""The last saved state of a phase that is not finished, in the phase's folder."""

LEAST_SCALE = 2.0**-24
"""Of a loss in fp16. A gradient that overflows with less is above 10^12, or it is not finite in any precision."""


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
    minibatch_defines: str = ""
    """What a minibatch of another size would change besides the noise of the gradient, e.g. "which pairs are matched"."""
    draws_as: str = ""
    """The name of a phase whose draws this one has as well: an equal network begins with the same weights, and an equal `minibatch` gives the
    same minibatches. Methods are then compared in pairs. Empty for draws of its own."""

    @property
    def stream(self) -> str:
        """What the phase's draws are a function of, besides the seed and the step."""
        return self.draws_as or self.name

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A freshly initialised network, on the CPU."""

    @abstractmethod
    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The phase's own optimiser."""

    def learning_rate_factor(self, step: int) -> float:
        """Of the optimiser's learning rates in this step, counted from 0, on top of a warm-up (see `repro.schedule`).

        A function of the step alone, so that a resumed phase has the same rates.
        """
        return 1.0

    @abstractmethod
    def minibatch(self, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The named tensors of one minibatch, on the CPU, every draw from `generator` (a CPU generator).

        Each has one row per example. Several processes draw the same minibatch and take a share of its rows; a library that draws
        from the global generators all the same gets the same numbers in each of them.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a minibatch, or of a share of it, that lies on the device."""

    def check(self, folder: Path) -> list[str]:
        """What the phase needs of the machine and of `folder`, where it will lie. Called for all phases before any work.

        Returns what is worth saying, a line each. Raises BadInput for what the machine does not have.
        """
        return []

    def watch(self, model: nn.Module) -> Mapping[str, float]:
        """Numbers beside the loss at every logged step, such as an error on validation images. They decide nothing.

        `model` is what the phase would hand on if it ended here, in eval mode, without gradients. The record keeps them under `watched`. What
        this costs is in no estimate.
        """
        return {}

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
        than a second, overrides it; `repro preflight` holds the shapes against a real minibatch. What `prepare` makes here counts
        as kept on the host.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self.prepare(0, Path(scratch), earlier)
            return self.minibatch(0, generator(0, self.name, "rehearsal"))

    def work(self) -> Sequence[Work]:
        """What the phase does on the device outside its steps, such as building a pool. Called before `prepare`, on no fake tensors."""
        return []

    def storage(self) -> Mapping[str, int]:
        """Bytes that the phase keeps on the host, in memory or on the disk, by name."""
        return {}

    def expected_initial_loss(self) -> float | None:
        """What theory says of the loss before the first step, such as ln k for k classes; `repro diagnose` holds it against it."""
        return None


@dataclass(frozen=True)
class PhaseResult:
    """A finished phase: its network in eval mode, its loss curve as (step, loss), its cost; `watched` as (step, numbers)."""

    model: nn.Module
    curve: list[tuple[int, float]]
    watched: list[tuple[int, dict[str, float]]]
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
    identity is refused with BadInput that names the differences. A damaged newest state is passed over for the one
    before it, with a warning; checkpoint.Damaged when there is no sound one. Raises RunFailed when the loss, the gradient or
    a weight stops being finite or the disk is full, Terminated after the state was saved because of a SIGTERM.
    """
    finished, identity = folder / "model.safetensors", {"phase": phase.name, **identity}
    if not finished.exists():
        # A function of its own, so that model, optimiser and graph are gone before the result is loaded.
        _train(phase, folder, finished, identity, seed, runtime, pace, earlier)
        phase.release()
    runtime.world.barrier()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    result = _load_finished(phase, finished, identity, runtime.device)
    # Here and not after training: a kill between the last save and these lines must not leave a pool behind. And not
    # before the result was found sound: until then the running states are all there is.
    if runtime.world.first:
        for state in folder.glob("running.*"):
            shutil.rmtree(state) if state.is_dir() and not state.is_symlink() else state.unlink()
        checkpoint.sweep(folder)
        shutil.rmtree(folder / "scratch", ignore_errors=True)
    return result


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
    running, scratch = folder / RUNNING, folder / "scratch"
    _start_peak_memory(device)
    seed_global_generators(seed, phase.stream, "initialise")
    model = phase.make_model().to(device)
    stepper = Stepper(model, phase.make_optimiser(model), phase.options, device, phase.learning_rate_factor)
    start, spent_s, curve, watched = 0, 0.0, [], []
    state = _newest_state(running, identity, world)
    if state is not None:
        with _fitting(running, phase):
            start, spent_s, curve = _steps_done(state, range(phase.iterations)), state["wall_s"], state["curve"]
            watched = state.get("watched", [])  # a state of an older kit has none
            model.load_state_dict(state["model"])
            stepper.load_state_dict(state)
    del state
    if world.mean(float(start)) != start:
        raise RunFailed(f"{running}: process {world.rank} found the state of step {start}, another process another one")
    with checkpoint.writing(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    if world.first:
        checkpoint.sweep(folder)
    log = _Log(folder / "log.jsonl", curve, watched, writes=world.first)

    began = time.perf_counter()
    phase.prepare(seed, scratch, earlier)
    prepare_s = time.perf_counter() - began

    def save(path: Path, network: nn.Module, steps_done: int, rest: dict[str, Any]) -> None:
        _require_finite_weights(network, phase, steps_done)
        wall_s = spent_s + time.perf_counter() - began
        progress_so_far = {
            "identity": identity,
            "steps_done": steps_done,
            "wall_s": wall_s,
            "curve": log.curve,
            "watched": log.watched,
        }
        if world.first:
            checkpoint.save(path, {**progress_so_far, "model": network.state_dict(), **rest})

    model.train()
    shared = world.wrap(model, device)
    steps = range(start, phase.iterations)
    with arithmetic(phase.options.precision), deferred_termination() as stop:
        for step in progress(steps, phase.name, total=phase.iterations, initial=start, shown=world.first):
            # Global generators too: a library draws from them while all processes make the same minibatch, and dropout does
            # while each trains on its own share.
            seed_global_generators(seed, phase.stream, "step", step)
            minibatch = phase.minibatch(step, generator(seed, phase.stream, "draws", step))
            if world.rank_part:
                seed_global_generators(seed, phase.stream, "step", step, *world.rank_part)
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
                _require_finite_gradients(stepper.scale, phase, steps_done)
            if logs:
                log.write(steps_done, value, _watch(phase, stepper, seed, step) if world.first else {})
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
    with _fitting(path, phase):
        _steps_done(state, [phase.iterations])
        model.load_state_dict(state["model"])
        curve = [(step, loss) for step, loss in state["curve"]]
        watched = [(step, values) for step, values in state.get("watched", [])]
        cost = state["wall_s"], state["prepare_s"], state["peak_device_bytes"]
    return PhaseResult(model.to(device).eval().requires_grad_(False), curve, watched, *cost)


def _newest_state(running: Path, identity: dict, world: World) -> dict | None:
    """The newest sound state of a running phase, None before the first. Says when a damaged one was passed over."""
    found = checkpoint.newest(running)
    if found is None:
        return None
    state, problem = found
    _matching(state, running, identity)
    if problem and world.first:
        # Out of the way, or the next save would put it in the place of the sound one.
        aside = running.with_stem(running.stem + ".damaged")
        os.replace(running, aside)
        kept = f"goes on from the state before it, step {state['steps_done']}; the damaged one is now {aside.name}"
        print(f"repro: warning: {problem}; {kept}", file=sys.stderr)
    return state


def _matching(state: dict, path: Path, identity: dict) -> dict:
    changes = differences(state.get("identity", {}), identity)
    if changes:
        advice = "resume with the configuration that the state was saved with, or start another run folder"
        raise BadInput(
            *(
                f"{path}: {change.key}: found a state of {change.before!r}, expected {change.after!r}; {advice}"
                for change in changes
            )
        )
    return state


@contextmanager
def _fitting(path: Path, phase: Phase) -> Iterator[None]:
    """Within this block what a sound state of other code, or a file in another's place, cannot give raises BadInput."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        why = " ".join(f"no {error}".split() if isinstance(error, KeyError) else str(error).split())
        raise BadInput(
            f"{path}: found a state that does not fit phase {phase.name} as the code is now: "
            f"{why if len(why) <= 300 else why[:297] + '...'}"
        ) from None


def _steps_done(state: dict, allowed: Sequence[int]) -> int:
    steps = state["steps_done"]
    if type(steps) is not int or steps not in allowed:
        raise ValueError(f"found {steps!r} steps done, expected {allowed[0]} to {allowed[-1]}")
    return steps


def _finite(value: float, phase: Phase, steps_done: int) -> float:
    if value != value or abs(value) == float("inf"):
        raise RunFailed(f"phase {phase.name}, step {steps_done}: the loss is {value}; the last saved state is kept")
    return value


def _require_finite_gradients(scale: float, phase: Phase, steps_done: int) -> None:
    """Of a loss that is scaled: a step whose gradient is not finite is passed over, with half the scale the next time."""
    if scale < LEAST_SCALE:
        raise RunFailed(
            f"phase {phase.name}, step {steps_done}: the gradient is not finite, however little the loss is scaled ({scale:.0e}); "
            "the last saved state is kept"
        )


def _require_finite_weights(network: nn.Module, phase: Phase, steps_done: int) -> None:
    """The loss says nothing about the step that was made from it. Buffers may hold infinities, as a mask does."""
    broken = [name for name, weight in network.named_parameters() if not weight.isfinite().all()]
    if broken:
        names = ", ".join(broken[:3]) + f" and {len(broken) - 3} more" * (len(broken) > 3)
        raise RunFailed(
            f"phase {phase.name}, step {steps_done}: the weights of {names} are not finite; the last saved state is kept"
        )


class _Log:
    """The loss curve, and a copy of it to watch: one JSON line per logged step.

    A resumed phase takes the curve from its state and writes the copy anew: a kill may have cut the copy short anywhere.
    """

    def __init__(
        self, path: Path, curve: list[tuple[int, float]], watched: list[tuple[int, dict[str, float]]], writes: bool
    ):
        self._path, self._writes, self.curve, self.watched = path, writes, curve, watched
        if writes:
            beside = dict(watched)
            with checkpoint.writing(path):
                path.write_text("".join(self._line(step, loss, beside.get(step, {})) for step, loss in curve))

    def write(self, step: int, loss: float, values: dict[str, float]) -> None:
        self.curve.append((step, loss))
        if values:
            self.watched.append((step, values))
        if self._writes:
            with checkpoint.writing(self._path), self._path.open("a") as file:
                file.write(self._line(step, loss, values))

    @staticmethod
    def _line(step: int, loss: float, values: dict[str, float]) -> str:
        return json.dumps({"step": step, "loss": loss, **values}) + "\n"


def _watch(phase: Phase, stepper: Stepper, seed: int, step: int) -> dict[str, float]:
    """What the phase says of its network now. Every step seeds anew, so that nothing drawn here reaches the next one."""
    if type(phase).watch is Phase.watch:
        return {}
    model = stepper.result
    training = model.training
    seed_global_generators(seed, phase.stream, "watch", step)
    try:
        with torch.no_grad():
            return {name: float(value) for name, value in phase.watch(model.eval()).items()}
    finally:
        model.train(training)


def _start_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
