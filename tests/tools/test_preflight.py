"""`repro preflight` on the toy method: each planted fault is named in exactly its row, and variants that are correct are silent."""

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import toy_method
from pydantic import PositiveInt, model_validator
from torch import nn
from toy_method import Config, Constant, Line
from toy_project import CONFIG, SPEC, python_path, write_yaml

from repro.config import Section, load
from repro.errors import BadInput
from repro.method import Evaluation, Probe, find_project
from repro_tools.check import command as check
from repro_tools.check import findings
from repro_tools.cli import main
from repro_tools.memory import devices
from repro_tools.preflight import command as preflight
from repro_tools.preflight.checks import CHECKS, Findings
from repro_tools.preflight.command import Task, _here, _in_processes
from repro_tools.preflight.inspection import Question

IGNORED = {"commit", "memory"}
"""No repository and no device: not applicable here."""


@pytest.fixture(autouse=True)
def complete_spec(monkeypatch):
    """`repro check` has tests of its own; the toy's spec is no complete one, so only what is to be filled in is kept."""
    real = check.check_project

    def check_project(*given):
        found = real(*given)
        return replace(found, findings=[one for one in found.findings if one.kind == findings.PLACEHOLDER])

    monkeypatch.setattr(check, "check_project", check_project)


@pytest.fixture
def toy(project, monkeypatch):
    """Changes of the toy method for one test: `toy(probes=...)`, or attributes of its phases by `monkeypatch`."""

    def change(**fields):
        monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, **fields))

    change(probes=lambda config, runtime: [Probe("sum", "torch", "(2,)", lambda: None)])
    return change


def preflown(capsys, *arguments):
    """The exit code and the rows."""
    code = main(["preflight", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)["rows"]


def failed(rows):
    return {(row["check"], row["phase"]) for row in rows if row["status"] == "fail"}


def text_of(rows, check):
    (text,) = {row["text"] for row in rows if row["check"] == check and row["status"] == "fail"}
    return text


def only_fails(capsys, check, phase, words, *arguments):
    """One row fails, with these words and its fix; nothing else does."""
    code, rows = preflown(capsys, *arguments)
    assert failed(rows) == {(check, phase)} and code == 1
    (fix,) = {row["fix"] for row in rows if row["status"] == "fail"}
    assert fix == CHECKS[check].fix
    assert words in text_of(rows, check)
    return rows


def silent(capsys):
    code, rows = preflown(capsys)
    assert failed(rows) == set() and code == 0
    return rows


# --- what is right passes


def test_the_toy_method_passes_every_check(toy, capsys):
    rows = silent(capsys)
    passed = {(row["check"], row["phase"]) for row in rows if row["status"] == "pass"}
    for name, one in CHECKS.items():
        phases = ("line", "constant") if one.of == "phase" else (None,)
        assert name in IGNORED or all((name, phase) in passed for phase in phases), name


def frozen_layer(monkeypatch):
    def make_model(self):
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        model[0].requires_grad_(False)
        return model

    monkeypatch.setattr(Constant, "make_model", make_model)


def output_that_begins_at_zero(monkeypatch):
    def make_model(self):
        model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1))
        nn.init.zeros_(model[1].weight)
        return model

    monkeypatch.setattr(Constant, "make_model", make_model)


class Counter(nn.Linear):
    """Counts its calls in a buffer, which a checkpoint keeps."""

    def __init__(self):
        super().__init__(1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x) + self.calls


def state_in_a_buffer(monkeypatch):
    monkeypatch.setattr(Constant, "make_model", lambda self: Counter())


def three_rows_an_example(monkeypatch):
    real = Constant.minibatch

    def minibatch(self, step, generator):
        return {"x": real(self, step, generator)["x"].repeat(3, 1)}

    monkeypatch.setattr(Constant, "minibatch", minibatch)


def batch_normalisation(monkeypatch):
    monkeypatch.setattr(
        Constant, "make_model", lambda self: nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    )


def draws_of_the_global_generator_in_the_evaluation(monkeypatch):
    def evaluate(config, models, seed, runtime):
        x = torch.randn(5, 1)
        return Evaluation({"line.error": 0.0, "constant.value": float(models["constant"](x).mean())}, {"x": x})

    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, evaluate=evaluate))


