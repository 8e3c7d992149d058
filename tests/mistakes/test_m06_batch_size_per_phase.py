"""m06: one cached loader for two batch sizes.

Every phase trains on minibatches of the size in its own configuration, also after a phase with another size, on points and on images.
"""

import pytest
import torch

from nsgf import data, images, laws
from nsgf.phases import make_phases
from repro.run import plan
from repro.runtime import Runtime

DIFFERENT = {
    "2d-moons": {
        "velocity_field": 256,
        "straight_flow": 128,
        "time_predictor": 1,
        "velocity_field_100": 32,
        "ot_cfm": 16,
    },
    "digits": {"velocity_field": 32, "straight_flow": 16, "time_predictor": 1, "feature_classifier": 8},
}
EQUAL = {name: dict.fromkeys(sizes, sizes["velocity_field"]) for name, sizes in DIFFERENT.items()}
EXPERIMENTS = list(DIFFERENT)


def check(project, folder, experiment, sizes=DIFFERENT):
    """The network of every phase gets as many examples as the phase's configuration says, phase after phase, step after step."""
    sizes = sizes[experiment]
    settings = [
        "phases.*.pool.batches=1",
        f"phases.*.pool.batch_size={sizes['velocity_field']}",
        "phases.*.flow.steps=2",
        "sinkhorn.scaling=0.5",
        *(f"phases.{name}.batch_size={size}" for name, size in sizes.items()),
    ]
    phases = make_phases(plan(project, experiment, settings).config, Runtime(torch.device("cpu")))
    assert [phase.name for phase in phases] == list(sizes)
    for phase in phases:
        got = []
        model = phase.make_model()
        model.register_forward_hook(lambda _, inputs, output: got.extend(map(len, (*inputs, output))))
        scratch = folder / phase.name
        scratch.mkdir()
        phase.prepare(0, scratch, {})
        try:
            for step in range(2):
                phase.loss(model, phase.minibatch(step, torch.Generator().manual_seed(step)))
        except RuntimeError as error:
            raise AssertionError(f"{phase.name}: {error}") from error
        assert set(got) == {sizes[phase.name]}, (
            f"{phase.name}: the network got {sorted(set(got))} examples, configured are {sizes[phase.name]}"
        )


def plant_cached_loader(monkeypatch):
    """The loader of a data set is made at the first call and serves all phases. Noise is drawn anew."""
    real_sample, real_draw, loaders = data.sample, laws.ImageLaws.draw_labelled, {}

    def sample(law, n, generator):
        made = real_sample(law, n, generator)
        return made if law == "gaussian" else loaders.setdefault(law, made)

    def draw(self, n, generator):
        y, _ = loaders.setdefault(self.name, real_draw(self, n, generator))
        return torch.randn(n, *self.shape, generator=generator), y

    monkeypatch.setattr(data, "sample", sample)
    monkeypatch.setattr(laws.ImageLaws, "draw", draw)


def plant_cached_images(monkeypatch):
    """The same one level below: the images are drawn once, and as many as they are get noise, times and labels. Nothing crashes."""
    real, loaders = images.ImageSet.draw, {}
    monkeypatch.setattr(
        images.ImageSet, "draw", lambda self, n, *rest: loaders.setdefault("the loader", real(self, n, *rest))
    )


def plant_cached_size(monkeypatch):
    """The first batch size that was asked for serves all phases, for source and target alike: nothing crashes."""
    first = []

    def of_first_size(real):
        def draw(of, n, *rest):
            first.append(n)
            return real(of, first[0], *rest)

        return draw

    monkeypatch.setattr(data, "sample", of_first_size(data.sample))
    monkeypatch.setattr(images.ImageSet, "draw", of_first_size(images.ImageSet.draw))


def _innocent_cache_keyed_on_everything(monkeypatch):
    real_sample, real_draw, drawn = data.sample, images.ImageSet.draw, {}
    monkeypatch.setattr(
        data, "sample", lambda law, n, g: drawn.setdefault((law, n, g.initial_seed()), real_sample(law, n, g))
    )
    monkeypatch.setattr(
        images.ImageSet,
        "draw",
        lambda self, n, g, flip: drawn.setdefault((n, g.initial_seed(), flip), real_draw(self, n, g, flip)),
    )


def _innocent_larger_draw(monkeypatch):
    real_sample, real_draw = data.sample, images.ImageSet.draw
    monkeypatch.setattr(data, "sample", lambda law, n, g: real_sample(law, 2 * n, g)[:n])
    monkeypatch.setattr(
        images.ImageSet, "draw", lambda self, n, *rest: tuple(column[:n] for column in real_draw(self, 2 * n, *rest))
    )


innocent = [_innocent_cache_keyed_on_everything, _innocent_larger_draw]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_holds_for_different_sizes(project, tmp_path, experiment):
    check(project, tmp_path, experiment)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_silent_on_equal_sizes(project, tmp_path, experiment):
    check(project, tmp_path, experiment, EQUAL)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("variant", innocent)
def test_silent_on(proof, project, tmp_path, variant, experiment):
    proof.silent(lambda: check(project, tmp_path, experiment), variant)


@pytest.mark.parametrize(("experiment", "sizes"), [("2d-moons", (128, 256)), ("digits", (16, 32))])
def test_catches_a_cached_loader_with_the_symptom_of_the_entry(proof, project, tmp_path, experiment, sizes):
    message = (
        "straight_flow: The size of tensor a ({}) must match the size of tensor b ({}) at non-singleton dimension 0"
    )
    proof.caught(lambda: check(project, tmp_path, experiment), plant_cached_loader, message.format(*sizes))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_catches_a_cached_loader_that_broadcasting_hides(proof, project, tmp_path, experiment):
    first = DIFFERENT[experiment]["velocity_field"]
    same_until = {experiment: DIFFERENT[experiment] | {"straight_flow": first}}
    message = f"time_predictor: the network got [{first}] examples, configured are 1"
    proof.caught(lambda: check(project, tmp_path, experiment, same_until), plant_cached_loader, message)


@pytest.mark.parametrize(
    ("plant", "experiment", "found", "configured"),
    [
        (plant_cached_size, "2d-moons", 256, 128),
        (plant_cached_size, "digits", 32, 16),
        (plant_cached_images, "digits", 32, 16),
    ],
)
def test_catches_what_is_cached_for_source_and_target_alike(
    proof, project, tmp_path, plant, experiment, found, configured
):
    message = f"straight_flow: the network got [{found}] examples, configured are {configured}"
    proof.caught(lambda: check(project, tmp_path, experiment), plant, message)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("plant", [plant_cached_loader, plant_cached_images, plant_cached_size])
def test_equal_sizes_would_hide_the_mistake(proof, project, tmp_path, plant, experiment):
    """Why the sizes differ in this test: the shipped configurations have one size for all phases."""
    proof.silent(lambda: check(project, tmp_path, experiment, EQUAL), plant)
