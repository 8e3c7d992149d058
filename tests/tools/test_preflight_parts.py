"""The row `parts` of `repro preflight`: what cannot be divided fails where somebody asked for it, and no sound method does."""

import copy
import json
from importlib import import_module

import pytest
import torch
from methods import language_model
from torch import nn
from toy_method import Constant, Line
from toy_project import CONFIG, write_yaml

from repro.runtime import Runtime
from repro_tools.cli import main
from repro_tools.minibatch import draw, first_round
from repro_tools.preflight.checks import CHECKS, Findings
from repro_tools.preflight.parts import look_at_parts

METHODS = ["wgan_gp", "ppo", "maml", "sam", "lbfgs", "em", "bank", "language_model"]


def row_of(capsys, phase, *arguments):
    code = main(["preflight", "--json", *arguments])
    rows = json.loads(capsys.readouterr().out)["rows"]
    (found,) = (row for row in rows if row["check"] == "parts" and row["phase"] == phase)
    others = [row for row in rows if row["status"] == "fail" and row["check"] not in ("spec", "parts")]
    assert others == []
    return code, found


@pytest.fixture(autouse=True)
def a_spec_without_faults(monkeypatch):
    class Checked:
        findings: list = []

    monkeypatch.setattr("repro_tools.check.command.check_project", lambda *_: Checked)


def batch_norm(monkeypatch):
    monkeypatch.setattr(
        Line, "make_model", lambda self: nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    )


def contrastive(monkeypatch):
    """Each row against the others of its part."""

    def loss(self, model, batch):
        one, other = model(batch["x"]), model(batch["x"] + batch["y"])
        return nn.functional.cross_entropy(one @ other.T, torch.arange(len(one)))

    monkeypatch.setattr(Line, "loss", loss)


def padding_without_a_weight(monkeypatch):
    """A mean over the places that are real, of which parts have different numbers."""

    def loss(self, model, batch):
        real = torch.arange(len(batch["x"]))[:, None] % 3 < 1 + (batch["x"] > 0).long()
        return (model(batch["x"]) - batch["y"]).square()[real & (batch["x"] > -1)].mean()

    monkeypatch.setattr(Line, "loss", loss)


COUPLED = "the loss couples rows, is a mean over another count than rows"
PLANTED = [
    (batch_norm, "its batch norm takes the statistics of a part"),
    (contrastive, COUPLED),
    (padding_without_a_weight, COUPLED),
]