INNOCENT = [
    frozen_layer,
    output_that_begins_at_zero,
    state_in_a_buffer,
    three_rows_an_example,
    batch_normalisation,
    draws_of_the_global_generator_in_the_evaluation,
]


@pytest.mark.parametrize("variant", INNOCENT)
def test_silent_on_what_is_correct(toy, monkeypatch, capsys, variant):
    variant(monkeypatch)
    silent(capsys)


class FullBatch(Section):
    iterations: PositiveInt


class FullBatchPhases(toy_method.Phases):
    constant: FullBatch


class FullBatchConfig(Config):
    phases: FullBatchPhases


class FullBatchConstant(Constant):
    def __init__(self, config):
        self.name, self.iterations = "constant", config.phases.constant.iterations

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=1e-2)

    def minibatch(self, step, generator):
        return {"x": torch.linspace(-1, 1, 6)[:, None]}


def test_a_full_batch_may_be_the_same_at_every_step(toy, project, capsys):
    """A phase without batch_size may train on all data at every step."""
    config = copy.deepcopy(CONFIG)
    config["phases"]["constant"] = {"iterations": 9}
    write_yaml(project / "configs" / "toy.yaml", config)
    toy(config=FullBatchConfig, phases=lambda config, runtime: [Line(config), FullBatchConstant(config)])
    silent(capsys)


# --- each fault in its row


def state_carried_between_steps(monkeypatch):
    real = Constant.loss

    def loss(self, model, batch):
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls * real(self, model, batch)

    monkeypatch.setattr(Constant, "loss", loss)


def parameter_that_is_not_used(monkeypatch):
    real = Line.make_model

    def make_model(self):
        model = real(self)
        model.register_parameter("spare", nn.Parameter(torch.ones(1)))
        return model

    monkeypatch.setattr(Line, "make_model", make_model)


def network_cut_off_from_the_loss(monkeypatch):
    monkeypatch.setattr(
        Constant, "loss", lambda self, model, batch: (model[1](model[0](batch["x"]).detach()) - 3).square().mean()
    )
    monkeypatch.setattr(Constant, "make_model", lambda self: nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)))


def parameter_that_the_optimiser_lacks(monkeypatch):
    monkeypatch.setattr(
        Constant, "make_optimiser", lambda self, model: torch.optim.SGD([model.weight], lr=1e-2, momentum=0.9)
    )


def rate_that_is_not_felt(monkeypatch):
    monkeypatch.setattr(
        Constant, "make_optimiser", lambda self, model: torch.optim.SGD(model.parameters(), lr=1e-12, momentum=0.9)
    )


def minibatch_of_the_global_generator(monkeypatch):
    monkeypatch.setattr(Constant, "minibatch", lambda self, step, generator: {"x": torch.randn(_size(self), 1)})


def minibatch_of_a_generator_of_its_own(monkeypatch):
    def minibatch(self, step, generator):
        return {"x": torch.randn(_size(self), 1, generator=torch.Generator().manual_seed(0))}

    monkeypatch.setattr(Constant, "minibatch", minibatch)


def columns_of_different_length(monkeypatch):
    real = Constant.minibatch

    def minibatch(self, step, generator):
        return real(self, step, generator) | {"scale": torch.ones(1)}

    monkeypatch.setattr(Constant, "minibatch", minibatch)


def batch_size_that_is_ignored(monkeypatch):
    monkeypatch.setattr(
        Constant, "minibatch", lambda self, step, generator: {"x": torch.randn(4, 1, generator=generator)}
    )


def iterations_that_are_ignored(monkeypatch):
    real = Constant.__init__

    def init(self, config):
        real(self, config)
        self.iterations = 30_000

    monkeypatch.setattr(Constant, "__init__", init)


def rehearsal_of_another_shape(monkeypatch):
    monkeypatch.setattr(Constant, "rehearse", lambda self, earlier: {"x": torch.zeros(_size(self), 2)})


def rehearsal_of_another_type(monkeypatch):
    monkeypatch.setattr(Constant, "rehearse", lambda self, earlier: {"x": torch.zeros(_size(self), 1).double()})


