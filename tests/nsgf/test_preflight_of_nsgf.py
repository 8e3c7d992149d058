"""`repro preflight` of the reference implementation: a 2-D and an image experiment pass without a download, and faults are named."""

import json

import pytest
import torch

from nsgf import data, images, phases
from repro.config import load
from repro.method import find_project
from repro.runtime import Runtime
from repro_tools.cli import main
from repro_tools.preflight.checks import CHECKS
from repro_tools.preflight.command import of_experiment
from repro_tools.preflight.inspection import Question

ROOT = images.Path(__file__).parents[2]
PROJECT = find_project(ROOT)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def inspected(name):
    """The failed rows of an experiment, but for its probes and its memory."""
    rows = of_experiment(name, Question(images.Path("nowhere"), False, images.Path("no-runs")))
    return {(row.check, row.phase): row.text for row in rows if row.status == "fail"}


@pytest.mark.parametrize("name", ["2d-moons", "digits"])
def test_an_experiment_passes_in_every_phase(name, capsys):
    main(["preflight", name, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    # The commit and the spec are the repository's business at this moment.
    assert [row for row in rows if row["status"] == "fail" and row["check"] not in ("commit", "spec")] == []
    config, _ = load(PROJECT.config_class(name), PROJECT.experiments()[name])
    trained = [phase.name for phase in PROJECT.method.phases(config, Runtime(torch.device("cpu")))]
    for check_name, one in CHECKS.items():
        if one.of == "phase":
            passed = [row["phase"] for row in rows if row["check"] == check_name and row["status"] == "pass"]
            assert set(trained) <= set(passed), check_name


def test_the_images_of_a_set_that_is_not_here_are_stood_in_for(tmp_path):
    laws = phases.make_phases(
        load(PROJECT.config_class("cifar10"), PROJECT.experiments()["cifar10"])[0],
        Runtime(torch.device("cpu"), tmp_path, stand_in_data=True),
    )[0].laws
    laws.check()
    x_0, y = laws.draw(5, torch.Generator().manual_seed(0))
    assert x_0.shape == y.shape == (5, 3, 32, 32) and y.dtype == torch.float32
    assert -1 <= float(y.min()) < float(y.max()) <= 1


def test_stand_in_images_have_the_type_and_the_classes_of_the_set_and_are_the_same_each_time():
    for name, source in images.SOURCES.items():
        if source.needs:
            first, again = (images.load(name, "test", images.Path("nowhere"), stand_in=True) for _ in range(2))
            assert torch.equal(first.pixels, again.pixels)
            assert first.pixels.shape[1:] == source.shape and first.pixels.dtype == torch.uint8
            assert sorted(set(first.labels.tolist())) == list(range(10))


def test_a_loader_with_an_axis_too_many_is_named_in_the_experiment_that_has_it(monkeypatch):
    real = data._SAMPLERS["checkerboard"]
    monkeypatch.setitem(data._SAMPLERS, "checkerboard", lambda n, generator: real(n, generator)[:, None])
    failed = inspected("2d-checkerboard")
    assert "nsgf/networks.py" in failed["training", "straight_flow"]
    assert "found x (8, 8, 2) and t (8,), expected (n, 2) and (n,)" in failed["training", "straight_flow"]


def test_a_claim_on_a_method_that_is_not_evaluated_is_named(monkeypatch):
    from nsgf import evaluate_points

    real = evaluate_points._paths
    monkeypatch.setattr(
        evaluate_points,
        "_paths",
        lambda *arguments: {name: x for name, x in real(*arguments).items() if not name.startswith("ot_cfm")},
    )
    ((key, text),) = inspected("2d-moons").items()
    assert key == ("metrics", None)
    assert "claim rank-ot-cfm-moons: found metric 'ot_cfm.10.w2', which the evaluation does not give" in text
