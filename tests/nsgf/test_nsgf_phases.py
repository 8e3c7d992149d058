import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nsgf import data, images, phases
from nsgf.flow import euler_flow
from nsgf.networks import TimeMLP, TimePredictorMLP
from nsgf.phases import PRECISIONS, interpolate, make_phases, make_velocity, optimal_assignment
from repro import rounds
from repro.config import load
from repro.errors import BadInput
from repro.loop import Loop
from repro.method import find_project
from repro.phases import PLAIN
from repro.randomness import generator
from repro.runtime import Runtime
from repro_tools.minibatch import draw, first_round

CPU = Runtime(torch.device("cpu"))
PROJECT = find_project(Path(__file__).parent)
EXPERIMENTS = PROJECT.experiments()
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def configured(experiment, *overrides):
    return load(PROJECT.config_class(experiment), EXPERIMENTS[experiment], list(overrides))[0]


@pytest.fixture
def config():
    return configured("2d-moons", "phases.*.pool.batches=2", "phases.*.pool.batch_size=16", "phases.*.batch_size=32")


@pytest.fixture
def by_name(config):
    return {phase.name: phase for phase in make_phases(config, CPU)}


def image_phases(experiment, *overrides, runtime=CPU):
    """The phases of an image experiment with a pool of two minibatches of 8, and minibatches of 6."""
    tiny = ["phases.*.pool.batches=2", "phases.*.pool.batch_size=8", "phases.*.batch_size=6"]
    return {phase.name: phase for phase in make_phases(configured(experiment, *tiny, *overrides), runtime)}


def digits(*overrides, runtime=CPU):
    return image_phases("digits", *overrides, runtime=runtime)


def pool_of(phase, seed=5, runtime=CPU):
    """The columns of the first part of a phase's pool."""
    phase.prepare(seed, Path(), {})
    return dict(first_round(phase, seed, runtime, {}))


def draws(seed=3):
    return torch.Generator().manual_seed(seed)


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
    pool = pool_of(phase)
    flow, size = config.phases.velocity_field.flow, config.phases.velocity_field.pool
    assert len(pool["t"]) == size.batches * size.batch_size * flow.steps
    expected = []
    for batch in range(size.batches):
        x_0, y = phase.laws.draw(size.batch_size, generator(5, "velocity_field", "pool", batch))
        expected += euler_flow(x_0, y, make_velocity(config.sinkhorn), steps=flow.steps, step_size=flow.step_size)
    assert torch.equal(pool["x_t"], torch.cat([state.x_t for state in expected]))
    assert torch.equal(pool["v_t"], torch.cat([state.v_t for state in expected]))
    assert pool["t"].unique().tolist() == pytest.approx([k / flow.steps for k in range(flow.steps)])


def test_every_minibatch_of_the_pool_has_points_of_its_own(by_name):
    x = pool_of(by_name["velocity_field"])["x_t"]
    first, second = x[:16], x[160:176]
    assert not torch.isin(first, second).any()


def test_phase_1_regresses_the_stored_velocity(by_name):
    phase, network = by_name["velocity_field"], Recorder()
    pool = pool_of(phase)
    batch = draw(phase, 0, 5, pool)
    loss = phase.loss(network, batch)
    assert torch.equal(network.x, batch["x_t"]) and torch.equal(network.t, batch["t"])
    assert float(loss) == pytest.approx(float(batch["v_t"].square().mean()))
    row = (pool["x_t"] == batch["x_t"][0]).all(1).nonzero().item()
    assert torch.equal(pool["v_t"][row], batch["v_t"][0]) and pool["t"][row] == batch["t"][0]


def test_a_minibatch_is_drawn_with_replacement_from_the_whole_pool(by_name):
    phase = by_name["velocity_field"]
    pool = pool_of(phase)
    pool["t"] = torch.arange(float(len(pool["t"])))
    rows = torch.cat([draw(phase, step, 5, pool)["t"] for step in range(200)]).long()
    counts = rows.bincount(minlength=len(pool["t"]))
    assert counts.max() < 50 and counts.min() > 0  # 20 each on average


