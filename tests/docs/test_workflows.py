"""What the workflows on GitHub run is there: commands, targets, versions of Python."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from document_checks import make_targets

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def missing_commands(workflow: dict[Any, Any]) -> list[str]:
    """Those that are neither a file that can be run nor a target of the Makefile."""
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    lines = [line for step in steps(workflow) for line in step.get("run", "").splitlines()]
    return [
        line
        for line in lines
        if not (os.access(ROOT / line, os.X_OK) or (line.startswith("make ") and set(line.split()[1:]) <= targets))
    ]


def test_every_supported_python_is_checked():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    least = int(re.fullmatch(r">=3\.(\d+)", required)[1])
    matrix = read("ci.yml")["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert len(matrix) > 1 and matrix == [f"3.{least + number}" for number in range(len(matrix))]


def test_every_push_and_pull_request_is_checked():
    workflow = read("ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    assert [step["run"] for step in steps(workflow) if "run" in step] == [".ci/run"]


def test_the_pages_of_main_are_what_make_site_builds():
    workflow = read("pages.yml")
    assert workflow[True]["push"] == {"branches": ["main"]} and workflow["jobs"]["deploy"]["needs"] == "build"
    (upload,) = (step for step in steps(workflow) if "upload-pages-artifact" in step.get("uses", ""))
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)["site_dir"]
    assert upload["with"]["path"] == site


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_commands_are_there_and_the_actions_have_a_major_version(path):
    workflow = read(path.name)
    assert missing_commands(workflow) == []
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used and [name for name in used if not re.fullmatch(r"actions/[\w-]+@v\d+", name)] == []


def test_a_command_that_is_not_there_is_found():
    workflow = {"jobs": {"one": {"steps": [{"run": "make site\nmake nothing\n.ci/run\n.ci/walk"}]}}}
    assert missing_commands(workflow) == ["make nothing", ".ci/walk"]
