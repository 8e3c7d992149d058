"""m12: a metric whose name is not what it computes.

What the evaluation of a run reports as w2, w2_squared, half_w2_squared and sinkhorn_divergence is that quantity of the very samples which it
keeps, and the floor beside it is the same quantity.
"""

from functools import partial

import pytest
import torch
from geomloss import SamplesLoss
from proof import Proof
from scipy.optimize import linear_sum_assignment

from nsgf import data, evaluate_points, metrics, probes
from nsgf.phases import make_phases
from repro.config import load
from repro.randomness import generator
from repro.runtime import Runtime
from repro_tools.probe import probe

CPU = Runtime(torch.device("cpu"))
SEED = 0
SMALL = [
    "evaluation.test_points=24", "evaluation.floor_draws=1", "evaluation.euler_steps=[10]", "evaluation.sinkhorn_scaling=0.5",
    "phases.*.network.width=8", "phases.*.pool.batch_size=24", "phases.velocity_field_100=null", "phases.ot_cfm=null",
]  # fmt: skip


def configured(project):
    return load(project.config_class("2d-moons"), project.experiments()["2d-moons"], SMALL)[0]


def best_pairing(x, y):
    """W2 squared from its definition: of all pairings, the smallest mean squared distance."""
    cost = (x[:, None].double() - y[None].double()).square().sum(-1).numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


def judged(project):
    """The configuration, the metrics, and the two clouds that each method's metrics are of."""
    config = configured(project)
    torch.manual_seed(SEED)
    models = {phase.name: phase.make_model() for phase in make_phases(config, CPU)}
    with torch.no_grad():
        evaluation = evaluate_points.evaluate(config, models, SEED, CPU)
    prefix = "samples."
    tensors = {name: value for name, value in evaluation.tensors.items() if name.startswith(prefix)}
    clouds = {name.removeprefix(prefix): (x, evaluation.tensors["test"]) for name, x in tensors.items()}
    floor = generator(SEED, "evaluate", "floor", 0)
    clouds["floor"] = tuple(data.sample(config.data.target, config.evaluation.test_points, floor) for _ in range(2))
    return config, evaluation.metrics, clouds


def check_distances(project):
    """Each name against the pairing found anew, by another solver."""
    _, reported, clouds = judged(project)
    for method, (x, y) in clouds.items():
        squared = best_pairing(x, y)
        truth = {"w2": squared**0.5, "w2_squared": squared, "half_w2_squared": squared / 2}
        other = {"sinkhorn_divergence": reported.get(f"{method}.sinkhorn_divergence")}
        for name, expected in truth.items():
            found = reported[f"{method}.{name}"]
            held = [known for known, value in (truth | other).items() if value == pytest.approx(found, rel=1e-4)]
            assert name in held, (
                f"{method}.{name} holds {' or '.join(held) or 'none of the distances'}: "
                f"found {found:.4g}, expected {expected:.4g}"
            )


def check_divergence(project):
    """Half the squared length of a translation, where a squared distance has all of it; 0 between a cloud and itself."""
    protocol = configured(project).evaluation
    x = data.sample("moons", 64, generator(SEED))
    for length, expected in ((0.0, 0.0), (3.0, 4.5)):
        y = x + torch.tensor([length, 0.0])
        found = metrics.sinkhorn_divergence(x, y, blur=protocol.sinkhorn_blur, scaling=protocol.sinkhorn_scaling)
        assert abs(found - expected) < 2e-3, (
            f"sinkhorn_divergence of a cloud moved by {length:g}: found {found:.4f}, expected {expected:g}"
        )


def check_refusal():
    """No distance is reported to points that are no numbers."""
    x = data.sample("moons", 16, generator(SEED))
    y = x.clone()
    y[3, 0] = float("nan")
    for clouds in ((x, y), (y, x)):
        try:
            found = metrics.w2_squared(*clouds)
        except ValueError as error:
            assert "1 of 16 points not finite" in str(error), f"refused without saying why: {error}"
        else:
            raise AssertionError(f"W2 squared with one point of 16 that is NaN: found {found:g}, expected a refusal")


def check_probed(project):
    """`repro probe` finds no fault in what each name computes."""
    config = configured(project)
    errors = [f"{one.name}: {one.error}" for one in probe(project, {"2d-moons": config}, CPU) if one.error]
    assert not errors, "; ".join(errors)


def everywhere(monkeypatch, name, function):
    for module in (metrics, evaluate_points, probes):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)


def without_the_root(monkeypatch):
    """W2 squared under the name w2."""
    real = metrics.transport_distances

    def distances(x, y):
        found = real(x, y)
        return found | {"w2": found["w2_squared"]}

    everywhere(monkeypatch, "transport_distances", distances)


