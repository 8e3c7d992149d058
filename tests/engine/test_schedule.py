"""Learning rates that fall: the formulas, and that a phase gets them in every step, after a resume as before."""

from __future__ import annotations

import math

import pytest
import torch
from test_step import CPU, Watched, equal, options, train, weights
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR
from toy_project import CONFIG

from repro.errors import RunFailed
from repro.phases import PLAIN, cosine, linear, milestones
from repro.step import Stepper

STEPS = CONFIG["phases"]["line"]["iterations"]
FULL = CONFIG["phases"]["line"]["learning_rate"]
OF_TORCH = {
    "cosine": (lambda step: cosine(step, 20, 0.1), lambda sgd: CosineAnnealingLR(sgd, 20, eta_min=0.1)),
    "linear": (lambda step: linear(step, 20, 0.1), lambda sgd: LinearLR(sgd, 1.0, 0.1, 20)),
    "milestones": (lambda step: milestones(step, (8, 15), 0.1), lambda sgd: MultiStepLR(sgd, (8, 15), 0.1)),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_formula_gives_the_rates_of_torch(name):
    ours, theirs = OF_TORCH[name]
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = theirs(sgd)
    for step in range(20):
        assert math.isclose(sgd.param_groups[0]["lr"], ours(step), rel_tol=1e-9), step
        sgd.step()
        schedule.step()


@pytest.mark.parametrize("formula", [cosine, linear])
def test_before_the_fall_it_is_1_and_after_it_the_least(formula):
    assert [formula(step, 10, 0.2) for step in (-3, 0)] == [1.0, 1.0]
    assert [formula(step, 10, 0.2) for step in (10, 11, 100)] == pytest.approx([0.2] * 3)
    assert 0.2 < formula(9, 10, 0.2) < formula(1, 10, 0.2) < 1


class Falling(Watched):
    def learning_rate_factor(self, step):
        return cosine(step, STEPS)


def test_every_step_has_its_rate_on_top_of_the_warm_up(tmp_path):
    phase = Falling(options(warmup_steps=4))
    train(phase, tmp_path)
    expected = [FULL * min(1, (step + 1) / 4) * cosine(step, STEPS) for step in range(STEPS)]
    assert phase.rates == pytest.approx(expected)


def test_a_resumed_phase_has_the_same_rates_and_ends_in_the_same_bits(tmp_path):
    whole, died, resumed = Falling(PLAIN), Falling(PLAIN, dies_at=7), Falling(PLAIN)
    ends = weights(train(whole, tmp_path / "whole").model)
    with pytest.raises(KeyboardInterrupt):
        train(died, tmp_path / "died")
    assert equal(weights(train(resumed, tmp_path / "died").model), ends)
    assert resumed.rates == whole.rates[5:]


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_what_no_rate_can_have_is_refused(factor):
    model = torch.nn.Linear(1, 1)
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=1.0), PLAIN, CPU, lambda step: factor)
    with pytest.raises(RunFailed, match=r"learning_rate_factor\(3\): found .*, expected a finite number"):
        stepper.step(model(torch.ones(1, 1)).sum(), 3)


def test_every_group_of_parameters_falls_from_its_own_rate():
    model = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD([{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}])
    stepper = Stepper(model, sgd, PLAIN, CPU, lambda step: linear(step, 4))
    for number in (1, 2):
        stepper.step(model(torch.ones(1, 1)).sum(), number)
    assert [group["lr"] for group in sgd.param_groups] == pytest.approx([0.5, 0.05])