def loss_that_is_not_a_number(monkeypatch):
    real = Constant.loss
    monkeypatch.setattr(Constant, "loss", lambda self, model, batch: real(self, model, batch) * float("nan"))


def gradient_that_is_not_a_number(monkeypatch):
    """The loss of two steps is finite: the square root at zero breaks the weights only in the second."""

    def loss(self, model, batch):
        return (model(batch["x"]) - 3).square().mean() + (model.weight - model.weight.detach()).square().sum().sqrt()

    monkeypatch.setattr(Constant, "loss", loss)


def loss_that_broadcasts(monkeypatch):
    monkeypatch.setattr(
        Line, "loss", lambda self, model, batch: nn.functional.mse_loss(model(batch["x"]).squeeze(1), batch["y"])
    )


def crash_in_a_phase(monkeypatch):
    def loss(self, model, batch):
        raise RuntimeError("CUDA error: device-side\nassert triggered")

    monkeypatch.setattr(Line, "loss", loss)


class WithPath(torch.optim.SGD):
    def state_dict(self):
        return super().state_dict() | {"log": Path("log.txt")}


def state_that_cannot_be_saved(monkeypatch):
    monkeypatch.setattr(Constant, "make_optimiser", lambda self, model: WithPath(model.parameters(), lr=1e-2))


def phase_that_remembers_another(monkeypatch):
    """The second phase scales its loss by what the first one left in Python's memory."""
    real, prepare = Constant.loss, Line.prepare

    def phases(config, runtime):
        made = [Line(config), Constant(config)]
        made[1].line = made[0]
        return made

    def prepared(self, *arguments):
        prepare(self, *arguments)
        self.was_prepared = True

    def loss(self, model, batch):
        return real(self, model, batch) * (2 if getattr(self.line, "was_prepared", False) else 1)

    monkeypatch.setattr(Line, "prepare", prepared)
    monkeypatch.setattr(Constant, "loss", loss)
    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, phases=phases))


def _size(phase):
    return phase.config.phases.constant.batch_size


PLANTED = [
    (state_carried_between_steps, "resume", "constant", "state.model.weight: found other bits at the end"),
    (parameter_that_is_not_used, "gradients", "line", "no gradient reaches spare"),
    (network_cut_off_from_the_loss, "gradients", "constant", "no gradient reaches 0.weight, 0.bias"),
    (
        parameter_that_the_optimiser_lacks,
        "training",
        "constant",
        "found a gradient left on model.bias, expected none at the end of a step",
    ),
    (rate_that_is_not_felt, "updates", "constant", "a gradient reaches weight, bias, which did not move in 2 steps"),
    (minibatch_of_the_global_generator, "minibatch", "constant", "found x different in two draws of one step"),
    (minibatch_of_a_generator_of_its_own, "minibatch", "constant", "the same minibatch at steps 0 and 1"),
    (columns_of_different_length, "minibatch", "constant", "found columns of 1, 4 rows"),
    (batch_size_that_is_ignored, "overrides", "constant", "found minibatches of 4 and 4 rows at batch_size 4 and 8"),
    (iterations_that_are_ignored, "overrides", "constant", "found 30000 iterations, expected 4"),
    (rehearsal_of_another_shape, "rehearsal", "constant", "found x (4, 2) float32, expected x (4, 1) float32"),
    (rehearsal_of_another_type, "rehearsal", "constant", "found x (4, 1) float64, expected x (4, 1) float32"),
    (loss_that_is_not_a_number, "training", "constant", "phase constant, step 1: the loss is nan"),
    (loss_that_broadcasts, "training", "line", "Using a target size (torch.Size([8, 1])) that is different"),
    (crash_in_a_phase, "training", "line", "RuntimeError: CUDA error: device-side assert triggered ("),
    (state_that_cannot_be_saved, "checkpoint", "constant", "found PosixPath, expected tensors and plain values only"),
    (phase_that_remembers_another, "boundary", "constant", "state.model.weight: found other bits at the end"),
]


@pytest.mark.parametrize(("plant", "check", "phase", "words"), PLANTED, ids=[plant.__name__ for plant, *_ in PLANTED])
def test_a_fault_of_a_phase_is_named_in_its_row_alone(toy, monkeypatch, capsys, plant, check, phase, words):
    plant(monkeypatch)
    only_fails(capsys, check, phase, words)


