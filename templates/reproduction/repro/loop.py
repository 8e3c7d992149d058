"""Runs a phase: draws, steps, logs and saves, from its beginning or its last saved state, to its end.

`Loop` is one phase in motion, and all that drives it, a run or a tool, goes through its few methods.
`run_phase` is a run's way.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repro import checkpoint, rounds
from repro.config import Pace, differences
from repro.errors import BadInput, RunFailed, Terminated, deferred_termination
from repro.phases import Batch, Networks, Phase
from repro.randomness import Ahead, Draw, Orders, one_thread, seed_global_generators
from repro.rounds import Rows
from repro.runtime import Runtime, World, arithmetic, progress
from repro.update import Update

RUNNING, FINISHED, SCRATCH = "running.safetensors", "model.safetensors", "scratch"
"""In a phase's folder: the last saved state while it runs, its networks when it is finished, and a folder for
what can be made again."""
PARTS = "parts.json"
"""There too: what came out of trying the parts of a minibatch, at each beginning of a run in several."""

LEAST_SCALE = 2.0**-24
"""Of a loss in fp16. A gradient that overflows with less is above 10^12, or not finite in any precision."""

MakeUpdate = Callable[[Phase[Any], int, Runtime], Update]
Curve = list[tuple[int, float]]
"""Steps done, and a number after them."""
Watched = list[tuple[int, dict[str, float]]]
"""Steps done, and what `watch` said then."""
Session = dict[str, str | int]
"""Of a process that trained a phase: the steps done when it began, and its versions."""


@dataclass
class Round:
    """What `collect` made, and the step at which it did; `name` is that of its folder once it has one."""

    began: int
    rows: Rows
    on_disk: bool = False
    name: str | None = None
    compared: bool = False
    """Whether it is known to be the same in all processes, as what lies on the disk is."""


class Loop:
    """A phase in motion: `restore` (or not), `prepare`, and for each step `collect_if_due`, `next_batch`,
    `one_step`.

    `folder` is where the data of rounds are kept, None for memory; `make_update` may make a kind of Update
    that looks on. Raises BadInput for a state that cannot be saved.
    """

    def __init__(
        self,
        phase: Phase[Any],
        *,
        seed: int,
        runtime: Runtime,
        earlier: Mapping[str, Networks],
        folder: Path | None = None,
        make_update: MakeUpdate = Update,
    ):
        self.phase, self.seed, self.runtime, self.folder = phase, seed, runtime, folder
        self.earlier = earlier
        seed_global_generators(seed, phase.stream, "initialise")
        self.state = phase.setup(earlier)
        checkpoint.check(self.state, phase.name, phase.shared_parameters)
        checkpoint.move(self.state, runtime.device)
        self.update = make_update(phase, seed, runtime)
        self.step = 0
        """Steps done."""
        self.round: Round | None = None
        self._lost: str | None = None  # the name of a round that is to be made again
        self.curves: dict[str, Curve] = {}
        self._orders: Orders = {}
        self._ahead: Ahead | None = None
        self._weights: tuple[list[int], list[tuple[str, Tensor]]] = [], []

    def prepare(self, scratch: Path) -> None:
        """What the phase reads or builds before its first step."""
        self.phase.prepare(self.seed, scratch, self.earlier)

    def collect_if_due(self) -> None:
        """Makes the data of a round where one begins or they were lost, with products in float32."""
        every = self.phase.collect_every
        began = self.step - self.step % every if every else 0
        if not every or (self.round and self.round.began == began):
            return
        self.close()
        self.round = None  # so that two rounds are never held at a time
        seed_global_generators(self.seed, self.phase.stream, "collect", began)
        self.update.begin(began, self.folder)
        with arithmetic("float32"):
            rows = self.update.collected(self.phase.collect(self.state, self.update))
        self.update.end(self._named_weights())
        on_disk = self.update.gave_room_on_disk
        self.round = Round(began, rows, on_disk, compared=on_disk)
        if self._lost is not None:
            self._compare_with_the_lost()

    def draw(self, step: int) -> Batch:
        """The minibatch of a step of this round, on the CPU, on one thread."""
        stream = self.phase.stream
        # Global generators too: a library may draw from them without asking.
        seed_global_generators(self.seed, stream, "step", step)
        began, rows = (self.round.began, self.round.rows) if self.round else (0, None)
        place = {"step": step, "round_step": step - began}
        draw = Draw(self.seed, stream, "draws", step, **place, collected=rows, orders=self._orders)
        with one_thread():
            return self.phase.minibatch(step, draw)

    def next_batch(self) -> Batch:
        """The minibatch of the step that is next, from the workers where there are any."""
        if not self.runtime.workers:
            return self.draw(self.step)
        if self._ahead is None or next(iter(self._ahead.left), None) != self.step:
            self.close()
            every = self.phase.collect_every
            ends = self.step - self.step % every + every if every else self.phase.steps
            steps, pin = range(self.step, min(ends, self.phase.steps)), self.runtime.device.type == "cuda"
            self._ahead = Ahead(self.draw, steps, self.runtime.workers, pin)
        batch: Batch | Exception = self._ahead.next()
        if isinstance(batch, Exception):
            raise batch
        return batch

    def close(self) -> None:
        """Ends the workers."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def one_step(self, batch: Batch) -> None:
        """The step that is next."""
        # Again, so that what was drawn above shifts nothing here.
        seed_global_generators(self.seed, self.phase.stream, "step", self.step)
        self.update.begin(self.step)
        self.phase.train_step(self.state, batch, self.update)
        self.update.end(self._named_weights())
        if self.phase.parts_define:
            buffers = [
                one for network in checkpoint.modules(self.state).values() for one in network.buffers()
            ]
            self.runtime.world.broadcast_into(buffers, f"phase {self.phase.name}, buffers")
        self.step += 1

    def numbers(self) -> dict[str, tuple[int, float]]:
        """The newest number of each name, with the steps done then. Raises RunFailed for one not finite."""
        found = self.update.numbers()
        for name, (step, value) in found.items():
            if not math.isfinite(value):
                raise self._failure(step, f"the {name} is {value}")
        return found

    def write_curves(self, numbers: Mapping[str, tuple[int, float]]) -> dict[int, dict[str, float]]:
        """Takes each number into the curve of its name. Returns those that are new, by steps done."""
        new: dict[int, dict[str, float]] = {}
        for name, (step, value) in numbers.items():
            curve = self.curves.setdefault(name, [])
            if not curve or curve[-1][0] < step:
                curve.append((step, value))
                new.setdefault(step, {})[name] = value
        return new

    def watch(self) -> dict[str, float]:
        """What the phase says of its networks now, in eval mode. It shifts no later draw."""
        if type(self.phase).watch is Phase.watch:
            return {}
        networks = Networks(dict(self.phase.networks(self.state)))
        modes = {module: module.training for module in networks.modules()}
        seed_global_generators(self.seed, self.phase.stream, "watch", self.step - 1)
        try:
            with torch.no_grad():
                return {name: float(value) for name, value in self.phase.watch(networks.eval()).items()}
        finally:
            for module, training in modes.items():
                module.training = training

    def snapshot(self) -> dict[str, Any]:
        """All that a new Loop needs to go on from here, as plain containers and tensors; nothing is copied.

        The data of a round are named where they lie in a folder, and otherwise among the tensors.
        """
        return {
            "steps_done": self.step,
            "state": checkpoint.saved(self.state),
            "scaler": self.update.scaler.state_dict(),
            "logged": {name: (step, float(value)) for name, (step, value) in self.update.logged.items()},
            "curves": self.curves,
            "round": self._saved_round(),
        }

    def restore(self, before: Mapping[str, Any]) -> None:
        """Goes on from a snapshot. Raises ValueError or KeyError where it does not fit the present code."""
        self.step = _steps_done(before, range(self.phase.steps + 1))
        checkpoint.restore(self.state, before["state"])
        if before["scaler"]:
            self.update.scaler.load_state_dict(before["scaler"])
        self.update.logged = {name: (step, value) for name, (step, value) in before["logged"].items()}
        self.curves = {name: [tuple(point) for point in curve] for name, curve in before["curves"].items()}
        kept = _with_rows(before, self.phase, self.folder)["round"]
        if kept and kept["rows"] is None:
            self._lost = kept["name"]
        elif kept:
            self.round = Round(kept["began"], Rows.of(kept["rows"]), name=kept.get("name"), compared=True)

    def require_same_state(self) -> None:
        """Raises RunFailed when processes have other states, or data of a round: they would train apart."""
        world = self.runtime.world
        if world.size == 1:
            return
        own = {"state": checkpoint.saved(self.state)}
        if self.round is not None and not self.round.compared:
            own["round"], self.round.compared = dict(self.round.rows), True
        names, digests = zip(*checkpoint.digests(own, "saved"), strict=True)
        place = f"phase {self.phase.name}, step {self.step}, the state {zlib.crc32(repr(names).encode())}"
        everywhere = world.gather(torch.tensor([digests]), place)
        same_everywhere = (everywhere == everywhere[0]).all(0).tolist()
        if other := [name for name, same in zip(names, same_everywhere, strict=True) if not same]:
            first = other[0].removeprefix("saved.").removeprefix("state.")
            found = f"found {first} different in the processes" + f" and {len(other) - 1} more" * (
                len(other) > 1
            )
            ways = "update.step, update.all_reduce or update.broadcast"
            raise self._failure(self.step, f"{found}; what changes it must come by {ways}")

    def require_scale(self) -> None:
        """Raises RunFailed when fp16 found no scale at which gradients are finite.

        A step whose gradient is not finite is passed over, with half the scale the next time.
        """
        if (scale := self.update.scaler.get_scale()) < LEAST_SCALE:
            scaled = f"however little the loss is scaled ({scale:.0e})"
            raise self._failure(self.step, f"the gradient is not finite, {scaled}")

    def _saved_round(self) -> dict[str, Any] | None:
        if self.round is None:
            return None
        if self.folder is None or not self.runtime.world.first:  # one process writes
            return {"began": self.round.began, "rows": dict(self.round.rows)}
        if self.round.name is None:
            folder, rows = self.folder, self.round.rows
            self.round.name = rounds.seal(folder) if self.round.on_disk else rounds.write(folder, rows)
        return {"began": self.round.began, "name": self.round.name}

    def _compare_with_the_lost(self) -> None:
        """Says so when a round came out otherwise: on another machine, or it was no function of the seed."""
        again = (self._saved_round() or {}).get("name", self._lost)
        if again != self._lost:
            found = f"found other data in the round that was made again, {again}, expected {self._lost}"
            print(
                f"repro: warning: phase {self.phase.name}, step {self.step}: {found}: other bits",
                file=sys.stderr,
            )
        self._lost = None

    def _named_weights(self) -> list[tuple[str, Tensor]]:
        # Looked up again only where a step has put something else into the state.
        objects = [id(value) for value in vars(self.state).values()]
        if self._weights[0] != objects:
            self._weights = objects, list(checkpoint.parameters(self.state).items())
        return self._weights[1]

    def _failure(self, step: int, why: str) -> RunFailed:
        return RunFailed(f"phase {self.phase.name}, step {step}: {why}; the last saved state is kept")


