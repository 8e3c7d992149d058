"""A project of version 0.1 that its owner worked on is brought to the present template.

`fixture_0_1/template.bundle` is that version's template (made by `make_bundle.sh`), `edits.patch` what the owner changed in the project that it
gives: another network and a `watch` in a phase, a rate, a metric, the spec filled in, a target of the Makefile.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import copier
import pytest
from rendering import ROOT, SEEN_BY_COPIER, copy_template, git, in_project, render

FIXTURE = Path(__file__).parent / "fixture_0_1"
KIT = ROOT / "templates/reproduction/repro"
ANSWERS = {"title": "A Residual Method", "arxiv": "2401.00001"}
OWN = (
    "README.md",
    "configs/main.yaml",
    "method/config.py",
    "method/data.py",
    "method/evaluate.py",
    "method/figures.py",
    "method/method.py",
    "method/phases.py",
    "method/probes.py",
    "spec.yaml",
    "tests/test_method.py",
)
MERGED = {
    "Makefile": "pilot: $(READY) ## a tenth of the steps, one seed",
    "pyproject.toml": '    "scikit-learn>=1.5,<2",  #',
}
"""What the owner wrote into files that the template changes too."""

CHANGED_LINES: list[tuple[str, str, str]] = [
    ("method/phases.py", "from repro.phases import Phase", "from repro.phases import SingleLossPhase as Phase"),
    ("method/phases.py", "from repro.pool import Pool", "from repro.rounds import Rows as Pool"),
    (
        "tests/test_method.py",
        """drawn, pool = phase.minibatch(0, generator(0, "test"))["targets"], phase.pool.columns["targets"]""",
        """drawn, pool = phase.minibatch(0, generator(0, "test"))["targets"], phase.pool["targets"]""",
    ),
    ("method/figures.py", "from repro.report.judge import Judgement", "from repro_tools.report.judge import Judgement"),
    (
        "method/figures.py",
        """axes.plot(*zip(*record["curves"][phase], strict=True), label=f"seed {record['seed']}", linewidth=1)""",
        """axes.plot(*zip(*record["curves"][phase]["loss"], strict=True), label=f"seed {record['seed']}", linewidth=1)""",
    ),
]
"""(file, line, line in its place), without indentation: what the owner has to do by hand after the update."""
ALLOWED = 5

REPORT_WITH_LAST_STEPS = """
import runpy, sys
from matplotlib.axes import Axes
last, plot = [], Axes.plot
def watched(axes, *values, **options):
    if "label" in options:
        last.append(float(values[0][-1]))
    return plot(axes, *values, **options)
Axes.plot = watched
sys.argv[1:] = ["report"]
try:
    runpy.run_module("repro_tools", run_name="__main__", alter_sys=True)
finally:
    print(last)
"""
"""Writes the report, then prints where each curve in the owner's figure ends: matplotlib draws letters as well, and fails at nothing."""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Updated:
    """The project after `copier update`, and the owner's files as they were before it."""

    project: Path
    before: dict[str, bytes]


@pytest.fixture(scope="module")
def updated(tmp_path_factory) -> Updated:
    folder = tmp_path_factory.mktemp("from_0_1")
    template = folder / "template"
    git(folder, "clone", "--quiet", str(FIXTURE / "template.bundle"), str(template))
    project = render(template, folder / "my-paper", **ANSWERS)
    git(project, "init", "--quiet")
    commit(project, "as it came")
    git(project, "apply", str(FIXTURE / "edits.patch"))
    commit(project, "worked on")
    before = {name: (project / name).read_bytes() for name in OWN}

    for name in SEEN_BY_COPIER:
        git(template, "rm", "-r", "--quiet", name)
    copy_template(template)
    commit(template, "as it is now")
    copier.run_update(project, defaults=True, overwrite=True, quiet=True, vcs_ref="HEAD")
    return Updated(project, before)


@pytest.fixture(scope="module")
def adapted(updated, tmp_path_factory) -> Path:
    """The updated project with the changed lines."""
    project = tmp_path_factory.mktemp("adapted") / "my-paper"
    shutil.copytree(updated.project, project)
    for name, old, new in CHANGED_LINES:
        change_line(project / name, old, new)
    commit(project, "updated")
    return project


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)


def change_line(path: Path, old: str, new: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    places = [number for number, line in enumerate(lines) if line.strip() == old]
    assert len(places) == 1 and "\n" not in new, f"{path.name}: found {len(places)} lines {old!r}, expected one"
    line = lines[places[0]]
    lines[places[0]] = line[: len(line) - len(line.lstrip())] + new
    path.write_text("\n".join(lines), encoding="utf-8")


def kit_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}


def test_the_owners_files_stay(updated):
    assert {name: (updated.project / name).read_bytes() for name in OWN} == updated.before
    for name, line in MERGED.items():
        assert line in (updated.project / name).read_text(encoding="utf-8"), name


def test_the_kit_is_the_present_one(updated):
    assert kit_of(updated.project / "repro") == kit_of(KIT)


def test_nothing_is_in_conflict(updated):
    assert git(updated.project, "diff", "--name-only", "--diff-filter=U") == ""
    assert not list(updated.project.rglob("*.rej"))
    for name in git(updated.project, "ls-files").splitlines():
        path = updated.project / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        assert not [line for line in lines if line.startswith(("<<<<<<<", ">>>>>>>"))], name


def test_no_more_lines_are_to_be_changed_than_the_owner_will_put_up_with():
    assert len(CHANGED_LINES) <= ALLOWED


def test_it_trains_and_is_judged(adapted):
    done = in_project(adapted, "-m", "repro", "run", "main", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    record = json.loads((adapted / "runs/main/seed-0/record.json").read_text(encoding="utf-8"))
    # The floor is the noise of the targets; both phases together come nearer to it than the first alone.
    metrics = record["metrics"]
    assert metrics["error.floor"] < metrics["error"] < metrics["error.base"]
    assert "error.absolute" in metrics
    assert "validation" in json.dumps(record["watched"])
    reported = in_project(adapted, "-c", REPORT_WITH_LAST_STEPS)
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.splitlines()[-1] == "[300.0, 300.0]"


def test_its_own_tests_pass(adapted):
    """Among them that every phase was killed and resumed."""
    done = in_project(adapted, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
