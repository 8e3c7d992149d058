"""`copier update`: a later kit comes into a project that was worked on, and no work is lost."""

import shutil
import subprocess

import copier
import pytest
from rendering import git, in_project, make_template, render

KIT_FILE = "templates/reproduction/repro/randomness.py"
OWN = (
    "spec.yaml",
    "README.md",
    "configs/main.yaml",
    "method/phases.py",
    "method/new.py",
    "tests/test_method.py",
    "reports/README.md",
)
"""Files that belong to the project's owner; `method/new.py` is one that the template does not have."""


def committed(folder, message):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def append(path, text):
    path.write_text((path.read_text() if path.exists() else "") + text)


@pytest.fixture
def worked_on(tmp_path):
    """A template of its own, and a project made from it whose owner changed files of every kind."""
    template = make_template(tmp_path / "template")
    project = render(template, tmp_path / "my-paper", title="A paper", package="method")
    git(project, "init", "--quiet")
    committed(project, "as it came")
    for name in OWN:
        append(project / name, "# mine\n")
    makefile = (project / "Makefile").read_text()
    (project / "Makefile").write_text(makefile.replace("SEEDS ?= 0 1 2", "SEEDS ?= 0 1 2 3 4"))
    committed(project, "worked on")
    return template, project


def update(project, **answers):
    copier.run_update(project, data=answers, defaults=True, overwrite=True, quiet=True, vcs_ref="HEAD")


def test_a_later_kit_comes_in_and_the_owners_files_stay(worked_on):
    template, project = worked_on
    own = {name: (project / name).read_bytes() for name in OWN}
    append(template / KIT_FILE, "LATER = True\n")
    append(template / "templates/reproduction/Makefile.jinja", "later:\n\techo later\n")
    append(template / "templates/reproduction/repro/later.py", "NEW = True\n")
    for preset_file in ("phases.py", "test_method.py", "experiment.yaml", "settings.yaml"):
        append(template / f"templates/presets/generic/{preset_file}.jinja", "# the template's\n")
    append(template / "templates/reproduction/README.md.jinja", "The template's.\n")
    committed(template, "later")
    update(project)
    assert {name: (project / name).read_bytes() for name in OWN} == own
    assert (project / "repro/randomness.py").read_bytes() == (template / KIT_FILE).read_bytes()
    assert (project / "repro/later.py").exists()
    makefile = (project / "Makefile").read_text()
    assert "SEEDS ?= 0 1 2 3 4" in makefile
    assert "echo later" in makefile
    assert git(project, "diff", "--check") == ""


@pytest.mark.slow
def test_after_an_update_the_project_is_green(worked_on):
    template, project = worked_on
    append(template / KIT_FILE, "LATER = True\n")
    committed(template, "later")
    update(project)
    done = in_project(project, "-m", "repro_tools", "preflight", "--json")
    faults = [line for line in done.stdout.splitlines() if '"status": "fail"' in line]
    assert len(faults) == 1, done.stdout  # the row about changes that are not committed yet
    committed(project, "updated")
    assert in_project(project, "-m", "repro_tools", "preflight").returncode == 0


def test_a_file_of_the_kit_that_the_template_drops_goes_from_the_project(worked_on):
    template, project = worked_on
    (template / KIT_FILE).unlink()
    committed(template, "later")
    update(project)
    assert not (project / "repro/randomness.py").exists()


def test_the_same_line_changed_on_both_sides_becomes_a_conflict_that_shows(worked_on):
    template, project = worked_on
    makefile = template / "templates/reproduction/Makefile.jinja"
    makefile.write_text(makefile.read_text().replace("SEEDS ?= 0 1 2", "SEEDS ?= 7"))
    committed(template, "later")
    update(project)
    merged = (project / "Makefile").read_text()
    assert "<<<<<<<" in merged
    assert "SEEDS ?= 0 1 2 3 4" in merged
    assert "SEEDS ?= 7" in merged


def test_an_untouched_project_becomes_a_fresh_one(tmp_path):
    template = make_template(tmp_path / "template")
    project = render(template, tmp_path / "old", title="A paper")
    git(project, "init", "--quiet")
    committed(project, "as it came")
    append(template / KIT_FILE, "LATER = True\n")
    append(template / "templates/reproduction/AGENTS.md.jinja", "Later.\n")
    committed(template, "later")
    update(project)
    fresh = render(template, tmp_path / "fresh", title="A paper")
    shutil.rmtree(project / ".git")
    done = subprocess.run(["diff", "--recursive", str(project), str(fresh)], capture_output=True, text=True)
    assert done.stdout == ""


def test_from_one_tag_to_the_next(worked_on, tmp_path):
    template, _ = worked_on
    git(template, "tag", "v1.0.0")
    project = tmp_path / "tagged"
    copier.run_copy(str(template), project, defaults=True, quiet=True)
    git(project, "init", "--quiet")
    committed(project, "as it came")
    assert "_commit: v1.0.0" in (project / ".copier-answers.yml").read_text()
    append(template / KIT_FILE, "LATER = True\n")
    committed(template, "later")
    git(template, "tag", "v1.1.0")
    copier.run_update(project, defaults=True, overwrite=True, quiet=True)
    assert "_commit: v1.1.0" in (project / ".copier-answers.yml").read_text()
    assert "LATER" in (project / "repro/randomness.py").read_text()