def rounds_folder(phase: Phase[Any], folder: Path) -> Path:
    """Where the data of its rounds lie, of a phase whose states lie in `folder`."""
    return folder / SCRATCH if phase.collects_from_seed else folder


@dataclass(frozen=True)
class PhaseResult:
    """A finished phase: its networks in eval mode, the curves that it logged, its cost."""

    networks: Networks
    curves: dict[str, Curve]
    watched: Watched
    wall_s: float
    prepare_s: float
    """Of `wall_s`, what came before the first step of each process: `prepare`, a `collect` that is due."""
    peak_device_bytes: int
    sessions: list[Session]
    """Where each process began that trained it, and its Python and torch; nothing for one of version 0.1."""
    parts: list[dict[str, Any]]
    """The verdicts on its parts, of each beginning in several."""


def run_phase(
    phase: Phase[Any],
    *,
    folder: Path,
    identity: dict[str, Any],
    seed: int,
    runtime: Runtime,
    pace: Pace,
    earlier: Mapping[str, Networks],
    make_update: MakeUpdate = Update,
) -> PhaseResult:
    """Runs `phase` to its end, from the newest state in `folder` if there is one.

    `identity` is what must not change between start and resume (the resolved configuration); a state of
    another identity is refused with BadInput that names the differences. A damaged newest state is passed
    over for the one before it, with a warning; checkpoint.Damaged when there is no sound one. Raises
    RunFailed when a logged number or a weight stops being finite or the disk is full, Terminated after the
    state was saved because of a SIGTERM.
    """
    finished, identity = folder / FINISHED, {"phase": phase.name, **identity}
    if not finished.exists():
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(runtime.device)
        given: dict[str, Any] = {"seed": seed, "runtime": runtime, "earlier": earlier}
        loop_folder = rounds_folder(phase, folder)
        own = {"parts": runtime.parts_of(phase.name)} if phase.parts_define else {}
        # Named nowhere here, so that networks, optimisers and graphs are gone before the result is loaded.
        _train(
            Loop(phase, **given, folder=loop_folder, make_update=make_update), folder, identity | own, pace
        )
        phase.release()
    runtime.world.barrier()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    result = _load_finished(phase, finished, identity, runtime.device, earlier)
    # Here and not after training: a kill between the last save and these lines must leave nothing behind. And
    # not before the result was found sound: until then the running states are all there is.
    if runtime.world.first:
        for left in [*folder.glob("running.*"), folder / SCRATCH]:
            rounds.drop(left)
        rounds.keep(folder, [])
        checkpoint.sweep(folder)
    return result


