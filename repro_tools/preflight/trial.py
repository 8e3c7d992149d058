"""A trial run of every phase: two steps, killed and resumed, looked at from all sides (`repro preflight`).

Each goes through the engine's own `Loop`, step by step as in a run, with an Update that looks on.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from repro import checkpoint
from repro.loop import FINISHED, RUNNING, Curve, Loop, MakeUpdate, load_networks
from repro.phases import Networks, Phase, SingleLossPhase, SingleLossState
from repro.randomness import seed_global_generators
from repro.runtime import Runtime, arithmetic, deterministic
from repro.update import Update
from repro_tools.failure import describe
from repro_tools.minibatch import draw, first_round
from repro_tools.own_loop import has_own_loop
from repro_tools.preflight.checks import Findings
from repro_tools.preflight.parts import look_at_parts
from repro_tools.preflight.whole import Whole, first_difference, leaves, whole, with_rows
from repro_tools.table import listed

STEPS = 2
OWN_LOOP = "own loop"
"""Why a row is not measured: it looks at the one network and the one loss that such a phase does not have."""
OF_MINIBATCH = ("overrides", "minibatch", "rehearsal", "parts")
OF_TRAINING = ("training", "gradients", "updates", "checkpoint", "boundary", "resume")

Signature = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of every tensor of a minibatch."""


@dataclass(frozen=True)
class Trial:
    """An experiment at tiny size: `phases` and `wider` make new phases of STEPS steps, `wider` with twice the batch size or None
    where no phase has a field of that name. `batch_sizes` are those of the phases that have one, `ignored_iterations` what was
    asked and found where an override does not reach a phase, `divided` the micro-batches that a run is to have."""

    phases: Callable[[], Sequence[Phase]]
    wider: Callable[[], Sequence[Phase]] | None
    batch_sizes: Mapping[str, int]
    ignored_iterations: Mapping[str, tuple[int, int]]
    seed: int
    runtime: Runtime
    folder: Path
    divided: Mapping[str, int] = field(default_factory=dict)


def try_phases(trial: Trial, findings: Findings) -> tuple[dict[str, Networks], dict[str, Signature]]:
    """Rows for every phase. Returns their networks, new ones where training failed, and the signatures of their minibatches."""
    models: dict[str, Networks] = {}
    signatures: dict[str, Signature] = {}
    with deterministic(trial.runtime.device), arithmetic("float32"):
        for index, phase in enumerate(trial.phases()):
            folder = trial.folder / f"{index + 1}-{phase.name}"
            trained = _train(trial, phase, folder, models, findings)
            if trained is not None:
                _interrupt(trial, index, folder, models, trained.whole, findings)
            else:
                findings.left_out("parts", "it does not train", phase.name)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                signatures[phase.name] = _look_at_minibatches(trial, index, models, findings)
            except Exception as error:
                if trained is not None:  # otherwise the reason is already there
                    findings.failed("minibatch", describe(error), phase.name)
                findings.leave_out_all(OF_MINIBATCH, "no minibatch can be drawn", phase.name)
            models[phase.name] = _untrained(trial, index, models) if trained is None else trained.networks
    return models, signatures


def prepared(phase: Phase, trial: Trial, models: Mapping[str, Networks], name: str) -> Phase:
    """The phase after `prepare`, with the global generators as a run has them then."""
    scratch = trial.folder / "minibatches" / phase.name / name
    scratch.mkdir(parents=True)
    seed_global_generators(trial.seed, phase.stream, "initialise")
    phase.prepare(trial.seed, scratch, models)
    return phase


def signature(batch: Mapping[str, Tensor]) -> Signature:
    return {name: (tuple(column.shape), column.dtype) for name, column in batch.items()}


def in_words(found: Signature) -> str:
    return ", ".join(f"{name} {shape} {str(dtype).removeprefix('torch.')}" for name, (shape, dtype) in found.items())