@pytest.mark.parametrize("name", ["straight_flow", "time_predictor"])
def test_phases_2_and_3_see_independent_pairs_never_phase_1(by_name, name, monkeypatch):
    """Their inputs are t Y + (1 - t) X_0 of fresh source and target points, recomputed here from the same generator."""
    phase, network = by_name[name], Recorder()
    loss = phase.loss(network, phase.minibatch(0, draws(3)))
    same = draws(3)
    x_0, y = data.sample("gaussian", 32, same), data.sample("moons", 32, same)
    t = torch.rand(32, generator=same)
    assert torch.equal(network.x, t[:, None] * y + (1 - t[:, None]) * x_0)
    target = y - x_0 if name == "straight_flow" else t
    assert float(loss) == pytest.approx(float(target.square().mean()))
    assert name == "time_predictor" or torch.equal(network.t, t)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 32, 32)])
def test_interpolation_starts_at_the_source_and_ends_at_the_target(shape):
    x_0, y = torch.randn(2, 3, *shape, generator=draws())
    assert torch.equal(interpolate(x_0, y, torch.zeros(3)), x_0) and torch.equal(interpolate(x_0, y, torch.ones(3)), y)


def test_the_optimal_assignment_undoes_a_permutation():
    """Moved by little, the points of a grid are each other's optimal partners."""
    x_0 = 10 * torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    y = (x_0 + torch.randn(16, 2, generator=torch.Generator().manual_seed(1)))[order]
    assert torch.equal(y[optimal_assignment(x_0, y)], y[order.argsort()])


def test_ot_cfm_uses_every_target_once_in_its_matched_place(by_name):
    network = Recorder()
    phase = by_name["ot_cfm"]
    phase.loss(network, phase.minibatch(0, draws(3)))
    same = draws(3)
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
    config = configured(name)
    made = {phase.name: phase.iterations for phase in make_phases(config, CPU)}
    assert config.experiment == name
    assert made == {phase: settings.iterations for phase, settings in config.phases}
    assert not name.startswith("2d-") or set(made.values()) == {20_000}


# Image experiments


@pytest.mark.parametrize(
    ("experiment", "field", "predictor", "steps"),
    [("mnist", 1_075_361, 388_097, 100_000), ("cifar10", 35_746_307, 389_441, 200_000)],
)
def test_the_image_networks_have_the_size_and_the_steps_of_the_paper(experiment, field, predictor, steps):
    made = make_phases(configured(experiment), CPU)[:3]
    with torch.device("meta"):
        counts = [sum(p.numel() for p in phase.make_model().parameters()) for phase in made]
    assert counts == [field, field, predictor]
    assert [phase.iterations for phase in made] == [steps, steps, 40_000]


def test_every_image_phase_has_the_options_of_its_own_section_and_points_have_none(by_name):
    made = digits("phases.*.clip_norm=7.0", "phases.time_predictor.warmup_steps=5")
    assert {name: (phase.options.clip_norm, phase.options.warmup_steps) for name, phase in made.items()} == {
        name: (7.0, 5 if name == "time_predictor" else 0) for name in made
    }
    assert {phase.options for phase in by_name.values()} == {PLAIN}


@pytest.mark.parametrize("experiment", SHAPES)
@pytest.mark.parametrize("name", ["velocity_field", "straight_flow", "time_predictor"])
def test_the_networks_are_given_images_and_one_time_for_each(image_sets, tmp_path, experiment, name):
    runtime = replace(CPU, data_root=image_sets)
    phase, network = image_phases(experiment, runtime=runtime)[name], Recorder()
    phase.prepare(5, tmp_path, {})
    batch = draw(phase, 0, 5, first_round(phase, 5, runtime, {}))
    loss = phase.loss(network, batch)
    assert loss.shape == () and network.x.shape == (6, *SHAPES[experiment])
    assert {len(column) for column in batch.values()} == {6}, "one row per example"
    if name == "time_predictor":
        assert network.t is None
    else:
        assert network.t.shape == (6,) and network.t.unique().numel() > 1


