"""The page templates/README.md: its files, written into an empty folder, run as it says."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import warm

KIT = Path(__file__).parents[2] / "templates" / "reproduction"
PAGE = (KIT.parent / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w./-]+)`.*?\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.search(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1].splitlines()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The page's project after the page's commands."""
    root = tmp_path_factory.mktemp("my-paper")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    shutil.copytree(KIT / "repro", root / "repro", ignore=shutil.ignore_patterns("__pycache__"))
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "python"
        done = warm.python(arguments, root, os.environ)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return root


def test_the_page_shows_every_file_of_its_project():
    assert set(FILES) == {"pyproject.toml", "configs/line.yaml", "method.py", "spec.yaml", "paper.txt"}


@pytest.mark.slow
def test_the_verdicts_come_from_the_full_runs(project):
    claims = json.loads((project / "reports" / "results.json").read_text())["claims"]
    assert {claim["id"]: claim["verdict"] for claim in claims} == {"slope": "reproduced", "error": "reproduced"}


@pytest.mark.slow
def test_the_copied_kit_ran_and_not_the_installed_one(project):
    (project / "repro" / "__init__.py").write_text('raise SystemExit("the copy")')
    done = warm.python(["-m", "repro", "list"], project, os.environ)
    assert done.returncode == 1 and "the copy" in done.stderr
