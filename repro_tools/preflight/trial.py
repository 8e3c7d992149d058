"""A trial run of every phase: two steps, killed and resumed, looked at from all sides (`repro preflight`).

The phases go through the engine's own `run_phase`, with an Update that looks on. Their methods are replaced on the object, never on
the class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repro import checkpoint
from repro import state as states
from repro.config import Pace
from repro.loop import RUNNING, PhaseResult, run_phase
from repro.phases import Networks, Phase, SingleLossPhase, SingleLossState
from repro.randomness import Draw, seed_global_generators
from repro.runtime import Runtime, arithmetic, deterministic
from repro.update import Update
from repro_tools.failure import describe
from repro_tools.minibatch import draw, first_round
from repro_tools.own_loop import has_own_loop
from repro_tools.preflight.checks import Findings
from repro_tools.table import listed

STEPS = 2
OWN_LOOP = "own loop"
"""Why a row is not measured: it looks at the one network and the one loss that such a phase does not have."""
OF_MINIBATCH = ("overrides", "minibatch", "rehearsal")
OF_TRAINING = ("training", "gradients", "updates", "checkpoint", "boundary", "resume")

Signature = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of every tensor of a minibatch."""


@dataclass(frozen=True)
class Trial:
    """An experiment at tiny size: `phases` and `wider` make new phases of STEPS steps, `wider` with twice the batch size or None
    where no phase has a field of that name. `batch_sizes` are those of the phases that have one, `ignored_iterations` what was
    asked and found where an override does not reach a phase."""

    phases: Callable[[], Sequence[Phase]]
    wider: Callable[[], Sequence[Phase]] | None
    batch_sizes: Mapping[str, int]
    ignored_iterations: Mapping[str, tuple[int, int]]
    seed: int
    runtime: Runtime
    folder: Path


def try_phases(trial: Trial, findings: Findings) -> tuple[dict[str, Networks], dict[str, Signature]]:
    """Rows for every phase. Returns their networks, new ones where training failed, and the signatures of their minibatches."""
    models: dict[str, Networks] = {}
    signatures: dict[str, Signature] = {}
    with deterministic(trial.runtime.device), arithmetic("float32"):
        for index, phase in enumerate(trial.phases()):
            model = _train(trial, index, phase, models, findings)
            try:
                signatures[phase.name] = _look_at_minibatches(trial, index, models, findings)
            except Exception as error:
                if model is not None:  # otherwise the reason is already there
                    findings.failed("minibatch", describe(error), phase.name)
                findings.leave_out_all(OF_MINIBATCH, "no minibatch can be drawn", phase.name)
            models[phase.name] = model if model is not None else _untrained(trial, index, models)
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
    """What was seen of a phase while it trained: its first state, and the networks' tensors at the beginning and after a step."""

    state: Any = None
    initial: dict[str, Tensor] = field(default_factory=dict)
    after_first: dict[str, Tensor] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    pushed: set[str] = field(default_factory=set)
    """Weights that an optimiser stepped with a gradient, and with one that is not zero."""

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.state.model.named_parameters())

    @property
    def networks(self) -> dict[str, Tensor]:
        """Every tensor of every network of the state."""
        networks = states.modules(self.state).items()
        named = ((f"{name}.{key}", tensor) for name, one in networks for key, tensor in one.state_dict().items())
        return {name.removeprefix("state."): tensor for name, tensor in named}

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


class _Killed(BaseException):
    """Ends a phase as a kill does."""


def _watch(phase: Phase) -> _Seen:
    """Looks on while `phase` trains."""
    seen, setup, minibatch = _Seen(), phase.setup, phase.minibatch

    def watched_setup(earlier: Mapping[str, Networks]) -> Any:
        state = setup(earlier)
        if seen.state is None:
            seen.state, seen.initial = state, _copy(states.parameters(state))
        return state

    def watched_minibatch(step: int, draw: Draw) -> Mapping[str, Tensor]:
        if step == 1:
            seen.after_first = _copy(seen.networks)
        return minibatch(step, draw)

    object.__setattr__(phase, "setup", watched_setup)
    object.__setattr__(phase, "minibatch", watched_minibatch)
    return seen


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _run(
    trial: Trial, phase: Phase, folder: Path, models: Mapping[str, Networks], saves: bool, seen: _Seen | None = None
) -> PhaseResult:
    def watching(*arguments: Any) -> Update:
        update = _Watching(*arguments)
        update.seen = seen or _Seen()
        return update

    return run_phase(
        phase,
        folder=folder,
        identity={"preflight": phase.name},
        seed=trial.seed,
        runtime=trial.runtime,
        pace=Pace(log_every=1, checkpoint_every=1 if saves else STEPS),
        earlier=models,
        make_update=watching,
    )