@pytest.mark.parametrize("experiment", SHAPES)
def test_images_are_transported_as_points_and_pooled_as_images(image_sets, experiment):
    """The pool holds the flow of the flattened minibatch, state after state, in the shape of the images."""
    runtime = replace(CPU, data_root=image_sets)
    phase = image_phases(experiment, runtime=runtime)["velocity_field"]
    pool, flow, shape = pool_of(phase, runtime=runtime), phase.config.flow, SHAPES[experiment]
    expected = []
    for batch in range(2):
        x_0, y = phase.laws.draw(8, generator(5, "velocity_field", "pool", batch))
        assert x_0.shape == y.shape == (8, *shape)
        states = euler_flow(x_0.flatten(1), y.flatten(1), phase.velocity, steps=flow.steps, step_size=flow.step_size)
        expected += list(states)
    assert pool["x_t"].shape == (2 * 8 * flow.steps, *shape)
    for name in ("x_t", "v_t"):
        states = torch.cat([getattr(state, name) for state in expected])
        assert torch.equal(pool[name], states.unflatten(1, shape))
    assert pool["t"].tolist() == pytest.approx([state.t for state in expected for _ in range(8)])


@pytest.mark.parametrize("name", ["straight_flow", "time_predictor"])
def test_image_phases_2_and_3_see_independent_pairs(name):
    """Inputs t Y + (1 - t) X_0 of fresh noise and images, one time for all pixels of an image."""
    phase, network = digits()[name], Recorder()
    loss = phase.loss(network, phase.minibatch(0, draws()))
    same = draws()
    x_0, y = phase.laws.draw(6, same)
    t = torch.rand(6, generator=same)
    mixed = torch.stack([t_i * y_i + (1 - t_i) * x_i for x_i, y_i, t_i in zip(x_0, y, t, strict=True)])
    assert torch.equal(network.x, mixed)
    target = y - x_0 if name == "straight_flow" else t
    assert float(loss) == pytest.approx(float(target.square().mean()))


def test_ot_coupling_matches_whole_images():
    phase = digits("phases.straight_flow.coupling=optimal_transport")["straight_flow"]
    batch = phase.minibatch(0, draws())
    x_0, y = phase.laws.draw(6, draws())
    matched = y[optimal_assignment(x_0.flatten(1), y.flatten(1))]
    assert torch.equal(batch["x_0"], x_0) and torch.equal(batch["y"], matched)
    assert not torch.equal(matched, y)
    cost = lambda y: float((x_0 - y).square().sum())  # noqa: E731
    assert cost(matched) < cost(y)


def test_the_classifier_is_given_the_label_of_each_image():
    """A model that knows the training images by heart has no loss; labels in another order give it one."""
    phase = digits("phases.feature_classifier.batch_size=64")["feature_classifier"]
    batch = phase.minibatch(0, draws())
    stored = images.load("digits", "train", CPU.data_root)
    known = {image.numpy().tobytes(): int(label) for image, label in zip(stored.images(), stored.labels, strict=True)}

    def by_heart(x):
        labels = torch.tensor([known[image.numpy().tobytes()] for image in x])
        return 100 * nn.functional.one_hot(labels, 10).float()

    assert float(phase.loss(by_heart, batch)) == 0
    assert float(phase.loss(by_heart, {**batch, "label": batch["label"].roll(1)})) > 10


def test_images_that_are_not_there_are_refused_by_every_phase(tmp_path):
    for phase in image_phases("mnist", runtime=replace(CPU, data_root=tmp_path)).values():
        with pytest.raises(BadInput, match=r"^--data-root: found no .*MNIST.*, expected the data set mnist there$"):
            phase.check(tmp_path / "run")


def test_released_images_are_read_again_when_they_are_drawn_again():
    phase = digits()["straight_flow"]
    first = phase.minibatch(0, draws())
    phase.release()
    assert phase.laws._stored is None
    assert torch.equal(phase.minibatch(0, draws())["y"], first["y"])


# Pools of images


