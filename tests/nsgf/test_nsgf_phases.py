from pathlib import Path

import pytest
import torch
from torch import nn

from nsgf import data, phases
from nsgf.config import Config
from nsgf.flow import euler_flow
from nsgf.networks import TimeMLP, TimePredictorMLP
from nsgf.phases import interpolate, make_phases, make_velocity, optimal_assignment
from repro.config import load
from repro.method import find_project
from repro.randomness import generator

CPU = torch.device("cpu")
EXPERIMENTS = find_project(Path(__file__).parent).experiments()


@pytest.fixture
def config():
    return load(
        Config,
        EXPERIMENTS["2d-moons"],
        ["phases.*.pool.batches=2", "phases.*.pool.batch_size=16", "phases.*.batch_size=32"],
    )[0]


@pytest.fixture
def by_name(config):
    return {phase.name: phase for phase in make_phases(config, CPU)}


class Recorder(nn.Module):
    """Stands in for a network: answers zero and keeps what it was asked."""

    def forward(self, x, t=None):
        self.x, self.t = x, t
        return torch.zeros(len(x)) if t is None else torch.zeros_like(x)


def test_the_phases_come_in_the_order_of_the_paper(by_name):
    assert list(by_name)[:3] == ["velocity_field", "straight_flow", "time_predictor"]


def test_the_networks_have_the_size_of_the_paper(by_name):
    """3 -> 256 -> 256 -> 256 -> 2 has 133,122 parameters; the predictor 2 -> ... -> 1 has 132,609."""
    counts = {name: sum(p.numel() for p in phase.make_model().parameters()) for name, phase in by_name.items()}
    assert counts == {
        "velocity_field": 133_122,
        "straight_flow": 133_122,
        "time_predictor": 132_609,
        "velocity_field_100": 133_122,
        "ot_cfm": 133_122,
    }


def test_the_optimiser_is_adam_without_weight_decay(by_name):
    for phase in by_name.values():
        optimiser = phase.make_optimiser(phase.make_model())
        assert type(optimiser) is torch.optim.Adam
        assert optimiser.defaults["betas"] == (0.9, 0.999) and optimiser.defaults["weight_decay"] == 0


def test_the_pool_holds_every_state_of_every_trajectory_with_its_own_velocity(config, by_name):
    """Recomputed from the same draws: states before the step, velocities there, times k / T (Algorithm 1)."""
    phase = by_name["velocity_field"]
    pool = phase.build_pool(seed=5)
    flow, size = config.phases.velocity_field.flow, config.phases.velocity_field.pool
    assert len(pool) == size.batches * size.batch_size * flow.steps
    expected = []
    for batch in range(size.batches):
        x_0, y = phase.draw(size.batch_size, generator(5, "velocity_field", "pool", batch))
        expected += euler_flow(x_0, y, make_velocity(config.sinkhorn), steps=flow.steps, step_size=flow.step_size)
    assert torch.equal(pool.columns["x_t"], torch.cat([state.x_t for state in expected]))
    assert torch.equal(pool.columns["v_t"], torch.cat([state.v_t for state in expected]))
    assert pool.columns["t"].unique().tolist() == pytest.approx([k / flow.steps for k in range(flow.steps)])


def test_every_minibatch_of_the_pool_has_points_of_its_own(by_name):
    x = by_name["velocity_field"].build_pool(seed=5).columns["x_t"]
    first, second = x[:16], x[160:176]
    assert not torch.isin(first, second).any()


def test_phase_1_regresses_the_stored_velocity(by_name, tmp_path):
    phase = by_name["velocity_field"]
    phase.prepare(5, tmp_path, {})
    network = Recorder()
    loss = phase.loss(network, torch.Generator().manual_seed(0))
    batch = phase.pool.sample(32, torch.Generator().manual_seed(0))
    assert torch.equal(network.x, batch["x_t"]) and torch.equal(network.t, batch["t"])
    assert float(loss) == pytest.approx(float(batch["v_t"].square().mean()))