def test_a_configuration_that_asks_for_a_multiple_passes_with_its_own_tiny_size(toy, monkeypatch, capsys):
    """As an optimiser that acts every third step may ask. Without the override of `tiny` the rows of two steps cannot be had."""

    class Threes(toy_method.Config):
        @model_validator(mode="after")
        def _of_three(self):
            if self.phases.line.iterations % 3:
                raise ValueError("a multiple of 3")
            return self

    toy(config=Threes, tiny=["phases.line.iterations=3"])
    silent(capsys)
    toy(config=Threes, tiny=[])
    code, rows = preflown(capsys)
    assert code == 1 and text_of(rows, "training").endswith(
        "expected a multiple of 3; Method.tiny may ask for other iterations"
    )


def test_weights_that_are_not_finite_are_found_although_the_losses_are(toy, monkeypatch, capsys):
    gradient_that_is_not_a_number(monkeypatch)
    code, rows = preflown(capsys)
    assert code == 1 and ("training", "constant") in failed(rows)


def test_a_crash_names_the_line_of_the_users_code_and_later_rows_go_on(toy, monkeypatch, capsys):
    crash_in_a_phase(monkeypatch)
    _, rows = preflown(capsys)
    assert "test_preflight.py:" in text_of(rows, "training")
    status = {(row["check"], row["phase"]): (row["status"], row["text"]) for row in rows}
    assert status["resume", "line"] == ("not applicable", "it does not train")
    assert status["resume", "constant"][0] == status["evaluation", None][0] == "pass"


def test_an_iterator_kept_between_steps_fails_as_draw_and_as_resume(toy, monkeypatch, capsys):
    def minibatch(self, step, generator):
        if not hasattr(self, "rows"):
            self.rows = iter(torch.randn(99, _size(self), 1, generator=generator))
        return {"x": next(self.rows)}

    monkeypatch.setattr(Constant, "minibatch", minibatch)
    _, rows = preflown(capsys)
    assert failed(rows) == {("minibatch", "constant"), ("resume", "constant")}


# --- the evaluation


def evaluated(**metrics):
    return lambda config, models, seed, runtime: Evaluation({"constant.value": 3.0} | metrics)


def test_a_misspelt_metric_is_named_before_the_run(toy, project, capsys):
    spec = copy.deepcopy(SPEC)
    spec["claims"][0]["metric"] = "constant.valu"
    write_yaml(project / "spec.yaml", spec)
    words = "claim constant: found metric 'constant.valu', which the evaluation does not give; did you mean 'constant.value'?"
    only_fails(capsys, "metrics", None, words)


@pytest.mark.parametrize("part", ["divided_by", "minus", "floor"])
def test_a_misspelt_second_metric_is_named(toy, project, capsys, part):
    write_yaml(project / "spec.yaml", SPEC | {"claims": [SPEC["claims"][0] | {part: "line.eror"}]})
    only_fails(capsys, "metrics", None, "claim constant: found metric 'line.eror', which the evaluation does not give")


def test_a_metric_that_is_not_finite_is_named(toy, capsys):
    toy(evaluate=evaluated(**{"constant.value": float("inf")}))
    only_fails(capsys, "metrics", None, "claim constant: found constant.value = inf, expected a finite number")


def test_dropout_left_on_is_named(toy, capsys):
    real = toy_method.evaluate

    def evaluate(config, models, seed, runtime):
        found = real(config, models, seed, runtime)
        models["line"].train()
        models["line"](torch.zeros(1, 1))
        return found

    toy(evaluate=evaluate)
    only_fails(capsys, "eval mode", None, "found Dropout in training mode")


@pytest.mark.parametrize(
    ("drops", "named"),
    [
        (lambda x: nn.functional.dropout(x, 0.1), "dropout()"),
        (lambda x: nn.functional.alpha_dropout(x, 0.1, training=True), "alpha_dropout()"),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x, None, 0.1), "scaled_dot_product_attention()"),
    ],
)
def test_dropout_that_no_mode_reaches_is_named(toy, capsys, drops, named):
    real = toy_method.evaluate

    def evaluate(config, models, seed, runtime):
        drops(torch.ones(2, 3, 4))
        return real(config, models, seed, runtime)

    toy(evaluate=evaluate)
    only_fails(capsys, "eval mode", None, f"found {named} in training mode")


