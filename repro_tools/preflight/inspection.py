"""All checks of one experiment, from its configuration to its evaluation (`repro preflight`). Each adds its rows and lets the next go on."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repro.config import RunConfig, flatten, load, matches, validate
from repro.errors import BadInput
from repro.method import Evaluation, Project
from repro.phases import Networks, Phase, SingleLossPhase
from repro.randomness import seed_global_generators
from repro.rounds import DISK_SHARE, gib, room
from repro.runtime import Runtime, arithmetic, check_precision, deterministic
from repro_tools.failure import describe
from repro_tools.minibatch import draw, first_round
from repro_tools.preflight.checks import CHECKS, Findings, Row
from repro_tools.preflight.trial import (
    STEPS,
    Signature,
    Trial,
    in_words,
    prepared,
    signature,
    try_phases,
)
from repro_tools.spec import Spec, check_experiment, load_spec
from repro_tools.table import listed

OF_EXPERIMENT = tuple(name for name, check in CHECKS.items() if check.of == "experiment" and name != "probes")
ADAM_COPIES = 3
"""Weights and two moments: what a state of a phase holds, where no smaller one was measured."""
DROPOUTS = {
    getattr(nn.functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}


@dataclass(frozen=True)
class Question:
    """What is asked of every experiment. `data_is_required` when a folder of data was named; `micro_batches` are those of the runs that
    are meant."""

    data_root: Path
    data_is_required: bool
    runs: Path
    micro_batches: Mapping[str, int] = field(default_factory=dict)


def inspect(project: Project, experiment: str, question: Question) -> list[Row]:
    """Every row of one experiment but its probes and its memory. Never raises for what the method does."""
    findings = Findings(experiment)
    try:
        spec = load_spec(project.spec)
        config = _configuration(project, experiment, spec)
    except Exception as error:
        findings.failed("configuration", describe(error))
        findings.leave_out_all(OF_EXPERIMENT, "the configuration cannot be used")
        return findings.rows
    findings.passed("configuration", str(project.experiments()[experiment]))
    findings.judge("unknown keys", _accepted_keys(project, experiment, config))
    try:
        _with_phases(project, experiment, config, spec, question, findings)
    except Exception as error:
        findings.failed("training", describe(error))
        findings.leave_out_all(OF_EXPERIMENT, "see the failed row")
    return findings.rows


def _with_phases(
    project: Project, experiment: str, config: RunConfig, spec: Spec, question: Question, findings: Findings
) -> None:
    runtime = Runtime(torch.device("cpu"), question.data_root, stand_in_data=True)
    with tempfile.TemporaryDirectory(prefix="repro-preflight-") as scratch:
        tiny = _tiny(project, experiment, config)
        trial = _trial(project, experiment, tiny, spec.seeds[0], runtime, Path(scratch))
        trial = replace(trial, divided=question.micro_batches)
        models, signatures = try_phases(trial, findings)
        full = project.method.phases(config, runtime)
        _machine(full, question, findings)
        _data(project, tiny, config, trial, models, signatures, question, findings)
        _room(full, models, trial, question, findings)
        _evaluation(project, tiny[0], spec, models, trial, findings)


def _configuration(project: Project, experiment: str, spec: Spec) -> RunConfig:
    path = project.experiments()[experiment]
    config, _ = load(project.config_class(experiment), path)
    if config.experiment != experiment:
        raise BadInput(
            f"{path}: experiment: found '{config.experiment}', expected '{experiment}', the name of the file"
        )
    check_experiment(spec, project.spec, experiment, config, path)
    return config


def _accepted_keys(project: Project, experiment: str, config: RunConfig) -> str | None:
    """What is wrong when a key that nothing reads is taken, in any part of the configuration, or an override that matches nothing."""
    model, data = project.config_class(experiment), config.model_dump(mode="json")
    for place in _mappings(data):
        changed = config.model_dump(mode="json")
        _at(changed, place)["no_such_key"] = 0
        with _refused() as refused:
            validate(model, changed, "preflight")
        if not refused.done:
            return f"found the unknown key {'.'.join([*place, 'no_such_key'])} accepted, expected it refused"
    with _refused() as refused:
        load(model, project.experiments()[experiment], ["phases.*.no_such_key=0"])
    return None if refused.done else "found the override phases.*.no_such_key=0 accepted, expected it refused"


@dataclass
class _Refusal:
    done: bool = False


@contextmanager
def _refused() -> Iterator[_Refusal]:
    refusal = _Refusal()
    try:
        yield refusal
    except BadInput:
        refusal.done = True


def _mappings(data: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(data, dict):
        yield place
        for name, child in data.items():
            yield from _mappings(child, (*place, name))


def _at(data: dict, place: Sequence[str]) -> dict:
    for name in place:
        data = data[name]
    return data


def _tiny(project: Project, experiment: str, config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration at tiny size, and the overrides that make it so."""
    steps = f"phases.*.iterations={STEPS}"
    overrides = [steps] * matches(config, steps) + project.tiny(experiment, config)
    try:
        return load(project.config_class(experiment), project.experiments()[experiment], overrides)[0], overrides
    except BadInput as error:
        hint = "; Method.tiny may ask for other iterations"
        raise BadInput(*(f"{one}{hint if f'iterations={STEPS}' in one else ''}" for one in error.problems)) from None