def the_divergence_as_w2(monkeypatch):
    """As the authors' 2-D evaluation prints it."""
    real = evaluate_points._distances

    def distances(x, test, protocol):
        found = real(x, test, protocol)
        return found | {"w2": found["sinkhorn_divergence"]}

    monkeypatch.setattr(evaluate_points, "_distances", distances)


def with_geomloss_cost(monkeypatch):
    """|x - y|^2 / 2 in the place of |x - y|^2: W2 comes out smaller by the root of 2."""
    real = metrics.ot.dist
    monkeypatch.setattr(metrics.ot, "dist", lambda *args, **rest: real(*args, **rest) / 2)


def with_the_distance_as_cost(monkeypatch):
    """The cost |x - y| is that of W1; a root on top does not make it W2."""
    real = metrics.ot.dist
    monkeypatch.setattr(metrics.ot, "dist", lambda x, y, metric: real(x, y, metric="euclidean"))


def floor_of_another_metric(monkeypatch):
    """The floor beside W2 is that of its square."""
    real = evaluate_points._floor
    swapped = lambda found: found | {"floor.w2": found["floor.w2_squared"]}  # noqa: E731
    monkeypatch.setattr(evaluate_points, "_floor", lambda *args: swapped(real(*args)))


def not_debiased(monkeypatch):
    """The entropic cost W_eps under the name of the divergence."""
    monkeypatch.setattr(metrics, "SamplesLoss", partial(SamplesLoss, debias=False))


def as_pot_answers(monkeypatch):
    """Nobody looks at the points."""
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool))


def divergence_without_its_half(monkeypatch):
    real = metrics.divergence_tensor
    monkeypatch.setattr(metrics, "divergence_tensor", lambda *args, **rest: 2 * real(*args, **rest))


def paired_by_scipy(monkeypatch):
    """Equal weights and as many points on both sides: an assignment gives the same number as a plan."""
    everywhere(monkeypatch, "w2_squared", best_pairing)


def half_of_twice_the_cost(monkeypatch):
    """GeomLoss' cost, and its half given back."""
    real = metrics.w2_squared
    with_geomloss_cost(monkeypatch)
    everywhere(monkeypatch, "w2_squared", lambda x, y: 2 * real(x, y))


def distances_squared_afterwards(monkeypatch):
    """|x - y| asked for, but squared before it is summed."""
    real = metrics.ot.dist
    monkeypatch.setattr(metrics.ot, "dist", lambda x, y, metric: real(x, y, metric="euclidean") ** 2)


def refused_by_the_largest(monkeypatch):
    """Another way to look: NaN is not at most anything."""
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: self.abs() <= torch.finfo(self.dtype).max)


def debiased_by_hand(monkeypatch):
    """W_eps(x, y) - W_eps(x, x) / 2 - W_eps(y, y) / 2 from three calls that are not debiased."""

    def loss(*args, **settings):
        cost = SamplesLoss(*args, **settings | {"diameter": 20.0}, debias=False)
        return lambda x, y: cost(x, y) - cost(x, x) / 2 - cost(y, y) / 2

    monkeypatch.setattr(metrics, "SamplesLoss", loss)


PROOFS = [
    Proof(
        check_distances,
        plant={
            without_the_root: ".w2 holds w2_squared: found",
            the_divergence_as_w2: ".w2 holds sinkhorn_divergence: found",
            with_geomloss_cost: ".w2 holds none of the distances: found",
            with_the_distance_as_cost: ".w2 holds none of the distances: found",
            floor_of_another_metric: "floor.w2 holds w2_squared: found",
        },
        innocent=[paired_by_scipy, half_of_twice_the_cost, distances_squared_afterwards],
    ),
    Proof(
        check_divergence,
        plant={
            not_debiased: "sinkhorn_divergence of a cloud moved by 0: found",
            divergence_without_its_half: "sinkhorn_divergence of a cloud moved by 3: found 9.0000, expected 4.5",
        },
        innocent=[debiased_by_hand],
    ),
    Proof(
        check_refusal,
        plant={as_pot_answers: "W2 squared with one point of 16 that is NaN: found 0, expected a refusal"},
        innocent=[refused_by_the_largest],
    ),
    Proof(
        check_probed,
        plant={
            without_the_root: "found {'w2': 25.0, 'w2_squared': 25.0, 'half_w2_squared': 12.5} between two points 5 apart",
            with_geomloss_cost: "expected 9.0, the squared length of the translation",
            not_debiased: "expected 4.5, half the squared translation",
        },
        innocent=[half_of_twice_the_cost, debiased_by_hand],
    ),
]


@pytest.mark.filterwarnings("ignore:Problem infeasible:UserWarning")  # POT, of points that are not finite
def test_proof(case):
    case()