class Told(nn.Linear):
    """Dropout by functions that are told the mode, and a layer that goes another way when it is watched."""

    def __init__(self):
        super().__init__(1, 1)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = nn.functional.dropout(super().forward(x), 0.5, self.training)
        y = self.layer((x * torch.arange(32)).sin()[None])[0, :, :1]
        return x + y + nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * self.training)


def test_dropout_that_is_told_the_mode_is_none(toy, monkeypatch, capsys):
    monkeypatch.setattr(Constant, "make_model", lambda self: Told())
    silent(capsys)


def test_an_evaluation_that_changes_is_named(toy, capsys):
    calls = []

    def evaluate(config, models, seed, runtime):
        calls.append(1)
        return Evaluation({"constant.value": 3.0, "calls": float(len(calls))})

    toy(evaluate=evaluate)
    only_fails(capsys, "repetition", None, "found calls different in the second")


def test_an_evaluation_that_fails_is_one_row(toy, capsys):
    def evaluate(config, models, seed, runtime):
        return {}["w2"]

    toy(evaluate=evaluate)
    rows = only_fails(capsys, "evaluation", None, "KeyError: 'w2' (")
    reasons = {row["check"]: row["text"] for row in rows if row["status"] == "not applicable"}
    assert reasons["metrics"] == "the evaluation does not run"


# --- configuration, machine, data


def test_a_configuration_that_contradicts_the_spec_is_named_and_leaves_the_rest_out(toy, project, capsys):
    write_yaml(project / "configs" / "toy.yaml", CONFIG | {"pool_size": 65})
    rows = only_fails(capsys, "configuration", None, "pool_size: found 65, expected 64")
    assert {row["status"] for row in rows if row["check"] == "evaluation"} == {"not applicable"}


def test_a_section_that_takes_any_key_is_named(toy, capsys):
    class Loose(Config, extra="ignore"):
        pass

    toy(config=Loose)
    only_fails(capsys, "unknown keys", None, "found the unknown key no_such_key accepted, expected it refused")


def test_a_failing_probe_is_named(toy, capsys):
    def call():
        raise ValueError("expected (N,D)")

    toy(probes=lambda config, runtime: [Probe("Sinkhorn", "torch", "(8, 1, 28, 28)", call)])
    only_fails(capsys, "probes", None, "Sinkhorn, (8, 1, 28, 28): ValueError: expected (N,D) (")


def test_what_the_machine_lacks_is_named(toy, monkeypatch, capsys):
    def check(self, folder):
        raise BadInput("phases.line.pool: found 99 GiB, expected at most 3 GiB")

    monkeypatch.setattr(Line, "check", check)
    only_fails(capsys, "machine", "line", "phases.line.pool: found 99 GiB, expected at most 3 GiB")


def needs_data(monkeypatch, change=lambda batch: batch):
    """The phase reads data where no stand-in is asked for: there `change` is what it reads, or raises."""

    def phases(config, runtime):
        made = [Line(config), Constant(config)]
        made[0].runtime = runtime
        return made

    def check(self, folder):
        if not self.runtime.stand_in_data:
            change({})
        return []

    real = Line.minibatch

    def minibatch(self, step, generator):
        batch = real(self, step, generator)
        return batch if self.runtime.stand_in_data else change(batch)

    monkeypatch.setattr(Line, "check", check)
    monkeypatch.setattr(Line, "minibatch", minibatch)
    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, phases=phases))


def absent(batch):
    raise BadInput("--data-root: found no data/train.bin")


def test_absent_data_are_a_reason_and_stand_ins_are_tried_in_their_place(toy, monkeypatch, capsys):
    needs_data(monkeypatch, absent)
    rows = silent(capsys)
    (row,) = [row for row in rows if row["check"] == "data"]
    assert row["text"] == "--data-root: found no data/train.bin; all other rows come from stand-in data"
    assert row["status"] == "not applicable"


