"""The guard rails of a generated project, each broken on purpose: it must bite, and say where."""

import json
import os
import re

import pytest
from rendering import PRESETS, in_project, render

from repro.config import read_yaml


@pytest.fixture(scope="module")
def toys(template, tmp_path_factory):
    """One project of each preset; a test that changes one undoes it."""
    folder = tmp_path_factory.mktemp("toys")
    return {preset: render(template, folder / preset, preset=preset) for preset in PRESETS}


@pytest.fixture
def broken(toys):
    """Replaces text in a file of a project for the length of a test."""
    kept = {}

    def replace(preset, name, before, after):
        path = toys[preset] / name
        kept.setdefault(path, path.read_text())
        text = path.read_text()
        assert before in text, f"{name}: found no {before!r}"
        write_later(path, text.replace(before, after))
        return toys[preset]

    yield replace
    for path, text in kept.items():
        write_later(path, text)


def write_later(path, text):
    """Writes a file as if seconds after the last time: Python takes a module of the same size and second for the same."""
    later = path.stat().st_mtime + 2
    path.write_text(text)
    os.utime(path, (later, later))


def preflown(project, *options):
    """The exit code and the rows of `repro preflight`."""
    done = in_project(project, "-m", "repro_tools", "preflight", "--json", *options)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["rows"]


def failed_rows(project):
    _, rows = preflown(project)
    return {row["check"]: row["text"] for row in rows if row["status"] == "fail"}


IN_THE_METHOD = [
    (
        "a draw that no seed fixes",
        "generic", "data.py", "torch.randn(count, *shape, generator=generator)", "(torch.seed(), torch.randn(count, *shape))[1]",
        "minibatch",
    ),
    (
        "a state that no checkpoint holds",
        "generic", "phases.py", "self.shape, generator)\n        return", "self.shape, generator)\n        self.seen = getattr(self, 'seen', 0) + 1\n        targets = targets + self.seen\n        return",
        "minibatch",
    ),
    (
        "a parameter that the loss does not use",
        "classification", "phases.py", 'nn.functional.mse_loss(model(batch["noisy"])', 'nn.functional.mse_loss(model.encoder(batch["noisy"])[:, :3]',
        "gradients",
    ),
    (
        "a number of steps that the configuration does not reach",
        "generative", "phases.py", "self.iterations = self.config.iterations", "self.iterations = 2",
        "overrides",
    ),
    (
        "a metric by another name than the claim's",
        "generative", "evaluate.py", '"w2": w2', '"W2": w2',
        "metrics",
    ),
    (
        "an evaluation that no seed fixes",
        "generative", "evaluate.py", 'generator(seed, "test")', 'generator(__import__("time").time_ns(), "test")',
        "repetition",
    ),
    (
        "a matching that is none",
        "generative", "flow.py", ".numpy())[1])", ".numpy())[0])",
        "probes",
    ),
    (
        "dropout in the evaluation",
        "classification", "phases.py", "self.grid(self.encoder(images))", "self.grid(nn.functional.dropout(self.encoder(images)))",
        "eval mode",
    ),
    (
        "validation images of the first class only",
        "classification", "data.py", "torch.randint(data.classes, (count,), generator=generator)", "torch.arange(count) // 1000",
        "evaluation",
    ),
]  # fmt: skip
"""What is broken, the preset, the module, the text and what stands in its place, the check that must name it."""


AT_EACH_CHANGE = ("a draw that no seed fixes", "a parameter that the loss does not use", "a matching that is none")
"""One of each preset; the others are tests that are slow."""


@pytest.mark.parametrize(
    "preset, module, before, after, check",
    [
        pytest.param(*where, id=name, marks=() if name in AT_EACH_CHANGE else pytest.mark.slow)
        for name, *where in IN_THE_METHOD
    ],
)
def test_preflight_names_it(broken, preset, module, before, after, check):
    assert check in failed_rows(broken(preset, f"method/{module}", before, after))