@pytest.mark.parametrize(("plant", "why"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
@pytest.mark.parametrize("asked", [["--micro-batches", "2"], ["--micro-batches", "line=3"]])
def test_what_cannot_be_divided_fails_where_it_was_asked_for(project, monkeypatch, capsys, plant, why, asked):
    plant(monkeypatch)
    code, row = row_of(capsys, "line", *asked)
    assert (code, row["status"], row["fix"]) == (1, "fail", CHECKS["parts"].fix)
    assert row["text"].startswith("found that of ") and why in row["text"]
    assert row["text"].endswith(f"expected the gradient of the whole in {asked[-1][-1]} parts")


@pytest.mark.parametrize(("plant", "why"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
@pytest.mark.parametrize("asked", [[], ["--micro-batches", "constant=2"], ["--micro-batches", "line=1"]])
def test_what_cannot_be_divided_is_no_fault_where_nobody_asked(project, monkeypatch, capsys, plant, why, asked):
    plant(monkeypatch)
    code, row = row_of(capsys, "line", *asked)
    assert (code, row["status"]) == (0, "not applicable")
    assert why in row["text"]
    expected = "it runs in one process and one part, a run by torchrun or with --micro-batches is refused"
    assert row["text"].endswith(expected)


def sound(monkeypatch):
    pass


def layer_norm(monkeypatch):
    monkeypatch.setattr(
        Line, "make_model", lambda self: nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    )


def dropout(monkeypatch):
    monkeypatch.setattr(
        Line, "make_model", lambda self: nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    )


def batch_norm_at_rest(monkeypatch):
    batch_norm(monkeypatch)
    real = Line.loss

    def loss(self, model, batch):
        model[1].eval()
        return real(self, model, batch)

    monkeypatch.setattr(Line, "loss", loss)


@pytest.mark.parametrize("variant", [sound, layer_norm, dropout, batch_norm_at_rest])
@pytest.mark.parametrize("asked", [[], ["--micro-batches", "3"]])
def test_what_can_be_divided_passes(project, monkeypatch, capsys, variant, asked):
    variant(monkeypatch)
    code, row = row_of(capsys, "line", *asked)
    assert (code, row["status"]) == (0, "pass")
    assert row["text"].startswith(f"{3 if asked else 2} parts: the same gradient")


def test_what_draws_in_its_step_is_told_to_be_equal_in_distribution_only(project, capsys):
    """The toy's line has dropout, its constant draws nothing."""
    told = "; the step draws at random, so parts give the same in distribution only"
    assert row_of(capsys, "line")[1]["text"] == f"2 parts: the same gradient{told}"
    assert row_of(capsys, "constant")[1]["text"] == "2 parts: the same gradient"


def test_what_the_paper_means_per_part_is_not_tried(project, monkeypatch, capsys):
    batch_norm(monkeypatch)
    monkeypatch.setattr(Line, "parts_define", "the statistics of batch norm, as in section 3")
    code, row = row_of(capsys, "line", "--micro-batches", "2")
    assert (code, row["status"]) == (0, "pass")
    assert row["text"].startswith(
        "not tried: the paper means the statistics of batch norm, as in section 3 within each"
    )


def draws_in_an_order_of_its_own(monkeypatch):
    def loss(self, model, batch):
        order = torch.randperm(len(batch["x"]))
        return (model(batch["x"] + batch["x"][order]) - batch["y"]).square().mean()

    monkeypatch.setattr(Line, "loss", loss)


def test_what_cannot_be_decided_is_not_measured_where_somebody_asked(project, monkeypatch, capsys):
    draws_in_an_order_of_its_own(monkeypatch)
    code, row = row_of(capsys, "line", "--micro-batches", "2")
    assert (code, row["status"]) == (3, "not measured") and "the step draws by aten::randperm" in row["text"]
    code, row = row_of(capsys, "line")
    assert (code, row["status"]) == (0, "not applicable")
    assert "is not known to give the same" in row["text"]


def test_a_minibatch_of_one_row_is_not_divided(project, monkeypatch, capsys):
    config = copy.deepcopy(CONFIG)
    config["phases"]["constant"]["batch_size"] = 1
    write_yaml(project / "configs" / "toy.yaml", config)
    code, row = row_of(capsys, "constant")
    assert (code, row["status"], row["text"]) == (0, "not applicable", "its minibatch at tiny size has 1 row")


def test_a_phase_that_does_not_train_is_not_divided(project, monkeypatch, capsys):
    def loss(self, model, batch):
        raise ValueError("no")

    monkeypatch.setattr(Constant, "loss", loss)
    main(["preflight", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    (row,) = (row for row in rows if row["check"] == "parts" and row["phase"] == "constant")
    assert (row["status"], row["text"]) == ("not applicable", "it does not train")


def test_a_phase_that_no_experiment_has_is_refused_in_one_line(project, capsys):
    assert main(["preflight", "--micro-batches", "circle=2"]) == 2
    told = "--micro-batches: found the phase 'circle', expected one of: constant, line"
    assert told in capsys.readouterr().err


def status_of(phase, asked=None):
    findings, runtime = Findings("methods"), Runtime(torch.device("cpu"))
    of_round = first_round(phase, 0, runtime, {})
    look_at_parts(phase, {0: draw(phase, 0, 0, of_round)}, 0, runtime, {}, asked or {}, findings)
    (row,) = findings.rows
    return row.status


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("asked", [{}, {"*": 2}, {"*": 4}], ids=["by itself", "2", "4"])
def test_every_method_with_a_loop_of_its_own_passes(name, asked, tmp_path):
    phase = import_module(f"methods.{name}").make_phase()
    phase.prepare(0, tmp_path, {})
    assert status_of(phase, asked) == "pass"


def test_sequences_that_every_part_weighs_by_its_rows_are_refused(monkeypatch, tmp_path):
    """The language model of the tests weighs its parts by their tokens. Without that it is a mean over another count."""
    phase = language_model.make_phase()
    phase.prepare(0, tmp_path, {})

    def without_weight(self, loss, *, weight=None, **named):
        return backward(self, loss, **named)

    from repro.update import Update

    backward = Update.backward
    monkeypatch.setattr(Update, "backward", without_weight)
    assert status_of(phase, {"*": 4}) == "fail"