def test_absent_data_are_a_fault_where_their_folder_was_named(toy, monkeypatch, capsys):
    needs_data(monkeypatch, absent)
    only_fails(capsys, "data", None, "found no data/train.bin", "--data-root", "data")


def test_data_of_another_shape_than_what_was_tried_are_named(toy, monkeypatch, capsys):
    needs_data(monkeypatch, lambda batch: {name: column.repeat(1, 2) for name, column in batch.items()})
    only_fails(capsys, "data", None, "phase line: found x (8, 2) float32, y (8, 2) float32, expected x (8, 1) float32")


def test_data_that_are_not_finite_are_named(toy, monkeypatch, capsys):
    needs_data(monkeypatch, lambda batch: {name: column / 0 for name, column in batch.items()})
    only_fails(capsys, "data", None, "phase line: found values that are not finite in x, y")


def test_a_pool_for_which_there_is_no_room_is_named(toy, monkeypatch, capsys):
    monkeypatch.setattr(Line, "storage", lambda self: {"pool": 2**60})
    only_fails(capsys, "room", None, "the data of phase line do not fit on the disk")


def test_states_for_which_there_is_no_room_are_named(toy, monkeypatch, capsys):
    monkeypatch.setattr("repro_tools.preflight.inspection.room", lambda folder: 10)
    only_fails(capsys, "room", None, "the states do not fit on the disk of runs")


def test_a_device_that_is_too_small_is_named_for_each_phase(toy, monkeypatch, capsys):
    small = replace(devices.find("T4"), name="Small", memory_bytes=2**20, usable_bytes=None, aliases=())
    monkeypatch.setattr(devices, "DEVICES", (*devices.DEVICES, small))
    code, rows = preflown(capsys, "--on", "Small")
    assert failed(rows) == {("memory", "line"), ("memory", "constant")} and code == 1
    code, rows = preflown(capsys, "--on", "T4")
    assert failed(rows) == set() and code == 0


KEEPS_ITS_POINTS = """
from dataclasses import replace
from functools import cache

import torch
import toy_method


@cache
def points():
    x = torch.linspace(-1, 1, 64)[:, None]
    return {kept}


class Line(toy_method.Line):
    def minibatch(self, step, generator):
        x = points()[torch.randint(64, (self.config.phases.line.batch_size,), generator=generator)]
        return {{"x": x, "y": 2 * x + 1}}


METHOD = replace(toy_method.METHOD, phases=lambda config, runtime: [Line(config), toy_method.Constant(config)])
"""


def keeping_its_points(project, module, kept="x"):
    """A method in a file of the project, for new processes to import, that makes its points once and keeps them."""
    (project / f"{module}.py").write_text(KEEPS_ITS_POINTS.format(kept=kept))
    (project / "pyproject.toml").write_text(f'[tool.repro]\nmethod = "{module}:METHOD"\n')


def test_what_training_kept_does_not_answer_for_a_rehearsal(project, capsys):
    """The points are chosen by their values. Those that training made are there, so the same process would not choose again."""
    keeping_its_points(project, "chooses_by_value", "x[x[:, 0] > -2]")
    _, rows = preflown(capsys, "--on", "T4")
    assert failed(rows) == {("memory", None)}
    environment = os.environ | {"PYTHONPATH": python_path()}
    command = [sys.executable, "-m", "repro_tools", "memory", "--on", "T4"]
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert alone.returncode == 1 and f"toy {text_of(rows, 'memory')}" in alone.stdout


def test_what_a_rehearsal_kept_does_not_reach_training(project):
    keeping_its_points(project, "keeps_its_points")
    question = Question(Path("data"), False, Path("runs"))
    rehearsal = Task("toy", "memory", partial(preflight.of_memory, "toy", devices.find("T4")), alone=True)
    training = Task("toy", "training", partial(preflight.of_experiment, "toy", question))
    for rows in (_here([rehearsal, training]), _in_processes([rehearsal, training], jobs=1)):
        assert [row for row in rows if row.status == "fail"] == []
    sys.modules["keeps_its_points"].points.cache_clear()
    shared = _here([replace(rehearsal, alone=False), training])
    assert "training" in {row.check for row in shared if row.status == "fail"}, "the fault was not planted"


