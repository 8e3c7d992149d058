"""m03: only the simplest experiment tested.

Every configuration that is shipped runs through every phase and its evaluation, and leaves what each of its claims is judged by. The list of
experiments is read from the folder of configurations, so a new one is tested because it exists. Image experiments keep their networks; only
the images are few, and noise.
"""

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from proof import Proof

from nsgf import data, evaluate_images, evaluate_points, images
from nsgf import phases as methods
from nsgf.config import ImageConfig
from nsgf.phases import StraightFlow
from repro import runinfo
from repro.config import load
from repro.method import Project
from repro.run import RECORD, execute, plan
from repro.runtime import Runtime
from repro_tools.spec import load_spec

CONFIGS = Path(__file__).parents[2] / "reference_impl" / "configs"
EXPERIMENTS = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))]

read_spec = cache(load_spec)  # a long file, and no proof changes it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What a record says of the machine is looked up on every run, and is no part of a proof."""
    monkeypatch.setattr(runinfo, "imported_versions", dict)


def claimed_metrics(project, experiment):
    """(claim, metric) for every metric that a claim of the experiment needs."""
    claims = read_spec(project.spec).claims_of(experiment)
    return [(c.id, metric) for c in claims for metric in (c.metric, c.divided_by, c.floor) if metric is not None]


def shipped(project, experiment):
    return load(project.config_class(experiment), project.experiments()[experiment])[0]


def needs_inception(metric):
    """The one exception: these are measured by a network whose weights are not shipped, so no test can ask for them."""
    return metric in ("nsgf_plus_plus.fid", "nsgf_plus_plus.inception_score")


def tiny(project, experiment):
    """Overrides for a run of seconds: the method's own, those of `repro preflight`, without the network that needs weights and asks
    for more samples."""
    config = shipped(project, experiment)
    without = ["evaluation.inception=false", "evaluation.samples=3"] if isinstance(config, ImageConfig) else []
    return [*project.tiny(experiment, config), *without]


def check(experiments, more=(), *, project, tmp_path, image_sets):
    """Each experiment runs to its end, and its record has a finite value for every claim."""
    for experiment in experiments.split("+"):
        made = plan(project, experiment, [*tiny(project, experiment), *more])
        phases = [name for name, phase in made.config.phases if phase is not None]
        folder = tmp_path / experiment / "seed-0"
        try:
            execute(made, 0, tmp_path, Runtime(torch.device("cpu"), image_sets), resume=False, resume_phase=None)
        except Exception as error:
            unfinished = [
                name
                for number, name in enumerate(phases, start=1)
                if not (folder / f"{number}-{name}" / "model.safetensors").exists()
            ]
            place = f"phase {unfinished[0]}" if unfinished else "evaluation"
            raise AssertionError(f"{experiment}, {place}: {error}") from error
        record = json.loads((folder / RECORD).read_text())
        trained = {name: curve[-1][0] for name, curve in record["curves"].items()}
        assert trained == dict.fromkeys(phases, 2), (
            f"{experiment}: found the phases and steps {trained}, expected 2 steps of each of {phases}"
        )
        for claim, metric in claimed_metrics(project, experiment):
            found = record["metrics"].get(metric, math.nan)
            assert math.isfinite(found) or needs_inception(metric), (
                f"{experiment}, evaluation: claim {claim} needs {metric}, found {found}"
            )


def check_list(project):
    """What the command knows is what is tested here, and the spec claims something of each."""
    assert EXPERIMENTS, f"no experiment in {CONFIGS}"
    claimed = {claim.experiment for claim in read_spec(project.spec).claims}
    assert list(project.experiments()) == EXPERIMENTS, (
        f"tested {', '.join(EXPERIMENTS)}; the command knows {', '.join(project.experiments())}"
    )
    assert set(EXPERIMENTS) <= claimed, f"{', '.join(sorted(set(EXPERIMENTS) - claimed))}: no claim in spec.yaml"


def check_exception(project):
    """Where a claim needs Inception, the shipped configuration asks for it."""
    for experiment in project.experiments():
        wanting = [claim for claim, metric in claimed_metrics(project, experiment) if needs_inception(metric)]
        if wanting:
            asked = shipped(project, experiment).evaluation.inception
            assert asked, f"{experiment}: evaluation.inception is off, {', '.join(wanting)} cannot be judged"


def broken_shape(monkeypatch):
    """The loader of one data set gives its points an extra axis, as images have. The other experiments do not notice."""
    real = data._SAMPLERS["checkerboard"]
    monkeypatch.setitem(data._SAMPLERS, "checkerboard", lambda n, generator: real(n, generator)[:, None])


def broken_phase(monkeypatch):
    """The last phase of one experiment fails, after the phases before it have been paid for."""
    real = StraightFlow.loss

    def loss(self, model, batch):
        if (self.name, self.laws.target) == ("ot_cfm", "scurve"):
            raise RuntimeError("CUDA out of memory.")
        return real(self, model, batch)

    monkeypatch.setattr(StraightFlow, "loss", loss)


def broken_reader(monkeypatch):
    """The reader of one image set leaves out the axis of its one channel."""
    real = images.SOURCES["mnist"]

    def read(data_root, split):
        stored = real.read(data_root, split)
        return replace(stored, pixels=stored.pixels[:, 0])

    monkeypatch.setitem(images.SOURCES, "mnist", replace(real, read=read))