@pytest.mark.parametrize("preset", PRESETS)
def test_preflight_leaves_only_the_placeholders_of_the_untouched_project_open(toys, preset):
    code, rows = preflown(toys[preset])
    assert code == 0 and [row for row in rows if row["status"] == "fail"] == []
    (row,) = [row for row in rows if row["status"] == "open"]
    assert row["check"] == "placeholders" and re.match(r"found \d+ places", row["text"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_phase_of_the_untouched_project_may_be_divided(toys, preset):
    _, rows = preflown(toys[preset], "--micro-batches", "4")
    texts = [row["text"] for row in rows if row["check"] == "parts"]
    assert texts and all(text.startswith("4 parts: the same gradient") for text in texts), texts


def test_the_projects_own_tests_bite_too(broken):
    project = broken("generic", "method/phases.py", 'batch["targets"] - self.base(batch["inputs"])', 'batch["targets"]')
    done = in_project(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_method.py")
    assert done.returncode == 1
    assert "test_phase_2_learns_what_phase_1_left_over" in done.stdout


@pytest.mark.parametrize(
    "name, before, after, told",
    [
        ("configs/main.yaml", "iterations: 300", "iterations: 400", "contradicted"),
        ("configs/main.yaml", "  width: 32", "  width: 32\n    extra: 1", "extra"),
        ("spec.yaml", "value: 512, origin: paper", "value: 513, origin: paper", "contradicted"),
        ("spec.yaml", "key: phases.residual.width", "key: phases.residual.depth", "contradicted"),
        ("spec.yaml", "item: loss, ", "", "missing"),
    ],
)  # fmt: skip
def test_spec_and_configuration_that_part_are_a_fault(broken, name, before, after, told):
    project = broken("generic", name, before, after)
    done = in_project(project, "-m", "repro_tools", "check")
    assert done.returncode in (1, 2)
    assert told in done.stdout + done.stderr
    assert {"spec", "configuration"} & set(failed_rows(project))


def test_a_run_with_placeholders_says_so_and_a_number_that_is_missing_stops_it(broken):
    project = broken("generic", "spec.yaml", "seeds: [0, 1, 2]", "seeds: [0, 1, 2]")
    dry = ("-m", "repro_tools", "run", "main", "--dry-run")
    done = in_project(project, *dry)
    assert done.returncode == 0
    assert "no verdict can come of this run" in done.stderr
    broken("generic", "spec.yaml", "reported: 0.1", 'reported: "FILL IN"')
    done = in_project(project, *dry)
    assert done.returncode == 2
    assert "reported" in done.stderr


def test_the_authors_code_is_no_source_in_the_blind_phase(broken):
    line = next(
        line
        for line in (broken("classification", "spec.yaml", "# Written", "# Written") / "spec.yaml")
        .read_text()
        .splitlines()
        if "name: noise on an image" in line
    )
    other = line.replace("origin: paper", "origin: authors' code").replace('"FILL IN: page"', "train.py at 1234567")
    project = broken("classification", "spec.yaml", line, other)
    blind = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_blind_phase.py")
    done = in_project(project, *blind)
    assert done.returncode == 1
    assert "noise on an image" in done.stdout
    broken("classification", "blind-phase.md", "Begun: not yet", "Begun: 2026-01-01")
    broken("classification", "blind-phase.md", "Code opened: not yet", "Code opened: 2026-01-03")
    assert "found day 2, expected day 5" in in_project(project, *blind).stdout
    broken("classification", "blind-phase.md", "Code opened: 2026-01-03", "Code opened: 2026-01-06")
    assert in_project(project, *blind).returncode == 0


@pytest.mark.slow
def test_a_verdict_comes_when_nothing_is_left_to_fill_in(template, tmp_path):
    """The toy, taken for the paper: every placeholder filled in, and the value that it reaches reported."""
    project = render(template, tmp_path / "my-paper", title="A wave")
    spec, method = project / "spec.yaml", project / "method/method.py"
    text = spec.read_text().replace('where: "FILL IN: page"', "where: page 1").replace('"FILL IN: page and', '"page 1')
    text = (
        text.replace('"FILL IN: a link to the paper"', "https://example.org")
        .replace("FILL IN", "known")
        .replace("reported: 0.1", "reported: 0.08")
    )
    text = text.replace("{reproduced: 0.05, close: 0.2", "{reproduced: 0.9, close: 0.95")
    spec.write_text(text)
    method.write_text("\n".join(line for line in method.read_text().splitlines() if "placeholder=" not in line) + "\n")
    config = project / "configs/main.yaml"
    config.write_text(config.read_text().replace("# FILL IN with the paper's values.", "# The paper's values."))
    done = in_project(project, "-m", "repro_tools", "check")
    assert "to fill in" not in done.stdout
    for command in (*(["run", "main", "--seeds", seed] for seed in "012"), ["report"]):
        done = in_project(project, "-m", "repro_tools", *command)
        assert done.returncode == 0, done.stderr
    (claim,) = json.loads((project / "reports/results.json").read_text())["claims"]
    assert claim["verdict"] in ("reproduced", "close", "not reproduced")
    assert read_yaml(spec)["claims"][0]["statement"] == claim["statement"]