def _look_at_minibatches(trial: Trial, index: int, models: dict[str, Networks], findings: Findings) -> Signature:
    phase = prepared(trial.phases()[index], trial, models, "one")
    of_round = first_round(phase, trial.seed, trial.runtime, models)
    seed_global_generators("one")
    first = draw(phase, 0, trial.seed, of_round)
    seed_global_generators("another")
    again = draw(phase, 0, trial.seed, of_round)
    second = draw(phase, 1, trial.seed, of_round)
    if not findings.has("parts", phase.name):
        look_at_parts(phase, {0: first}, trial.seed, trial.runtime, models, trial.divided, findings)
    phase.release()
    problem = _fault_of_draws(trial, index, models, of_round, first, again, second)
    findings.judge("minibatch", problem, phase=phase.name)
    if has_own_loop(phase):
        findings.not_measured_all(("overrides", "rehearsal"), OWN_LOOP, phase.name)
        return signature(first)
    _look_at_batch_size(trial, index, models, len(next(iter(first.values()))), findings)
    try:
        found = signature(trial.phases()[index].rehearse(models))
        problem = (
            None if found == signature(first) else f"found {in_words(found)}, expected {in_words(signature(first))}"
        )
    except Exception as error:
        problem = describe(error)
    findings.judge("rehearsal", problem, phase=phase.name)
    return signature(first)


def _fault_of_draws(
    trial: Trial,
    index: int,
    models: dict[str, Networks],
    of_round: Mapping[str, Tensor],
    first: dict[str, Tensor],
    again: dict[str, Tensor],
    second: dict[str, Tensor],
) -> str | None:
    rows = {len(column) for column in first.values()}
    if len(rows) > 1:
        return f"found columns of {', '.join(map(str, sorted(rows)))} rows, expected one row per example in each"
    off_cpu = [name for name, column in first.items() if column.device.type != "cpu"]
    if off_cpu:
        return f"found {listed(off_cpu)} on a device, expected every column on the CPU"
    if changed := _differing(first, again):
        return f"found {listed(changed)} different in two draws of one step: a global generator, or something kept from the first draw"
    phase = prepared(trial.phases()[index], trial, models, "later")
    seed_global_generators("another")
    later = draw(phase, 1, trial.seed, of_round)
    phase.release()
    if changed := _differing(second, later):
        return f"found {listed(changed)} of step 1 different when it is the first step to be drawn, as after a resume"
    if not _differing(first, second) and _depends_on_batch_size(trial, index):
        return "found the same minibatch at steps 0 and 1: its generator is not the one that minibatch is given"
    return None


def _depends_on_batch_size(trial: Trial, index: int) -> bool:
    """Whether the minibatch is a part of the data. Otherwise it may be all of them, and the same at every step."""
    return trial.phases()[index].name in trial.batch_sizes


def _look_at_batch_size(trial: Trial, index: int, models: dict[str, Networks], rows: int, findings: Findings) -> None:
    """Twice the batch size makes twice the rows."""
    name = trial.phases()[index].name
    if ignored := trial.ignored_iterations.get(name):
        findings.failed("overrides", f"found {ignored[1]} iterations, expected {ignored[0]} as overridden", name)
        return
    if trial.wider is None or name not in trial.batch_sizes:
        findings.passed("overrides", "iterations; it has no batch_size", name)
        return
    phase = prepared(trial.wider()[index], trial, models, "wider")
    of_round = first_round(phase, trial.seed, trial.runtime, models)
    wide = len(next(iter(draw(phase, 0, trial.seed, of_round).values())))
    phase.release()
    size = trial.batch_sizes[name]
    problem = None
    if wide != 2 * rows:
        problem = (
            f"found minibatches of {rows} and {wide} rows at batch_size {size} and {2 * size}, expected twice as many"
        )
    findings.judge("overrides", problem, "iterations, batch_size", name)


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    return [name for name in one if name not in other or not _equal(one[name], other[name])]


def _equal(one: Tensor, other: Tensor) -> bool:
    """The same bits, but that any NaN equals any other."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


@dataclass
class _Seen:
    """What was seen of a phase while it trained: its state, and the networks' weights at the beginning."""

    state: Any = None
    initial: dict[str, Tensor] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    pushed: set[str] = field(default_factory=set)
    """Weights that an optimiser stepped with a gradient, and with one that is not zero."""

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.state.model.named_parameters())

    def look_at_gradients(self) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.reached.add(name)
                if weight.grad.coalesce().values().any() if weight.grad.is_sparse else weight.grad.any():
                    self.pushed.add(name)


class _Watching(Update):
    """Shows the gradients of a single loss to `seen` before each step."""

    seen: _Seen

    def step(self, optimiser: torch.optim.Optimizer, **named: Any) -> Tensor:
        if isinstance(self.seen.state, SingleLossState):
            self.seen.look_at_gradients()
        return super().step(optimiser, **named)


def _weights_now(state: Any) -> dict[str, Tensor]:
    """Copies of every weight that has a shape by now."""
    weights = {name: weight for name, weight in checkpoint.parameters(state).items() if not is_lazy(weight)}
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}