def _trial(
    project: Project, experiment: str, tiny: tuple[RunConfig, list[str]], seed: int, runtime: Runtime, folder: Path
) -> Trial:
    config, overrides = tiny

    def made(*more: str) -> Sequence[Phase]:
        path = project.experiments()[experiment]
        changed, _ = load(project.config_class(experiment), path, [*overrides, *more]) if more else (config, None)
        return project.method.phases(changed, runtime)

    def of_two_steps(phases: Sequence[Phase]) -> Sequence[Phase]:
        for phase in phases:
            object.__setattr__(phase, "iterations" if isinstance(phase, SingleLossPhase) else "steps", STEPS)
        return phases

    leaves = flatten(config)
    names = [phase.name for phase in made()]
    sizes = {name: leaves[f"phases.{name}.batch_size"] for name in names if f"phases.{name}.batch_size" in leaves}
    wide = [f"phases.{name}.batch_size={2 * size}" for name, size in sizes.items()]
    # Twice as many: a configuration may ask for a multiple of something.
    twice = {key: 2 * leaf for key, leaf in leaves.items() if re.fullmatch(r"phases\.[^.]+\.iterations", key)}
    expected = {phase.name: twice.get(f"phases.{phase.name}.iterations", 2 * phase.steps) for phase in made()}
    longer = made(*(f"{key}={iterations}" for key, iterations in twice.items()))
    return Trial(
        phases=lambda: of_two_steps(made()),
        wider=(lambda: of_two_steps(made(*wide))) if wide else None,
        batch_sizes=sizes,
        ignored_iterations={
            phase.name: (expected[phase.name], phase.steps) for phase in longer if phase.steps != expected[phase.name]
        },
        seed=seed,
        runtime=runtime,
        folder=folder,
    )


def _machine(full: Sequence[Phase], question: Question, findings: Findings) -> None:
    """What the phases at full size say about this machine, the data aside."""
    for number, phase in enumerate(full, start=1):
        try:
            check_precision(phase.precision, phase.name, torch.device("cpu"))
            said = phase.check(question.runs / (findings.experiment or "") / "seed-0" / f"{number}-{phase.name}")
            findings.passed("machine", "; ".join(said), phase.name)
        except Exception as error:
            findings.failed("machine", describe(error), phase.name)


def _data(
    project: Project,
    tiny: tuple[RunConfig, list[str]],
    config: RunConfig,
    trial: Trial,
    models: Mapping[str, Networks],
    signatures: Mapping[str, Signature],
    question: Question,
    findings: Findings,
) -> None:
    """Minibatches of the real data beside those that were tried."""
    runtime = replace(trial.runtime, stand_in_data=False)
    failed = {row.phase for row in findings.rows if row.check == "machine" and row.status == "fail"}
    try:
        for phase in project.method.phases(config, runtime):
            if phase.name not in failed:
                phase.check(question.runs)
    except BadInput as error:
        if question.data_is_required:
            findings.failed("data", describe(error))
        else:
            findings.left_out("data", f"{describe(error)}; all other rows come from stand-in data")
        return
    except Exception as error:
        findings.failed("data", describe(error))
        return
    try:
        for index, phase in enumerate(project.method.phases(tiny[0], runtime)):
            if phase.name not in signatures:
                continue
            before = dict(list(models.items())[:index])
            ready = prepared(phase, trial, before, "real")
            batch = draw(ready, 0, trial.seed, first_round(ready, trial.seed, trial.runtime, before))
            phase.release()
            if signature(batch) != signatures[phase.name]:
                expected = in_words(signatures[phase.name])
                findings.failed("data", f"phase {phase.name}: found {in_words(signature(batch))}, expected {expected}")
                return
            if broken := [name for name, column in batch.items() if not _is_finite(column)]:
                findings.failed("data", f"phase {phase.name}: found values that are not finite in {listed(broken)}")
                return
    except Exception as error:
        findings.failed("data", describe(error))
        return
    findings.passed("data", "a minibatch of every phase was drawn")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _room(
    full: Sequence[Phase], models: Mapping[str, Networks], trial: Trial, question: Question, findings: Findings
) -> None:
    """What a run keeps at its largest moment: every finished network, two states of a running phase, its storage."""
    try:
        networks = {phase.name: _nbytes(phase, models[phase.name], models) for phase in full}
        storage = {phase.name: sum(phase.storage().values()) for phase in full}
    except Exception as error:
        findings.failed("room", describe(error))
        return
    saved = sum(networks.values()) + 2 * ADAM_COPIES * max(networks.values())
    disk, kept = room(question.runs), max(storage.values())
    found = f"states {gib(saved)}, rounds {gib(kept)}; expected at most {DISK_SHARE:.0%} of the free disk, {gib(disk)}"
    if saved > disk:
        findings.failed("room", f"found {found}; the states do not fit on the disk of {question.runs}")
    elif saved + kept > disk:
        largest = max(storage, key=storage.__getitem__)
        findings.failed("room", f"found {found}; the data of phase {largest} do not fit on the disk")
    else:
        findings.passed("room", found)


