"""The probes of NSGF++: all pass on the installed libraries, and each is seen to fail on the mistake that it is for."""

from functools import partial

import pytest
import torch
from torch import nn

from nsgf import images, inception, metrics, phases, probes, sinkhorn
from repro.config import load
from repro.method import find_project
from repro.runtime import Runtime
from repro_tools.probe import probe

CPU = torch.device("cpu")
PROJECT = find_project(images.Path(__file__).parent)
RUNTIME = Runtime(CPU, images.Path("nowhere"), stand_in_data=True)
EXPERIMENTS = list(PROJECT.experiments())


def config(name, *overrides):
    return load(PROJECT.config_class(name), PROJECT.experiments()[name], list(overrides))[0]


def declared(name, *overrides):
    return PROJECT.method.probes(config(name, *overrides), RUNTIME)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_every_probe_of_every_experiment_passes():
    found = probe(PROJECT, {name: config(name) for name in EXPERIMENTS}, RUNTIME)
    assert {one.name: one.error for one in found if one.error} == {}
    assert {name for one in found for name in one.experiments} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_velocity_is_probed_at_the_shape_of_every_pool(name):
    fields = [phase for phase in PROJECT.method.phases(config(name), RUNTIME) if hasattr(phase, "velocity")]
    shapes = {(phase.config.pool.batch_size, int(torch.Size(phase.laws.shape).numel())) for phase in fields}
    probed = {one.shapes.partition(" to")[0] for one in declared(name) if one.name.startswith("Sinkhorn velocity")}
    assert shapes and probed == {str(shape) for shape in shapes}


def test_the_implementation_that_is_configured_is_the_one_that_is_probed():
    (one,) = {
        one.name for one in declared("2d-moons", "sinkhorn.implementation=geomloss_online") if "velocity" in one.name
    }
    assert one == "Sinkhorn velocity, geomloss_online"


def test_libraries_are_installed_distributions():
    assert {one.library for name in EXPERIMENTS for one in declared(name)} == {
        "torch", "geomloss", "POT", "scipy", "scikit-learn", "torchvision", "torch-fidelity",
    }  # fmt: skip


def without_weights_of_points(x, y):
    """Mistake: the gradient of a GeomLoss loss carries the weight 1/n of its point."""
    return sinkhorn.velocity(x, y, blur=0.5, scaling=0.5) / len(x)


def without_the_self_term(x, y):
    return sinkhorn.barycentric_projection(sinkhorn.potentials(x, y, blur=0.5, scaling=0.5), y) - x


def of_any_shape(x, y):
    return sinkhorn.velocity(x.flatten(1), y.flatten(1), blur=0.5, scaling=0.5).view_as(x)


def forgets_scaling(x, y):
    return sinkhorn.velocity(x, y, blur=0.5, scaling=0.5)


def test_a_velocity_without_the_weights_of_the_points_is_caught():
    with pytest.raises(AssertionError, match="off the translation"):
        probes.check_velocity(without_weights_of_points, (64, 2), None, CPU)


def test_a_velocity_without_the_self_term_is_caught_where_points_lie_apart():
    with pytest.raises(AssertionError, match="off the translation"):
        probes.check_velocity(without_the_self_term, (64, 784), None, CPU)


@pytest.mark.parametrize("blur", [0.05, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("scaling", [0.5, 0.8, 0.95])
def test_a_velocity_that_is_truncated_is_not_taken_for_wrong(blur, scaling):
    probes.check_velocity(partial(sinkhorn.velocity, blur=blur, scaling=scaling), (256, 2), None, CPU)


def test_a_velocity_that_takes_images_is_caught():
    with pytest.raises(AssertionError, match=r"found images \(64, 1, 4, 4\) accepted"):
        probes.check_velocity(of_any_shape, (64, 16), (1, 4, 4), CPU)


def test_a_closed_form_of_another_scaling_is_caught():
    reference = partial(sinkhorn.velocity, blur=0.5, scaling=0.95)
    with pytest.raises(AssertionError, match="of difference, expected less than 1 %"):
        probes.check_agreement(forgets_scaling, reference, (64, 2), CPU)
    probes.check_agreement(reference, reference, (64, 2), CPU)


def test_a_distance_with_a_half_is_caught(monkeypatch):
    real = metrics.w2_squared
    monkeypatch.setattr(probes, "w2_squared", lambda x, y: real(x, y) / 2)
    with pytest.raises(AssertionError, match="found 4.5"):
        probes.check_emd2((32, 2))


def test_a_divergence_without_a_half_is_caught(monkeypatch):
    real = metrics.sinkhorn_divergence
    monkeypatch.setattr(probes, "sinkhorn_divergence", lambda x, y, **settings: 2 * real(x, y, **settings))
    with pytest.raises(AssertionError, match="expected 4.5"):
        probes.check_divergence((32, 2), {"blur": 0.05, "scaling": 0.9})


def test_an_assignment_the_wrong_way_round_is_caught(monkeypatch):
    monkeypatch.setattr(probes, "optimal_assignment", lambda x, y: phases.optimal_assignment(y, x))
    with pytest.raises(AssertionError, match="another matching"):
        probes.check_assignment((16, 2))


def test_a_network_that_mixes_the_batch_is_caught():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Sequential(nn.Conv2d(1, 1, 1))
            nn.init.zeros_(self.out[0].weight)
            nn.init.zeros_(self.out[0].bias)

        def forward(self, x, t):
            return self.out(x + x[:1])

    with pytest.raises(AssertionError, match="depend on the order of the batch"):
        probes.check_unet(Mixes, (1, 4, 4))


def test_a_reader_of_transposed_images_is_caught(monkeypatch):
    real = images.load

    def load(name, split, root):
        stored = real(name, split, root)
        return images.ImageSet(stored.pixels.mT, stored.labels, stored.white)

    monkeypatch.setattr(images, "load", load)
    with pytest.raises(AssertionError, match="found other pixels than were written"):
        probes.check_mnist_reader()


def test_scores_and_features_the_wrong_way_round_are_caught(monkeypatch):
    real = inception.look
    monkeypatch.setattr(inception, "look", lambda *arguments, **options: real(*arguments, **options)[::-1])
    with pytest.raises(AssertionError, match=r"found features and scores \(\(2, 1008\), \(2, 2048\)\)"):
        probes.check_inception((1, 28, 28))


def test_unbiased_statistics_of_few_images_are_what_fid_is_made_of(monkeypatch):
    """The wrong formula: the distance itself in the place of its square."""
    import torch_fidelity.metric_fid as fid

    real = fid.fid_statistics_to_metric
    monkeypatch.setattr(
        fid,
        "fid_statistics_to_metric",
        lambda *arguments, **options: {name: value**0.5 for name, value in real(*arguments, **options).items()},
    )
    with pytest.raises(AssertionError, match="found FID 3"):
        probes.check_scores()
