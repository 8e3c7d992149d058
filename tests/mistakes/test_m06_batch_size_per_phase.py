"""m06: one cached loader for two batch sizes.

Every phase trains on minibatches of the size in its own configuration, also after a phase with another size, on points and on images.
"""

from functools import partial

import pytest
import torch
from pools import pool_of
from proof import Proof

from nsgf import data, images, laws
from nsgf.phases import make_phases
from repro.config import load
from repro.runtime import Runtime
from repro_tools.minibatch import draw

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")

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
SAME_UNTIL_ONE = {name: sizes | {"straight_flow": sizes["velocity_field"]} for name, sizes in DIFFERENT.items()}
EXPERIMENTS = list(DIFFERENT)


def check(experiment, project, sizes=DIFFERENT):
    """The network of every phase gets as many examples as the phase's configuration says, phase after phase, step after step."""
    sizes = sizes[experiment]
    settings = [
        "phases.*.pool.batches=1",
        f"phases.*.pool.batch_size={sizes['velocity_field']}",
        "phases.*.flow.steps=2",
        "sinkhorn.scaling=0.5",
        *(f"phases.{name}.batch_size={size}" for name, size in sizes.items()),
    ]
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], settings)
    phases = make_phases(config, Runtime(torch.device("cpu")))
    assert [phase.name for phase in phases] == list(sizes)
    for phase in phases:
        got = []
        model = phase.make_model()
        model.register_forward_hook(lambda _, inputs, output: got.extend(map(len, (*inputs, output))))
        try:
            pool = pool_of(phase, 0)
            for step in range(2):
                phase.loss(model, draw(phase, step, 0, pool))
        except RuntimeError as error:
            raise AssertionError(f"{phase.name}: {error}") from error
        assert set(got) == {sizes[phase.name]}, (
            f"{phase.name}: the network got {sorted(set(got))} examples, configured are {sizes[phase.name]}"
        )


def check_equal_until_one(experiment, project):
    """The sizes differ first where a batch is of one: it fits any other by broadcasting."""
    check(experiment, project, SAME_UNTIL_ONE)


def cached_loader(monkeypatch):
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


def cached_images(monkeypatch):
    """The same one level below: the images are drawn once, and as many as they are get noise, times and labels. Nothing crashes."""
    real, loaders = images.ImageSet.draw, {}
    monkeypatch.setattr(
        images.ImageSet, "draw", lambda self, n, *rest: loaders.setdefault("the loader", real(self, n, *rest))
    )


def cached_size(monkeypatch):
    """The first batch size that was asked for serves all phases, for source and target alike: nothing crashes."""
    first = []

    def of_first_size(real):
        def draw(of, n, *rest):
            first.append(n)
            return real(of, first[0], *rest)

        return draw

    monkeypatch.setattr(data, "sample", of_first_size(data.sample))
    monkeypatch.setattr(images.ImageSet, "draw", of_first_size(images.ImageSet.draw))


def cache_keyed_on_everything(monkeypatch):
    real_sample, real_draw, drawn = data.sample, images.ImageSet.draw, {}
    monkeypatch.setattr(
        data, "sample", lambda law, n, g: drawn.setdefault((law, n, g.initial_seed()), real_sample(law, n, g))
    )
    monkeypatch.setattr(
        images.ImageSet,
        "draw",
        lambda self, n, g, flip: drawn.setdefault((n, g.initial_seed(), flip), real_draw(self, n, g, flip)),
    )


def larger_draw(monkeypatch):
    real_sample, real_draw = data.sample, images.ImageSet.draw
    monkeypatch.setattr(data, "sample", lambda law, n, g: real_sample(law, 2 * n, g)[:n])
    monkeypatch.setattr(
        images.ImageSet, "draw", lambda self, n, *rest: tuple(column[:n] for column in real_draw(self, 2 * n, *rest))
    )


CORRECT = [cache_keyed_on_everything, larger_draw]
SYMPTOM = "straight_flow: The size of tensor a ({}) must match the size of tensor b ({}) at non-singleton dimension 0"
GOT = "{}: the network got [{}] examples, configured are {}"
PROOFS = [
    Proof(
        partial(check, "2d-moons"),
        {cached_loader: SYMPTOM.format(128, 256), cached_size: GOT.format("straight_flow", 256, 128)},
        CORRECT,
    ),
    Proof(
        partial(check, "digits"),
        {
            cached_loader: SYMPTOM.format(16, 32),
            cached_size: GOT.format("straight_flow", 32, 16),
            cached_images: GOT.format("straight_flow", 32, 16),
        },
        CORRECT,
    ),
    *(
        Proof(
            partial(check_equal_until_one, experiment),
            {cached_loader: GOT.format("time_predictor", first, 1)},
            [larger_draw],
        )
        for experiment, first in (("2d-moons", 256), ("digits", 32))
    ),
]


def test_proof(case):
    case()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_equal_sizes(project, experiment):
    check(experiment, project, EQUAL)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("plant", [cached_loader, cached_images, cached_size])
def test_equal_sizes_would_hide_the_mistake(monkeypatch, project, plant, experiment):
    """Why the sizes differ in this test: the shipped configurations have one size for all phases."""
    plant(monkeypatch)
    check(experiment, project, EQUAL)
