"""The committed measurements of step times hold what the page says, and the phases here can still be costed."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step_time
from repro.config import load
from repro.method import find_project
from repro.runtime import Runtime
from repro_tools.memory.devices import find
from repro_tools.memory.duration import cost_of_evaluation, cost_of_phase, time_of
from repro_tools.memory.roofline import predict

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured():
    return json.loads((step_time.RESULTS / "step_time.json").read_text())


def test_the_page_shows_the_committed_measurements():
    text = step_time.PAGE.read_text()
    assert step_time.page_with_tables(text) == text


def test_every_model_was_measured(measured):
    assert list(measured["cases"]) == list(step_time.CASES)


def test_held_out_models_are_those_that_were_never_looked_at(measured):
    held_out = {name for name, row in measured["cases"].items() if row["held_out"]}
    assert held_out == set(step_time.CASES) - {*step_time.DEVELOPED_ON, *step_time.MENDED}
    assert len(held_out) >= 8


def test_held_out_models_are_within_a_factor_of_1_5(measured):
    ratios = {name: row["ratio"] for name, row in measured["cases"].items() if row["held_out"]}
    assert all(1 / 1.5 <= ratio <= 1.5 for ratio in ratios.values()), ratios


def test_what_is_outside_the_range_is_what_the_page_explains(measured):
    outside = [
        name
        for name, row in measured["cases"].items()
        if not row["predicted_ms"][0] <= row["measured_ms"] <= row["predicted_ms"][2]
    ]
    assert outside == ["Sinkhorn, images"]
    assert "**Sinkhorn, images.**" in step_time.PAGE.read_text()


@pytest.mark.parametrize("name", ["2d straight flow", "digits UNet", "ResNet", "causal transformer", "GAN"])
def test_the_committed_arithmetic_is_what_is_counted_now(measured, name):
    found, row = step_time.recorded(step_time.CASES[name]), measured["cases"][name]
    assert round(found.flops / 1e9, 3) == row["gflop"]
    assert round(found.bytes / 1e6, 1) == row["mb"]


def test_published_times_are_predicted_as_committed():
    committed = json.loads((step_time.RESULTS / "step_time_published.json").read_text())["rows"]
    assert [row["name"] for row in committed] == [one[0] for one in step_time.PUBLISHED]
    one = next(index for index, row in enumerate(committed) if row["batch"] == 1)
    name, device, precision, batch, seconds, make, source = step_time.PUBLISHED[one]
    with step_time.fake_tensors():
        step = make()
        step()
        cost = step_time.step_cost(step)
    found = predict(cost, find(device), precision)
    assert [round(1e3 * value, 2) for value in (found.low, found.likely, found.high)] == committed[one]["predicted_ms"]


def planned(experiment, *overrides):
    project = find_project(ROOT)
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], list(overrides))
    return project, config, lambda: list(project.method.phases(config, Runtime(CPU)))


@pytest.mark.parametrize("experiment", ["2d-moons", "digits"])
def test_every_phase_and_the_evaluation_have_a_time(experiment):
    project, config, phases = planned(experiment)
    t4 = find("T4")
    for index, phase in enumerate(phases()):
        found = cost_of_phase(phase, phases()[:index], config)
        assert found.parts[0].times == phase.iterations
        assert found.parts[0].cost.unknown == ()
        assert time_of(found, t4, config.pace.checkpoint_every).hours.likely > 0
        weights = 4 * sum(weight.numel() for weight in phase.make_model().parameters())
        assert found.state_bytes == pytest.approx(3 * weights, rel=0.01)  # the weights, and Adam's two moments
    assert time_of(cost_of_evaluation(project.method, config, phases(), Runtime(CPU)), t4, None).hours.likely > 0


def test_a_pool_is_part_of_the_hours():
    _, config, phases = planned("2d-moons")
    (pool,) = cost_of_phase(phases()[0], [], config).parts[1:]
    assert pool.times == config.phases.velocity_field.pool.batches * config.phases.velocity_field.flow.steps


def test_a_larger_minibatch_costs_in_proportion():
    steps = []
    for size in (64, 128):
        _, config, phases = planned("digits", f"phases.*.batch_size={size}")
        steps.append(cost_of_phase(phases()[1], phases()[:1], config).parts[0].cost.flops)
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.01)