def network_of_one_channel(monkeypatch):
    """The network is made for images of one channel, as all but one set have."""
    real = methods.UNet
    monkeypatch.setattr(methods, "UNet", lambda **sizes: real(**sizes | {"image_channels": 1}))


def baseline_not_judged(monkeypatch):
    """The evaluation of images samples the baseline and does not hold it against the test images."""
    real = evaluate_images._in_classifier

    def in_classifier(config, model, judged, *rest):
        return real(config, model, {name: x for name, x in judged.items() if not name.startswith("fm")}, *rest)

    monkeypatch.setattr(evaluate_images, "_in_classifier", in_classifier)


def dropped_method(monkeypatch):
    """The evaluation of one experiment leaves a method out."""
    real = evaluate_points._paths

    def paths(config, *rest):
        kept = real(config, *rest)
        return {
            name: path
            for name, path in kept.items()
            if config.experiment != "2d-moons" or not name.startswith("ot_cfm")
        }

    monkeypatch.setattr(evaluate_points, "_paths", paths)


def only_the_simplest(monkeypatch):
    real = Project.experiments
    monkeypatch.setattr(Project, "experiments", lambda self: dict(list(real(self).items())[:1]))


def experiments_listed_by_the_system(monkeypatch):
    real = Project.experiments

    def experiments(self):
        found = {path.stem: path for path in (self.root / "configs").iterdir() if path.suffix == ".yaml"}
        return {name: found[name] for name in real(self)}

    monkeypatch.setattr(Project, "experiments", experiments)


def other_points(monkeypatch):
    """Another law of one data set is no error."""
    real = data._SAMPLERS["moons"]
    monkeypatch.setitem(data._SAMPLERS, "moons", lambda n, generator: real(n, generator) * 2 + 1)


def mirrored_images(monkeypatch):
    """Nor are other images of one image set."""
    real = images.SOURCES["mnist"]

    def read(data_root, split):
        stored = real.read(data_root, split)
        return replace(stored, pixels=stored.pixels.flip(-1))

    monkeypatch.setitem(images.SOURCES, "mnist", replace(real, read=read))


def network_with_dropout(monkeypatch):
    real = methods.UNet
    monkeypatch.setattr(methods, "UNet", lambda **sizes: real(**sizes | {"dropout": 0.5}))


def edited(experiment, old, new, monkeypatch, project, tmp_path):
    """The shipped configuration of the experiment has `new` in the place of `old`."""
    text, path = project.experiments()[experiment].read_text(encoding="utf-8"), tmp_path / f"{experiment}.yaml"
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    real = Project.experiments
    monkeypatch.setattr(Project, "experiments", lambda self: real(self) | {experiment: path})


def inception_off(monkeypatch, project, tmp_path):
    """Under claims on the FID."""
    edited("cifar10", "inception: true", "inception: false", monkeypatch, project, tmp_path)


def inception_on(monkeypatch, project, tmp_path):
    """Where no claim needs it."""
    edited("digits", "inception: false", "inception: true", monkeypatch, project, tmp_path)


# The mistake is to test the first of each row alone: it passes, whatever is planted.
POINTS = "2d-8gaussians+2d-checkerboard+2d-moons+2d-scurve"
IMAGES = "2d-8gaussians+digits+mnist"
SMALL = ("phases.[sv]*.network.channels=32", "phases.[sv]*.network.head_channels=32")
PROOFS = [
    Proof(
        partial(check, POINTS),
        {
            broken_shape: "2d-checkerboard, phase straight_flow: velocity field: found x (8, 8, 2) and t (8,), expected (n, 2) and (n,)",
            dropped_method: "2d-moons, evaluation: claim rank-ot-cfm-moons needs ot_cfm.10.w2, found nan",
            broken_phase: "2d-scurve, phase ot_cfm: CUDA out of memory.",
        },
        [other_points],
    ),
    Proof(
        partial(check, IMAGES),
        {
            baseline_not_judged: "digits, evaluation: claim digits-level needs fm.100.classifier_frechet, found nan",
            broken_reader: "found 12 images (28, 28) and 12 labels, expected as many of both and images (1, 28, 28) in the train split of mnist",
        },
        [mirrored_images],
    ),
    Proof(
        partial(check, "digits+cifar10", SMALL),
        {
            network_of_one_channel: "cifar10, phase velocity_field: velocity field: found x (2, 3, 32, 32) and t (2,), expected (n, 1, 32, 32) and (n,)"
        },
        [network_with_dropout],
    ),
    Proof(
        check_list,
        {only_the_simplest: f"tested {', '.join(EXPERIMENTS)}; the command knows {EXPERIMENTS[0]}"},
        [experiments_listed_by_the_system],
    ),
    Proof(
        check_exception,
        {inception_off: "cifar10: evaluation.inception is off, table2-cifar10-fid, table2-cifar10-is cannot be judged"},
        [inception_on],
    ),
]


def test_proof(case):
    case()


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in f"{POINTS}+{IMAGES}".split("+")])
def test_every_other_experiment(project, tmp_path, image_sets, experiment):
    check(experiment, project=project, tmp_path=tmp_path, image_sets=image_sets)


def test_fewer_test_points_than_path_points(project, tmp_path, image_sets):
    check("2d-moons", ["evaluation.path_points=200"], project=project, tmp_path=tmp_path, image_sets=image_sets)