def _train(loop: Loop, folder: Path, identity: dict[str, Any], pace: Pace) -> None:
    phase, world, device = loop.phase, loop.runtime.world, loop.runtime.device
    running, scratch = folder / RUNNING, folder / SCRATCH
    spent_s, prepare_s, sessions = 0.0, 0.0, [_session(0)]
    watched: Watched = []
    before = _newest_state(running, identity, loop)
    begins = before is None
    if before is not None:
        with _fitting(running, phase):
            _steps_done(before, range(phase.steps))  # a finished phase has no running state
            loop.restore(before)
            spent_s, prepare_s = before["wall_s"], before["prepare_s"]
            watched = [tuple(one) for one in before["watched"]]
            sessions = [*before["sessions"], _session(loop.step)]
            _warn_of_other_versions(sessions, running, world)
    del before
    if world.total(float(loop.step)) != loop.step * world.size:
        found = f"process {world.rank} found the state of step {loop.step}, another process another one"
        raise RunFailed(f"{running}: {found}")
    with checkpoint.writing(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    if world.first:
        checkpoint.sweep(folder)
    kept = [loop.round.name] if loop.round else []
    log = _Log(folder / "log.jsonl", loop.curves, watched, writes=world.first)

    began = time.perf_counter()
    loop.prepare(scratch)
    loop.collect_if_due()  # while a SIGTERM still ends the process: before the first step nothing is lost
    if loop.runtime.parts_of(phase.name) > 1:
        _try_parts(loop, folder / PARTS)
    prepare_s += time.perf_counter() - began

    def save(path: Path, contents: dict[str, Any]) -> None:
        checkpoint.require_finite(loop.state, phase.name, loop.step)
        loop.require_same_state()
        wall_s = spent_s + time.perf_counter() - began
        if world.first:
            cost = {"wall_s": wall_s, "prepare_s": prepare_s}
            own = {"identity": identity, "watched": log.watched, "sessions": sessions}
            checkpoint.save(path, own | cost | contents)

    if begins and loop.round:
        save(running, loop.snapshot())  # to build it may take longer than all that follows
        kept = [loop.round.name]
    steps = progress(range(loop.step, phase.steps), phase.name, phase.steps, loop.step, shown=world.first)
    with arithmetic(phase.precision), deferred_termination() as asked, _workers(loop):
        for _ in steps:
            loop.collect_if_due()
            loop.one_step(loop.next_batch())
            ends = loop.step == phase.steps
            stops = world.any(bool(asked)) and not ends
            saves = not ends and (stops or loop.step % pace.checkpoint_every == 0)
            logs = ends or loop.step % pace.log_every == 0
            if logs or saves:
                numbers = loop.numbers()
                loop.require_scale()
            if logs:
                log.write(loop.step, loop.write_curves(numbers), loop.watch() if world.first else {})
            if saves:
                save(running, loop.snapshot())
                if world.first and loop.round and loop.folder:
                    kept = [*kept[-1:], loop.round.name]  # of the newest state and of the one before it
                    rounds.keep(loop.folder, kept)
            if stops:
                raise Terminated

        networks = {name: dict(one.state_dict()) for name, one in phase.networks(loop.state).items()}
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        last = {"steps_done": loop.step, "curves": loop.curves, "networks": networks}
        save(folder / FINISHED, last | {"peak_device_bytes": peak})
        if world.any(bool(asked)):
            raise Terminated


def _try_parts(loop: Loop, path: Path) -> None:
    """Keeps the verdict on the parts of this phase. Raises BadInput where it refuses them."""
    from repro.split import require_same, split_test  # which imports what else no run needs

    runtime, first, last = loop.runtime, loop.step, loop.phase.steps - 1
    every = loop.phase.collect_every
    ends = first - first % every + every - 1 if every else last  # of the round, whose data are there
    batches = {step: loop.draw(min(step, ends)) for step in (first, (first + last + 1) // 2, last)}
    verdict = split_test(loop.phase, batches, loop.seed, runtime, loop.earlier)
    if runtime.world.first:
        kept, new = _verdicts(path), asdict(verdict)
        checkpoint.replace(path, json.dumps([*kept, new] if new not in kept else kept).encode())
        if verdict.why and verdict.outcome != "refused":
            told = f"phase {loop.phase.name}: parts: {verdict.outcome}: {verdict.why}"
            print(f"repro: {told}", file=sys.stderr)
    require_same(loop.phase, verdict)


def _verdicts(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return []


@contextmanager
def _workers(loop: Loop) -> Iterator[None]:
    """Ends the workers after this block. In it one that ends raises RunFailed, or BadInput where it has to do
    with a GPU."""
    try:
        yield
    except RuntimeError as error:
        text, name = " ".join(str(error).split()), loop.phase.name
        if "Cannot re-initialize CUDA" in text:
            found = "found a minibatch that uses the GPU, expected one on the CPU"
            raise BadInput(f"phase {name}: {found}, or --workers 0") from None
        if "DataLoader worker (pid" in text:
            kept = "the last saved state is kept, go on with the same command and --resume"
            raise RunFailed(f"phase {name}: a worker that draws minibatches ended ({text}); {kept}") from None
        raise
    finally:
        loop.close()


def _load_finished(
    phase: Phase[Any],
    path: Path,
    identity: dict[str, Any],
    device: torch.device,
    earlier: Mapping[str, Networks],
) -> PhaseResult:
    state = checkpoint.load(path)
    state["identity"].pop("parts", None)  # of its training alone
    _matching(state, path, identity)
    networks = Networks(dict(phase.rebuilt(earlier)))
    with _fitting(path, phase):
        _steps_done(state, [phase.steps])
        load_networks(networks, state)
        curves = state["curves"] if "curves" in state else {"loss": state["curve"]}  # of version 0.1
        return PhaseResult(
            networks=networks.to(device).eval().requires_grad_(False),
            curves={name: [(step, value) for step, value in curve] for name, curve in curves.items()},
            watched=[(step, values) for step, values in state.get("watched", [])],
            wall_s=state["wall_s"],
            prepare_s=state["prepare_s"],
            peak_device_bytes=state["peak_device_bytes"],
            sessions=state.get("sessions", []),
            parts=_verdicts(path.with_name(PARTS)),
        )


def load_networks(networks: Networks, state: Mapping[str, Any]) -> None:
    """Loads the networks of a finished phase's state, also of version 0.1, which had one and called it
    `model`.

    Raises ValueError for networks of other names, RuntimeError for other weights.
    """
    saved = state["networks"] if "networks" in state else {"model": state["model"]}
    if set(networks) != set(saved):
        raise ValueError(f"found the networks {sorted(saved)}, expected {sorted(networks)}")
    for name, network in networks.items():
        network.load_state_dict(saved[name])


def _newest_state(running: Path, identity: dict[str, Any], loop: Loop) -> dict[str, Any] | None:
    """The newest sound state with the data of its round, or None. Says when a damaged one was passed over."""
    found = checkpoint.newest(running, lambda state: _with_rows(state, loop.phase, loop.folder))
    if found is None:
        return None
    state, problem = found
    if "model" in state:
        formats = f"found a running state of the format {checkpoint.OLDER}, expected {checkpoint.FORMAT}"
        advice = "finish the phase with the version that began it, or start it over with --resume-phase"
        raise BadInput(f"{running}: {formats}; {advice}")
    _matching(state, running, identity)
    if problem and loop.runtime.world.first:
        # Out of the way, or the next save would put it in the place of the sound one.
        aside = running.with_stem(running.stem + ".damaged")
        os.replace(running, aside)
        step, now = state["steps_done"], aside.name
        kept = f"goes on from the state before it, step {step}; the damaged one is now {now}"
        print(f"repro: warning: {problem}; {kept}", file=sys.stderr)
    return state


def _with_rows(state: Mapping[str, Any], phase: Phase[Any], folder: Path | None) -> dict[str, Any]:
    """A state with the data of its round, read where they lie in `folder`, or with none where they are to be
    made again. Raises checkpoint.Damaged."""
    kept = state.get("round")
    if kept and "rows" not in kept and folder is not None:
        try:
            kept = kept | {"rows": rounds.read(folder / kept["name"])}
        except checkpoint.Damaged:
            if not phase.collects_from_seed:
                raise
            kept = kept | {"rows": None}
    return {**state, "round": kept}


def _matching(state: dict[str, Any], path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    advice = "resume with the configuration that the state was saved with, or start another run folder"
    if changes := differences(state.get("identity", {}), identity):
        found = [f"{one.key}: found a state of {one.before!r}, expected {one.after!r}" for one in changes]
        raise BadInput(*(f"{path}: {one}; {advice}" for one in found))
    return state


@contextmanager
def _fitting(path: Path, phase: Phase[Any]) -> Iterator[None]:
    """Within this block what a state of other code, or a file in another's place, lacks raises BadInput."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        why = " ".join(f"no {error}".split() if isinstance(error, KeyError) else str(error).split())
        why = why if len(why) <= 300 else f"{why[:297]}..."
        found = f"found a state that does not fit phase {phase.name} as the code is now"
        raise BadInput(f"{path}: {found}: {why}") from None


def _steps_done(state: Mapping[str, Any], allowed: Sequence[int]) -> int:
    steps = state["steps_done"]
    if type(steps) is not int or steps not in allowed:
        raise ValueError(f"found {steps!r} steps done, expected {allowed[0]} to {allowed[-1]}")
    return steps


def _session(step: int) -> Session:
    return {"step": step, "python": platform.python_version(), "torch": str(torch.__version__)}


def _warn_of_other_versions(sessions: list[Session], running: Path, world: World) -> None:
    """No resume is exact under another Python or torch."""
    was, now = (", ".join(f"{name} {one[name]}" for name in ("python", "torch")) for one in sessions[-2:])
    if was != now and world.first:
        told = f"found a state of {was}, goes on with {now}: other bits"
        print(f"repro: warning: {running}: {told}", file=sys.stderr)


class _Log:
    """What is logged, for somebody who looks on: one JSON line per step that has numbers.

    A resumed phase takes the curves from its state and writes the lines anew: a kill may have cut them short
    anywhere.
    """

    def __init__(self, path: Path, curves: dict[str, Curve], watched: Watched, writes: bool):
        self._path, self._writes, self.watched = path, writes, watched
        lines: dict[int, dict[str, float]] = {}
        for name, curve in curves.items():
            for step, value in curve:
                lines.setdefault(step, {})[name] = value
        for step, values in watched:
            lines.setdefault(step, {}).update(values)
        self._append("w", lines)

    def write(self, step: int, new: dict[int, dict[str, float]], values: dict[str, float]) -> None:
        if values:
            self.watched.append((step, values))
            new.setdefault(step, {}).update(values)
        self._append("a", new)

    def _append(self, mode: str, lines: dict[int, dict[str, float]]) -> None:
        if self._writes:
            with checkpoint.writing(self._path), self._path.open(mode) as file:
                file.writelines(json.dumps({"step": step, **lines[step]}) + "\n" for step in sorted(lines))
