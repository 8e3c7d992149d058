"""The reference implementation has the layout that the template yields: a reader can hold one against the other."""

import importlib
import inspect
import json

import pytest
from rendering import PRESETS, ROOT, in_project, render

from repro.config import read_yaml

REFERENCE = ROOT / "reference_impl"
AT_THE_ROOT = {
    "AGENTS.md",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
    "requirements",
    "tests",
    ".github",
    ".gitignore",
    "repro",
}
"""What lies above the reference implementation, for the whole repository; its kit is the template's."""
ENTRIES = {"phases": "make_phases", "evaluate": "evaluate", "probes": "probes", "figures": "report_sections"}


def test_files_and_folders(template, tmp_path):
    project = render(template, tmp_path / "my-paper", preset="generative", package="nsgf")
    visible = {path.name for path in project.iterdir() if path.name != ".copier-answers.yml"}
    assert visible - AT_THE_ROOT <= {path.name for path in REFERENCE.iterdir()}
    modules = {path.name for path in (project / "nsgf").glob("*.py")}
    assert modules <= {path.name for path in (REFERENCE / "nsgf").glob("*.py")}


@pytest.mark.parametrize("preset", PRESETS)
def test_modules_enter_by_the_same_functions_with_the_same_parameters(template, tmp_path, preset):
    project = render(template, tmp_path / "my-paper", preset=preset)
    lines = "; ".join(
        ["import inspect, importlib"]
        + [
            f"print(list(inspect.signature(importlib.import_module('method.{m}').{f}).parameters))"
            for m, f in ENTRIES.items()
        ]
    )
    shown = in_project(project, "-c", lines).stdout.splitlines()
    for (module, name), parameters in zip(ENTRIES.items(), shown, strict=True):
        entry = getattr(importlib.import_module(f"nsgf.{module}"), name)
        assert str(list(inspect.signature(entry).parameters)) == parameters, name


def test_the_spec_has_the_same_parts_and_lacks_nothing_but_what_is_to_be_filled_in(template, tmp_path):
    project = render(template, tmp_path / "my-paper")
    assert set(read_yaml(project / "spec.yaml")) == set(read_yaml(REFERENCE / "spec.yaml"))
    findings = json.loads(in_project(project, "-m", "repro_tools", "check", "--json").stdout)["findings"]
    assert {finding["kind"] for finding in findings} == {"to fill in"}
