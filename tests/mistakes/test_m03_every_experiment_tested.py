"""m03: only the simplest experiment tested.

Every configuration that is shipped runs through every phase and its evaluation, and leaves what each of its claims is judged by. The list of
experiments is read from the folder of configurations, so a new one is tested because it exists.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from nsgf import data, evaluate
from nsgf.phases import StraightFlow
from repro.method import Project
from repro.run import RECORD, execute, plan
from repro.spec import load_spec

CONFIGS = Path(__file__).parents[2] / "reference_impl" / "configs"
EXPERIMENTS = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))]
TINY = [
    "phases.*.iterations=2",
    "phases.*.batch_size=8",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=8",
    "evaluation.test_points=32",
    "evaluation.path_points=2",
    "evaluation.floor_draws=1",
    "evaluation.sinkhorn_scaling=0.5",
    "sinkhorn.scaling=0.5",
]


def check(project, experiment, runs, settings=TINY):
    """The experiment runs to its end, and its record has a finite value for every claim."""
    made = plan(project, experiment, settings)
    phases = [name for name, phase in made.config.phases if phase is not None]
    folder = runs / experiment / "seed-0"
    try:
        execute(made, 0, runs, torch.device("cpu"), resume=False, resume_phase=None)
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
    for claim in load_spec(project.spec).claims_of(experiment):
        for metric in filter(None, (claim.metric, claim.divided_by, claim.floor)):
            found = record["metrics"].get(metric, math.nan)
            assert math.isfinite(found), f"{experiment}, evaluation: claim {claim.id} needs {metric}, found {found}"


def check_list(project):
    """What the command knows is what is tested here, and the spec claims something of each."""
    claimed = {claim.experiment for claim in load_spec(project.spec).claims}
    assert list(project.experiments()) == EXPERIMENTS, (
        f"tested {', '.join(EXPERIMENTS)}; the command knows {', '.join(project.experiments())}"
    )
    assert set(EXPERIMENTS) <= claimed, f"{', '.join(sorted(set(EXPERIMENTS) - claimed))}: no claim in spec.yaml"


def plant_broken_shape(monkeypatch):
    """The loader of one data set gives its points an extra axis, as images have. The other experiments do not notice."""
    real = data._SAMPLERS["checkerboard"]
    monkeypatch.setitem(data._SAMPLERS, "checkerboard", lambda n, generator: real(n, generator)[:, None])


def plant_broken_phase(monkeypatch):
    """The last phase of one experiment fails, after the phases before it have been paid for."""
    real = StraightFlow.loss

    def loss(self, model, generator):
        if (self.name, self.laws.target) == ("ot_cfm", "scurve"):
            raise RuntimeError("CUDA out of memory.")
        return real(self, model, generator)

    monkeypatch.setattr(StraightFlow, "loss", loss)


def plant_dropped_method(monkeypatch):
    """The evaluation of one experiment leaves a method out."""
    real = evaluate._paths

    def paths(config, *rest):
        kept = real(config, *rest)
        return {
            name: path
            for name, path in kept.items()
            if config.experiment != "2d-moons" or not name.startswith("ot_cfm")
        }

    monkeypatch.setattr(evaluate, "_paths", paths)


def plant_only_the_simplest(monkeypatch):
    real = Project.experiments
    monkeypatch.setattr(Project, "experiments", lambda self: dict(list(real(self).items())[:1]))


def innocent(monkeypatch):
    """Longer trajectories of one data set's points are no error."""
    real = data._SAMPLERS["moons"]
    monkeypatch.setitem(data._SAMPLERS, "moons", lambda n, generator: real(n, generator) * 2 + 1)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_holds(project, tmp_path, experiment):
    check(project, experiment, tmp_path)


def test_holds_with_fewer_test_points_than_path_points(project, tmp_path):
    check(project, "2d-moons", tmp_path, [*TINY, "evaluation.path_points=200"])


def test_every_experiment_is_in_the_list(project):
    assert EXPERIMENTS
    check_list(project)


def test_silent_on_other_data(proof, project, tmp_path):
    proof.silent(lambda: check(project, "2d-moons", tmp_path), innocent)


@pytest.mark.parametrize(
    ("plant", "experiment", "reason"),
    [
        (
            plant_broken_shape,
            "2d-checkerboard",
            "2d-checkerboard, phase velocity_field: y has shape (8, 1, 2), expected (points, dimensions)",
        ),
        (plant_broken_phase, "2d-scurve", "2d-scurve, phase ot_cfm: CUDA out of memory."),
        (
            plant_dropped_method,
            "2d-moons",
            "2d-moons, evaluation: claim rank-ot-cfm-moons needs ot_cfm.10.w2, found nan",
        ),
    ],
)
def test_catches_an_experiment_that_breaks_alone(proof, project, tmp_path, plant, experiment, reason):
    proof.silent(
        lambda: check(project, "2d-8gaussians", tmp_path / "simplest"), plant
    )  # the mistake: this one alone was tested
    proof.caught(lambda: check(project, experiment, tmp_path / "every"), plant, reason)


def test_catches_a_list_with_one_experiment(proof, project):
    proof.caught(
        lambda: check_list(project),
        plant_only_the_simplest,
        f"tested {', '.join(EXPERIMENTS)}; the command knows {EXPERIMENTS[0]}",
    )