def _begun(
    trial: Trial,
    phase: Phase,
    folder: Path,
    models: Mapping[str, Networks],
    before: Mapping[str, Any] | None = None,
    make_update: MakeUpdate = Update,
) -> Loop:
    """The phase before its first step, or where a snapshot left it; `folder` is that of a run's phase."""
    loop = Loop(phase, seed=trial.seed, runtime=trial.runtime, earlier=models, folder=folder, make_update=make_update)
    if before is not None:
        loop.restore(before)
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    loop.prepare(scratch)
    return loop


def _step(loop: Loop) -> None:
    """The step that is next, logged as a run logs it."""
    with arithmetic(loop.phase.precision):
        loop.collect_if_due()
        loop.one_step(loop.next_batch())
        numbers = loop.numbers()
        loop.require_scale()
        loop.write_curves(numbers)
        loop.watch()


def _finished(loop: Loop, path: Path) -> None:
    """Writes what the phase hands on, as a run does it."""
    checkpoint.require_finite(loop.state, loop.phase.name, loop.step)
    networks = {name: dict(one.state_dict()) for name, one in loop.phase.networks(loop.state).items()}
    checkpoint.save(path, {"networks": networks})


def _handed_on(trial: Trial, phase: Phase, models: Mapping[str, Networks], path: Path) -> Networks:
    """What a later phase reads of it."""
    networks = Networks(dict(phase.rebuilt(models)))
    load_networks(networks, checkpoint.load(path))
    return networks.to(trial.runtime.device).eval().requires_grad_(False)


@dataclass(frozen=True)
class _Trained:
    """What is left of a phase that was trained in one go."""

    networks: Networks
    whole: Whole


def _train(
    trial: Trial, phase: Phase, folder: Path, models: dict[str, Networks], findings: Findings
) -> _Trained | None:
    """Rows of a phase that is trained in one go, and what is left of it; None where that failed."""
    seen = _Seen()

    def watching(*arguments: Any) -> Update:
        update = _Watching(*arguments)
        update.seen = seen
        return update

    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loop = _begun(trial, phase, folder / "whole", models, make_update=watching)
            seen.state, seen.initial = loop.state, _weights_now(loop.state)
            while loop.step < phase.steps:
                _step(loop)
            _finished(loop, folder / "whole" / FINISHED)
            networks = _handed_on(trial, phase, models, folder / "whole" / FINISHED)
            curves, trained = loop.curves, _Trained(networks, whole(loop))
    except Exception as error:
        check = "checkpoint" if _while_saving(error) else "training"
        findings.failed(check, describe(error), phase.name)
        findings.leave_out_all(OF_TRAINING, "it does not train", phase.name)
        return None
    finally:
        phase.release()
    findings.judge("training", _fault_of_training(curves, networks, warned), _losses(curves), phase.name)
    if not isinstance(phase, SingleLossPhase):
        findings.not_measured_all(("gradients", "updates"), OWN_LOOP, phase.name)
        return trained
    findings.judge("gradients", _fault_of_gradients(seen), f"{len(seen.reached)} parameters", phase.name)
    if phase.precision == "fp16" and not _moved(seen):
        findings.left_out("updates", "fp16: the loss scaler may pass over the first steps", phase.name)
    else:
        findings.judge("updates", _fault_of_updates(seen), phase=phase.name)
    return trained


def _untrained(trial: Trial, index: int, models: Mapping[str, Networks]) -> Networks:
    """New networks, for what comes behind a phase that failed."""
    networks = Networks(dict(trial.phases()[index].rebuilt(models)))
    return networks.to(trial.runtime.device).eval().requires_grad_(False)