def test_a_pool_that_was_built_is_not_built_again(by_name, tmp_path, monkeypatch):
    phase = by_name["velocity_field"]
    phase.prepare(5, tmp_path, {})
    before = phase.pool
    monkeypatch.setattr(type(phase), "build_pool", None)
    phase.prepare(5, tmp_path, {})
    assert torch.equal(phase.pool.columns["v_t"], before.columns["v_t"])


@pytest.mark.parametrize("name", ["straight_flow", "time_predictor"])
def test_phases_2_and_3_see_independent_pairs_never_phase_1(by_name, name, monkeypatch):
    """Their inputs are t Y + (1 - t) X_0 of fresh source and target points, recomputed here from the same generator."""
    phase, network = by_name[name], Recorder()
    loss = phase.loss(network, torch.Generator().manual_seed(3))
    same = torch.Generator().manual_seed(3)
    x_0, y = data.sample("gaussian", 32, same), data.sample("moons", 32, same)
    t = torch.rand(32, generator=same)
    assert torch.equal(network.x, t[:, None] * y + (1 - t[:, None]) * x_0)
    target = y - x_0 if name == "straight_flow" else t
    assert float(loss) == pytest.approx(float(target.square().mean()))
    assert name == "time_predictor" or torch.equal(network.t, t)


def test_interpolation_starts_at_the_source_and_ends_at_the_target():
    x_0, y = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(interpolate(x_0, y, torch.zeros(3)), x_0) and torch.equal(interpolate(x_0, y, torch.ones(3)), y)


def test_the_optimal_assignment_undoes_a_permutation():
    """Moved by little, the points of a grid are each other's optimal partners."""
    x_0 = 10 * torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    y = (x_0 + torch.randn(16, 2, generator=torch.Generator().manual_seed(1)))[order]
    assert torch.equal(y[optimal_assignment(x_0, y)], y[order.argsort()])


def test_ot_cfm_uses_every_target_once_in_its_matched_place(by_name):
    network = Recorder()
    by_name["ot_cfm"].loss(network, torch.Generator().manual_seed(3))
    same = torch.Generator().manual_seed(3)
    x_0, y = data.sample("gaussian", 32, same), data.sample("moons", 32, same)
    matched = y[optimal_assignment(x_0, y)]
    assert sorted(matched.tolist()) == sorted(y.tolist())
    assert torch.equal(network.x, interpolate(x_0, matched, network.t))


@pytest.mark.parametrize("implementation", ["closed_form", "geomloss_tensorized"])
def test_both_implementations_of_the_velocity_agree(config, implementation):
    """In float32 the two orders of summation differ in the fifth digit."""
    x, y = (
        torch.randn(32, 2, generator=torch.Generator().manual_seed(0)),
        torch.randn(32, 2, generator=torch.Generator().manual_seed(1)),
    )
    expected = make_velocity(config.sinkhorn)(x, y)
    found = make_velocity(config.sinkhorn.model_copy(update={"implementation": implementation}))(x, y)
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_configuration_makes_its_phases(name):
    config, _ = load(Config, EXPERIMENTS[name])
    assert config.experiment == name
    assert [phase.iterations for phase in make_phases(config, CPU)] == [20_000] * 5


def test_a_velocity_field_refuses_images_and_times_of_another_shape():
    network = TimeMLP(2, 8, 1, "selu")
    with pytest.raises(ValueError, match=r"found x \(4, 1, 2, 2\) and t \(4,\), expected \(n, 2\) and \(n,\)"):
        network(torch.zeros(4, 1, 2, 2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"and t \(4, 1\)"):
        network(torch.zeros(4, 2), torch.zeros(4, 1))


def test_a_predicted_time_lies_between_zero_and_one():
    times = TimePredictorMLP(2, 8, 1, "selu")(100 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))
    assert times.shape == (50,) and (times >= 0).all() and (times <= 1).all()


def test_time_is_an_input_of_the_velocity_field():
    network = TimeMLP(2, 8, 1, "selu")
    x = torch.zeros(2, 2)
    assert not torch.equal(network(x, torch.zeros(2)), network(x, torch.ones(2)))


def test_phase_modules_share_no_state():
    assert not [
        name
        for name, value in vars(phases).items()
        if isinstance(value, (dict, list, set)) and not name.startswith("__")
    ]
