"""m06: one cached loader for two batch sizes.

Every phase trains on minibatches of the size in its own configuration, also after a phase with another size.
"""

import pytest
import torch

from nsgf import data
from nsgf.config import Config
from nsgf.phases import make_phases
from repro.config import load

DIFFERENT = {"velocity_field": 256, "straight_flow": 128, "time_predictor": 1, "velocity_field_100": 32, "ot_cfm": 16}
EQUAL = dict.fromkeys(DIFFERENT, 256)
TINY = ["phases.*.pool.batches=1", "phases.*.pool.batch_size=256", "phases.*.flow.steps=2", "sinkhorn.scaling=0.5"]


def check(project, folder, sizes=DIFFERENT):
    """The network of every phase gets as many points as the phase's configuration says, phase after phase, step after step."""
    settings = [f"phases.{name}.batch_size={size}" for name, size in sizes.items()]
    config, _ = load(Config, project.experiments()["2d-moons"], TINY + settings)
    for phase in make_phases(config, torch.device("cpu")):
        got = []
        model = phase.make_model()
        model.register_forward_hook(lambda _, inputs, output: got.extend(map(len, (*inputs, output))))
        scratch = folder / phase.name
        scratch.mkdir()
        phase.prepare(0, scratch, {})
        try:
            for step in range(2):
                phase.loss(model, torch.Generator().manual_seed(step))
        except RuntimeError as error:
            raise AssertionError(f"{phase.name}: {error}") from error
        assert set(got) == {sizes[phase.name]}, (
            f"{phase.name}: the network got {sorted(set(got))} points, configured are {sizes[phase.name]}"
        )


def plant_cached_loader(monkeypatch):
    """The loader of a data set is made at the first call and serves all phases. Noise is drawn anew."""
    real, loaders = data.sample, {}
    monkeypatch.setattr(
        data,
        "sample",
        lambda law, n, g: real(law, n, g) if law == "gaussian" else loaders.setdefault(law, real(law, n, g)),
    )


def plant_cached_size(monkeypatch):
    """The first batch size that was asked for serves all phases, for source and target alike: nothing crashes."""
    real, first = data.sample, []

    def sample(law, n, generator):
        first.append(n)
        return real(law, first[0], generator)

    monkeypatch.setattr(data, "sample", sample)


def _innocent_cache_keyed_on_everything(monkeypatch):
    real, drawn = data.sample, {}
    monkeypatch.setattr(data, "sample", lambda law, n, g: drawn.setdefault((law, n, g.initial_seed()), real(law, n, g)))


def _innocent_larger_draw(monkeypatch):
    real = data.sample
    monkeypatch.setattr(data, "sample", lambda law, n, g: real(law, 2 * n, g)[:n])


innocent = [_innocent_cache_keyed_on_everything, _innocent_larger_draw]


def test_holds_for_different_sizes(project, tmp_path):
    check(project, tmp_path)


def test_silent_on_equal_sizes(project, tmp_path):
    check(project, tmp_path, EQUAL)


@pytest.mark.parametrize("variant", innocent)
def test_silent_on(proof, project, tmp_path, variant):
    proof.silent(lambda: check(project, tmp_path), variant)


def test_catches_a_cached_loader_with_the_symptom_of_the_entry(proof, project, tmp_path):
    message = (
        "straight_flow: The size of tensor a (128) must match the size of tensor b (256) at non-singleton dimension 0"
    )
    proof.caught(lambda: check(project, tmp_path), plant_cached_loader, message)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_catches_a_cached_loader_that_broadcasting_hides(proof, project, tmp_path):
    same_until = DIFFERENT | {"straight_flow": 256}
    message = "time_predictor: the network got [256] points, configured are 1"
    proof.caught(lambda: check(project, tmp_path, same_until), plant_cached_loader, message)


def test_catches_a_cached_size(proof, project, tmp_path):
    proof.caught(
        lambda: check(project, tmp_path),
        plant_cached_size,
        "straight_flow: the network got [256] points, configured are 128",
    )


@pytest.mark.parametrize("plant", [plant_cached_loader, plant_cached_size])
def test_equal_sizes_would_hide_the_mistake(proof, project, tmp_path, plant):
    """Why the sizes differ in this test: the shipped configurations have one size for all phases."""
    proof.silent(lambda: check(project, tmp_path, EQUAL), plant)