def _train(trial: Trial, index: int, phase: Phase, models: dict[str, Networks], findings: Findings) -> Networks | None:
    """Rows of a phase that is trained without and with interruption. Returns its networks, None where that failed."""
    seen, folder = _watch(phase), trial.folder / f"{index + 1}-{phase.name}"
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = _run(trial, phase, folder / "whole", models, saves=False, seen=seen)
    except Exception as error:
        check = "checkpoint" if _while_saving(error) else "training"
        findings.failed(check, describe(error), phase.name)
        findings.leave_out_all(OF_TRAINING, "it does not train", phase.name)
        phase.release()
        return None
    findings.judge("training", _fault_of_training(result, warned), _losses(result), phase.name)
    if not isinstance(phase, SingleLossPhase):
        findings.not_measured_all(("gradients", "updates"), OWN_LOOP, phase.name)
        _interrupt(trial, index, folder / "interrupted", models, seen, result, findings)
        return result.networks
    findings.judge("gradients", _fault_of_gradients(seen), f"{len(seen.reached)} parameters", phase.name)
    if phase.precision == "fp16" and not _moved(seen):
        findings.left_out("updates", "fp16: the loss scaler may pass over the first steps", phase.name)
    else:
        findings.judge("updates", _fault_of_updates(seen), phase=phase.name)
    _interrupt(trial, index, folder / "interrupted", models, seen, result, findings)
    return result.networks


def _untrained(trial: Trial, index: int, models: Mapping[str, Networks]) -> Networks:
    """New networks, for what comes behind a phase that failed."""
    networks = Networks(dict(trial.phases()[index].rebuilt(models)))
    return networks.to(trial.runtime.device).eval().requires_grad_(False)


def _while_saving(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == checkpoint.__file__:
            return True
        trace = trace.tb_next
    return False


def _losses(result: PhaseResult) -> str:
    curves = (f"{name} " + " -> ".join(f"{value:.3g}" for _, value in curve) for name, curve in result.curves.items())
    return ", ".join(curves)


def _fault_of_training(result: PhaseResult, warned: Sequence[warnings.WarningMessage]) -> str | None:
    if "loss" in result.curves and len(result.curves["loss"]) != STEPS:
        return f"found {len(result.curves['loss'])} steps, expected {STEPS}"
    if broken := [name for name, tensor in result.networks.state_dict().items() if not _finite(tensor)]:
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
    initial = {name: seen.initial[f"state.model.{name}"] for name in seen.weights}
    return {name for name, now in seen.weights.items() if not torch.equal(initial[name], now.detach().cpu())}


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
    trial: Trial,
    index: int,
    folder: Path,
    models: dict[str, Networks],
    seen: _Seen,
    whole: PhaseResult,
    findings: Findings,
) -> None:
    """Begins the phase anew with new objects, as a process would behind a kill at its boundary; kills it after a step, resumes it."""
    name, check = trial.phases()[index].name, "boundary"
    try:
        phase = trial.phases()[index]
        minibatch = phase.minibatch

        def killed_minibatch(step: int, draw: Draw) -> Mapping[str, Tensor]:
            if step == 1:
                raise _Killed
            return minibatch(step, draw)

        object.__setattr__(phase, "minibatch", killed_minibatch)
        try:
            _run(trial, phase, folder, models, saves=True)
        except _Killed:
            phase.release()
        state = checkpoint.load(folder / RUNNING)
        size = (folder / RUNNING).stat().st_size
        problem = _different("after its first step", seen.after_first, _networks_in(state))
        findings.judge("boundary", problem, phase=name)
        check = "resume"
        resumed = _run(trial, trial.phases()[index], folder, models, saves=True)
        findings.passed("checkpoint", f"{size / 2**20:.1f} MiB", name)
        if problem is not None:
            findings.left_out("resume", "it differs before it is killed", name)
            return
        problem = _different("at the end", whole.networks.state_dict(), resumed.networks.state_dict())
        if problem is None and resumed.curves != whole.curves:
            problem = f"found the curves {resumed.curves}, expected {whole.curves} as without the kill"
        findings.judge("resume", problem, phase=name)
    except Exception as error:
        findings.failed("checkpoint" if _while_saving(error) else check, describe(error), name)
        findings.leave_out_all(OF_TRAINING, "see the failed row of this phase", name)


def _networks_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of every network in a saved state, named as `_Seen.networks` names them."""
    found: dict[str, Tensor] = {}

    def look(node: Any, name: str) -> None:
        if isinstance(node, dict) and set(node) == {"state_dict", "resting", "frozen"}:
            named = {f"{name}.{key}": tensor for key, tensor in node["state_dict"].items()}
            found.update({key.removeprefix("state."): tensor for key, tensor in named.items()})
        elif isinstance(node, dict | list | tuple):
            for key, item in node.items() if isinstance(node, dict) else enumerate(node):
                look(item, f"{name}.{key}")

    look(state["state"], "state")
    return found


def _different(when: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    expected, found = _copy(expected), _copy(found)
    if changed := _differing(expected, found):
        return f"found other bits {when} in {listed(changed)}"
    return None