def test_the_machine_at_hand_needs_a_gpu_for_the_row_of_memory(toy, project, monkeypatch, capsys):
    write_yaml(project / "spec.yaml", SPEC | {"budget": {"device": "this", "hours": 1, "session_hours": 1}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--on", "this"]):
        code, rows = preflown(capsys, *arguments)
        (row,) = (row for row in rows if row["check"] == "memory")
        assert (code, row["status"]) == (0, "not applicable")
        assert row["text"] == "the device is this machine, which has no GPU"


def test_the_gpu_at_hand_is_found_by_the_name_that_its_driver_gives_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert preflight._at_hand() == devices.find("T4")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Voodoo 2")
    assert preflight._at_hand().startswith("the device is this machine: device: found 'Voodoo 2'")


def test_an_unknown_device_is_refused_before_anything_runs(toy, capsys):
    assert main(["preflight", "--on", "T1000000"]) == 2
    assert capsys.readouterr().err.startswith("repro: device: found 'T1000000'")


# --- tiny sizes


def test_tiny_overrides_apply_where_they_match_and_are_passed_over_elsewhere(toy, monkeypatch, capsys):
    sizes, real = [], Line.prepare

    def prepare(self, *arguments):
        sizes.append(self.config.pool_size)
        real(self, *arguments)

    monkeypatch.setattr(Line, "prepare", prepare)
    toy(tiny=("pool_size=5", "evaluation.samples=3"))
    silent(capsys)
    assert set(sizes) == {5}


def test_of_tiny_overrides_by_pattern_the_first_that_matches_counts(toy, project):
    toy(tiny={"2d-*": ["pool_size=1"], "t*": ["pool_size=2"], "*": ["pool_size=3"]})
    found = find_project(project)
    config, _ = load(Config, found.experiments()["toy"])
    assert [found.tiny(name, config) for name in ("2d-moons", "toy", "other")] == [
        ["pool_size=1"], ["pool_size=2"], ["pool_size=3"],
    ]  # fmt: skip
    assert replace(found, method=replace(found.method, tiny={"2d-*": ["pool_size=1"]})).tiny("toy", config) == []


# --- the project


def test_a_spec_with_findings_is_named_with_the_first(toy, monkeypatch, capsys):
    one = findings.Finding("missing", "spec.yaml: budget", "nothing", "a device")
    real = check.check_project
    monkeypatch.setattr(check, "check_project", lambda *_: replace(real(*_), findings=[one, one]))
    words = "missing: spec.yaml: budget: found nothing, expected a device; and 1 more"
    only_fails(capsys, "spec", None, words)


def to_be_filled_in(project, toy, settings=1):
    """A project in which the method and `settings` settings are placeholders: settings + 1 places."""
    pool = SPEC["settings"][0] | {"why": "FILL IN: the reason"}
    write_yaml(project / "spec.yaml", SPEC | {"settings": [pool | {"name": f"pool {n}"} for n in range(settings)]})
    toy(placeholder="the toy phases")


def test_what_is_still_to_be_filled_in_is_open_and_fails_nothing(toy, project, capsys):
    to_be_filled_in(project, toy)
    rows = silent(capsys)
    (row,) = [row for row in rows if row["check"] == "placeholders"]
    assert (row["status"], row["fix"]) == ("open", None)
    assert row["text"] == (
        "found 2 places, expected none before a run that counts: method, spec.yaml: settings.'pool 0'.why; "
        "repro check lists them"
    )
    assert {row["status"] for row in rows if row["check"] == "spec"} == {"pass"}
    assert main(["preflight", "--json"]) == 0 and json.loads(capsys.readouterr().out)["open"] == 1


def test_what_is_open_is_told_after_what_failed_and_counted(toy, project, monkeypatch, capsys):
    to_be_filled_in(project, toy, settings=5)
    parameter_that_is_not_used(monkeypatch)
    assert main(["preflight"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    header, row = lines[0].split(), next(line for line in lines if line.startswith("placeholders"))
    assert header[:5] == ["check", "pass", "FAIL", "open", "not"] and row[lines[0].index("open")] == "1"
    at = next(index for index, line in enumerate(lines) if line.startswith("OPEN  placeholders: found 6 places,"))
    assert at > max(index for index, line in enumerate(lines) if line.startswith("FAIL"))
    assert "and 3 more; repro check lists them" in " ".join(lines[at : at + 3]).replace("      ", "")
    assert ", 1 failed, 1 open; 1 experiment" in lines[-1].replace(" rows,", ",")


def test_a_fault_beside_a_placeholder_fails_the_spec(toy, project, monkeypatch, capsys):
    to_be_filled_in(project, toy)
    fault = findings.Finding("unsourced", "spec.yaml: claim constant: where", "'page'", "the page of the paper")
    real = check.check_project
    monkeypatch.setattr(check, "check_project", lambda *_: replace(real(*_), findings=[*real(*_).findings, fault]))
    rows = only_fails(capsys, "spec", None, "unsourced: spec.yaml: claim constant: where: found 'page'")
    assert "more" not in text_of(rows, "spec")
    assert {row["status"] for row in rows if row["check"] == "placeholders"} == {"open"}


def test_a_placeholder_where_a_number_belongs_fails_the_spec(toy, project, capsys):
    claim = SPEC["claims"][0] | {"reported": "FILL IN: the value"}
    write_yaml(project / "spec.yaml", SPEC | {"claims": [claim]})
    code, rows = preflown(capsys)
    assert code == 1 and ("spec", None) in failed(rows) and "claims.0.reported" in text_of(rows, "spec")


def git(root, *arguments):
    settings = ("user.name=t", "user.email=t@example.org", "commit.gpgsign=false")
    command = ["git", "-C", str(root), *(word for one in settings for word in ("-c", one)), *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_changes_that_are_not_committed_are_named(toy, project, capsys):
    git(project, "init")
    git(project, "add", ".")
    git(project, "commit", "-m", "all")
    silent(capsys)
    (project / "spec.yaml").write_text((project / "spec.yaml").read_text() + "# later\n")
    only_fails(capsys, "commit", None, "that are not committed")


def test_a_seed_that_is_planned_twice_is_named(toy, project, capsys):
    write_yaml(project / "spec.yaml", SPEC | {"seeds": [0, 1, 1]})
    only_fails(capsys, "seeds", None, "found 1 more than once")


# --- how it is told


def test_the_page_fits_a_terminal_and_says_what_to_do(toy, monkeypatch, capsys):
    parameter_that_is_not_used(monkeypatch)
    assert main(["preflight"]) == 1
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[1 : 1 + len(CHECKS)] if line.strip()]
    at = lines.index("FAIL  gradients (toy; phase line): no gradient reaches spare")
    assert lines[at + 1] == f"      fix: {CHECKS['gradients'].fix}"
    assert any(line.startswith("n/a   memory (toy): no device was named") for line in lines)
    assert lines[-1].split(", ")[1].startswith("1 failed; 1 experiment")


def test_what_a_method_prints_is_no_data(toy, monkeypatch, capsys):
    real = Line.loss
    monkeypatch.setattr(Line, "loss", lambda self, *rest: (print("step"), real(self, *rest))[1])
    assert main(["preflight", "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_nothing_is_written(toy, project, capsys):
    before = sorted(project.rglob("*"))
    silent(capsys)
    assert sorted(project.rglob("*")) == before


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def live(name):
    findings = Findings(name)
    findings.passed("training")
    return findings.rows


def test_a_process_that_is_killed_costs_its_own_rows_only():
    tasks = [Task("one", "training", die), Task("two", "training", partial(live, "two"))]
    rows = {row.experiment: row for row in _in_processes(tasks, jobs=1)}
    assert rows["one"].text == "its process was killed: out of memory, or a crash in a library"
    assert (rows["one"].status, rows["two"].status) == ("fail", "pass")


def test_two_experiments_run_in_processes_and_a_fault_of_one_is_its_own(toy, project, monkeypatch, capsys):
    write_yaml(project / "configs" / "other.yaml", CONFIG | {"experiment": "other"})
    monkeypatch.setattr(preflight, "_in_processes", lambda tasks, jobs: preflight._here(tasks))
    _, rows = preflown(capsys)
    assert {row["experiment"] for row in rows if row["status"] == "fail"} == {"other"}
    assert "expected one that" in text_of(rows, "configuration")