def _nbytes(phase: Phase, tiny: Networks, earlier: Mapping[str, Networks]) -> int:
    """Bytes of the networks at full size, made without memory where they can be; else of those that were tried."""
    try:
        with torch.device("meta"):
            networks = Networks(dict(phase.rebuilt(earlier)))
    except Exception:
        networks = tiny
    return sum(tensor.numel() * tensor.element_size() for tensor in networks.state_dict().values())


def _evaluation(
    project: Project, config: RunConfig, spec: Spec, models: Mapping[str, Networks], trial: Trial, findings: Findings
) -> None:
    try:
        with _training_modules() as training:
            first = _evaluate(project, config, models, trial)
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in first.tensors.items()},
            trial.folder / "tensors.safetensors",
        )
        values = {name: float(value) for name, value in first.metrics.items()}
    except Exception as error:
        findings.failed("evaluation", describe(error))
        findings.leave_out_all(("eval mode", "metrics", "repetition"), "the evaluation does not run")
        return
    findings.passed("evaluation", f"{len(values)} metrics")
    findings.judge("eval mode", f"found {listed(sorted(training))} in training mode" if training else None)
    findings.judge("metrics", _fault_of_metrics(spec, findings.experiment or "", values))
    try:
        with _training_modules():  # or a layer may take another way through PyTorch than in the first
            second = _evaluate(project, config, models, trial)
        changed = _changed(first, second)
        findings.judge("repetition", f"found {listed(changed)} different in the second" if changed else None)
    except Exception as error:
        findings.failed("repetition", f"the second one: {describe(error)}")


def _evaluate(project: Project, config: RunConfig, models: Mapping[str, Networks], trial: Trial) -> Evaluation:
    """One evaluation as a run makes it."""
    for model in models.values():
        model.eval()
    seed_global_generators(trial.seed, "evaluate")
    with deterministic(trial.runtime.device), arithmetic("float32"), torch.no_grad():
        return project.method.evaluate(config, models, trial.seed, trial.runtime)


@contextmanager
def _training_modules() -> Iterator[set[str]]:
    """Collects the kinds of module that are called in training mode although that changes what they compute, and the functions of
    dropout that are called as in training: no mode reaches them."""
    found: set[str] = set()

    def look(module: nn.Module, inputs: tuple) -> None:
        if module.training and _depends_on_mode(module):
            found.add(type(module).__name__)

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    called = _TrainingDropout()
    try:
        with called:
            yield found
    finally:
        handle.remove()
        found |= called.found if not found else set()  # a module's own call is among them


class _TrainingDropout(TorchFunctionMode):
    """Collects the functions of dropout that are called, while this is entered, with values that drop something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            drops = (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
        else:
            drops = function in DROPOUTS and kwargs["training"] and kwargs["p"] > 0  # PyTorch passes both by name
        if drops:
            self.found.add(f"{function.__name__}()")
        return function(*args, **kwargs)


def _depends_on_mode(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    dropout = getattr(module, "dropout", 0)
    return isinstance(dropout, float) and dropout > 0


def _fault_of_metrics(spec: Spec, experiment: str, values: Mapping[str, float]) -> str | None:
    problems = []
    for claim in spec.claims_of(experiment):
        for name in filter(None, (*claim.operands, claim.floor)):
            if name not in values:
                close = difflib.get_close_matches(name, list(values), n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                problems.append(f"claim {claim.id}: found metric '{name}', which the evaluation does not give{hint}")
            elif not torch.tensor(values[name]).isfinite():
                problems.append(f"claim {claim.id}: found {name} = {values[name]}, expected a finite number")
    return "; ".join(dict.fromkeys(problems)) or None


def _changed(first: Evaluation, second: Evaluation) -> list[str]:
    one, other = ({**evaluation.metrics, **evaluation.tensors} for evaluation in (first, second))
    as_tensors: Callable[[Any], Tensor] = torch.as_tensor
    return [
        name
        for name in sorted({*one, *other})
        if name not in one or name not in other or not _same(as_tensors(one[name]), as_tensors(other[name]))
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