def _while_saving(error: BaseException) -> bool:
    """Whether it was raised where a state is looked through, written or read."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code is Loop.snapshot.__code__ or code.co_filename == checkpoint.__file__:
            return True
        trace = trace.tb_next
    return False


def _losses(curves: Mapping[str, Curve]) -> str:
    told = (f"{name} " + " -> ".join(f"{value:.3g}" for _, value in curve) for name, curve in curves.items())
    return ", ".join(told)


def _fault_of_training(
    curves: Mapping[str, Curve], networks: Networks, warned: Sequence[warnings.WarningMessage]
) -> str | None:
    if "loss" in curves and len(curves["loss"]) != STEPS:
        return f"found {len(curves['loss'])} steps, expected {STEPS}"
    weights = dict(networks.named_parameters())
    # A buffer may hold infinities, as a mask does.
    broken = [name for name, weight in weights.items() if not _finite(weight)]
    broken += [name for name, buffer in networks.named_buffers() if buffer.isnan().any()]
    if broken:
        return f"found values that are not finite in {listed(broken)} after {STEPS} steps"
    for warning in warned:
        if "target size" in str(warning.message):  # (n,) against (n, 1): the loss broadcasts, and trains to the mean
            return " ".join(str(warning.message).partition(". ")[0].split())
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _fault_of_gradients(seen: _Seen) -> str | None:
    wanting = [name for name, p in seen.weights.items() if p.requires_grad and name not in seen.reached]
    if wanting:
        return f"no gradient reaches {listed(wanting)}"
    if not seen.pushed:
        return "every gradient is zero"
    return None


def _moved(seen: _Seen) -> set[str]:
    found = set()
    for name, now in seen.weights.items():
        initial = seen.initial.get(f"state.model.{name}")  # None for one that had no shape yet
        if initial is None or not torch.equal(initial, now.detach().cpu()):
            found.add(name)
    return found


def _fault_of_updates(seen: _Seen) -> str | None:
    names = {id(parameter): name for name, parameter in seen.weights.items()}
    groups = [[names.get(id(p), "?") for p in group["params"]] for group in seen.state.optimiser.param_groups]
    moved = _moved(seen)
    for group in groups:
        # Not each by itself: the gradient of a bias before a normalisation is rounding, and too small to move it.
        pushed = [name for name in group if name in seen.pushed]
        if pushed and not moved & set(pushed):
            return f"a gradient reaches {listed(pushed)}, which did not move in {STEPS} steps"
    return None


def _interrupt(
    trial: Trial, index: int, folder: Path, models: dict[str, Networks], in_one_go: Whole, findings: Findings
) -> None:
    """Begins the phase anew with new objects, as a process would behind a kill at its boundary; saves it after a step, and goes on
    from there both in memory and, again with new objects, from what was saved."""
    name, check, saved = trial.phases()[index].name, "boundary", folder / RUNNING
    try:
        loop = _begun(trial, trial.phases()[index], folder, models)
        _step(loop)
        snapshot = loop.snapshot()
        checkpoint.save(saved, snapshot)
        after_first = leaves(with_rows(loop, snapshot))
        kept = _to_the_end(loop)
        problem = first_difference(in_one_go, kept, "at the end")
        if problem is not None and _is_shifted_by_saving(trial, index, folder, models, in_one_go):
            findings.judge("checkpoint", first_difference(in_one_go, kept, "at the end after a save"), phase=name)
            findings.leave_out_all(OF_TRAINING, "to save it shifts it", name)
            return
        findings.judge("boundary", problem, phase=name)
        before, check = checkpoint.load(saved), "resume"
        findings.passed("checkpoint", f"{saved.stat().st_size / 2**20:.1f} MiB", name)
        phase = trial.phases()[index]
        if phase.collects_from_seed:
            before["round"] = None  # lost, so that it is made again
        loop = _begun(trial, phase, folder, models, before)
        put_back = leaves(with_rows(loop, loop.snapshot()))
        resumed = _to_the_end(loop)
        if problem is not None:
            findings.left_out("resume", "it differs before it is killed", name)
            return
        problem = first_difference(kept, resumed, "at the end")
        if problem is not None and not phase.collects_from_seed:  # what was put back otherwise is nearer to the cause
            problem = first_difference(after_first, put_back, "when it was put back") or problem
        findings.judge("resume", problem, phase=name)
    except Exception as error:
        findings.failed("checkpoint" if _while_saving(error) else check, describe(error), name)
        findings.leave_out_all(OF_TRAINING, "see the failed row of this phase", name)


def _to_the_end(loop: Loop) -> Whole:
    """Takes the steps that are left. Drops what `prepare` built."""
    while loop.step < loop.phase.steps:
        _step(loop)
    found = whole(loop)
    loop.phase.release()
    return found


def _is_shifted_by_saving(
    trial: Trial, index: int, folder: Path, models: dict[str, Networks], in_one_go: Whole
) -> bool:
    """Of a phase that ended otherwise when it was begun anew and saved on its way: whether it does not when it is not saved."""
    never_saved = _to_the_end(_begun(trial, trial.phases()[index], folder, models))
    return first_difference(in_one_go, never_saved, "at the end") is None