def test_a_pool_of_half_precision_is_the_rounded_one():
    of = {precision: digits(f"phases.*.pool.precision={precision}")["velocity_field"] for precision in PRECISIONS}
    whole, half = (pool_of(phase) for phase in of.values())
    assert of["float32"].storage()["pool"] == 2 * of["float16"].storage()["pool"]
    for name, column in whole.items():
        assert half[name].dtype == torch.float16
        assert torch.equal(half[name], column.half())
    assert {column.dtype for column in draw(of["float16"], 0, 5, half).values()} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bytes_that_are_announced_are_those_of_the_pool(precision):
    phase = digits(f"phases.*.pool.precision={precision}")["velocity_field"]
    assert phase.storage() == {"pool": sum(column.nbytes for column in pool_of(phase).values())}


def in_parts(batches, resident, iterations):
    return digits(
        f"phases.*.pool.batches={batches}",
        f"phases.*.pool.resident_batches={resident}",
        f"phases.velocity_field.iterations={iterations}",
        "phases.*.pool.batch_size=3",
        "phases.*.flow.steps=2",
        "sinkhorn.scaling=0.5",
    )["velocity_field"]


def held(phase):
    """The numbers of the minibatches in the pool at each step of the phase."""
    loop = Loop(phase, seed=5, runtime=CPU, earlier={})
    loop.prepare(Path())
    made = [torch.cat([rows["x_t"] for rows in phase.trajectory(batch)]) for batch in range(phase.config.pool.batches)]
    found = []
    for step in range(phase.steps):
        loop.step = step
        loop.collect_if_due()
        parts = loop.round.rows["x_t"].split(phase.entries_of_batch)
        found.append([next(number for number, rows in enumerate(made) if torch.equal(rows, part)) for part in parts])
    return found


@pytest.mark.parametrize(
    ("batches", "resident", "expected"),
    [
        (4, 2, 3 * [[0, 1]] + 2 * [[2, 3]]),
        (5, 1, [[0], [1], [2], [3], [4]]),
        (3, 3, 5 * [[0, 1, 2]]),
        (6, 2, 2 * [[0, 1]] + 2 * [[2, 3]] + [[4, 5]]),
        (9, 2, [[0, 1], [2, 3], [4, 5], [6, 7], [8]]),
    ],
)
def test_a_pool_with_resident_batches_comes_in_parts_each_for_as_many_steps(batches, resident, expected):
    assert held(in_parts(batches, resident, iterations=5)) == expected


def test_a_phase_of_one_step_has_the_first_minibatches():
    assert held(in_parts(4, 2, iterations=1)) == [[0, 1]]


@pytest.mark.parametrize(
    ("experiment", "overrides", "share", "keys"),
    [
        ("digits", [], 0.9, ["precision", "resident_batches"]),
        ("digits", [], 0.5, ["resident_batches"]),
        ("digits", ["precision=float16"], 0.9, ["resident_batches"]),
        ("digits", ["resident_batches=10"], 0.9, ["precision", "resident_batches"]),
        ("digits", [], 0.01, []),
        ("2d-moons", [], 0.9, ["batches"]),
        ("2d-moons", [], 0.01, []),
    ],
)
def test_a_pool_that_does_not_fit_is_refused_with_overrides_that_fit(
    monkeypatch, tmp_path, experiment, overrides, share, keys
):
    """`share` is that of the disk which the pool would fill."""
    key = "phases.velocity_field.pool"
    given = [f"{key}.{one}" for one in ["batches=40", *overrides]]
    make = lambda *more: make_phases(configured(experiment, *given, *more), CPU)[0]  # noqa: E731
    monkeypatch.setattr(rounds, "room", lambda folder: int(share * make().storage()["pool"]))
    with pytest.raises(BadInput) as refused:
        make().check(tmp_path)
    (line,) = refused.value.problems
    ways = re.findall(r"--set (\S+)", line)
    assert line.startswith(f"{key}: found a pool of 0.0 GiB, expected at most 90% of the free disk, 0.0 GiB")
    assert [way.removeprefix(f"{key}.").partition("=")[0] for way in ways] == keys
    room = rounds.room(tmp_path)
    for way in ways:
        assert 0.2 * room < make(way).storage()["pool"] <= room


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


def test_phase_modules_share_no_state_but_a_table():
    found = {
        name: value
        for name, value in vars(phases).items()
        if isinstance(value, (dict, list, set)) and not name.startswith("__")
    }
    assert found == {"PRECISIONS": {"float32": torch.float32, "float16": torch.float16}}
