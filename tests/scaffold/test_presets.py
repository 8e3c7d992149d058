"""What each preset gives: files without a trace of the template, a project that installs, passes its own tests and earns no verdict."""

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import nbformat
import pytest
import yaml
from forked import LONGEST_S
from nbclient import NotebookClient
from rendering import PRESETS, ROOT, in_project, render

FILES = {
    ".copier-answers.yml",
    ".github/workflows/test.yml",
    ".gitignore",
    "AGENTS.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "notebooks/first-look.ipynb",
    "pyproject.toml",
    "reports/README.md",
    "requirements/engine.lock",
    "requirements/tools.lock",
    "requirements/torch-cpu.lock",
    "requirements/torch-cuda.lock",
    "spec.yaml",
    "tests/conftest.py",
    "tests/test_engine.py",
    "tests/test_method.py",
    "tests/test_project.py",
}
MODULES = {"__init__", "config", "data", "evaluate", "figures", "method", "phases", "probes"}
OF_PRESET = {
    "generic": {"configs/main.yaml"},
    "generative": {"configs/points.yaml", "method/flow.py"},
    "classification": {"configs/images.yaml", "blind-phase.md", "tests/test_blind_phase.py"},
}
KIT = ROOT / "templates/reproduction/repro"


@pytest.fixture(scope="module", params=PRESETS)
def rendered(request, template, tmp_path_factory):
    """A project as it comes, untouched by the tests of this module."""
    project = render(template, tmp_path_factory.mktemp(request.param) / "my-paper", preset=request.param)
    return request.param, project


def files(project):
    return {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}


def test_the_files_are_these_and_the_kit_is_copied_byte_for_byte(rendered):
    preset, project = rendered
    kit = {f"repro/{path.relative_to(KIT).as_posix()}": path for path in KIT.rglob("*.py")}
    modules = {f"method/{name}.py" for name in MODULES}
    assert files(project) == FILES | modules | OF_PRESET[preset] | set(kit)
    assert all((project / name).read_bytes() == path.read_bytes() for name, path in kit.items())


def test_the_method_is_what_one_sees(rendered):
    """`repro new` adds two files: the tools, and their hash."""
    _, project = rendered
    own = [name for name in files(project) if not name.startswith(("tests/", "reports/"))]
    assert len(own) + 2 <= 40
    engine = list((project / "repro").glob("*.py"))
    assert len(engine) <= 14
    assert max(len(line) for path in engine for line in path.read_text(encoding="utf-8").splitlines()) <= 110


def test_nothing_of_the_template_language_is_left(rendered):
    _, project = rendered
    texts = {name: (project / name).read_text(encoding="utf-8") for name in files(project)}
    assert [name for name, text in texts.items() if re.search(r"\[%|%\]|\[#|\[\[ ", text)] == []


def test_its_code_is_formatted_and_linted(rendered):
    _, project = rendered
    ruff, settings = f"{sysconfig.get_path('scripts')}/ruff", ("--config", str(ROOT / "pyproject.toml"))
    unordered = [
        "--per-file-ignores",
        "tests/*:I001",
    ]  # whether the package or the kit is imported first hangs on its name
    for command in (["format", "--check"], ["check", *unordered]):
        done = subprocess.run(
            [
                ruff,
                *command,
                *settings,
                "--exclude",
                "repro",
                "--no-cache",
                ".",
            ],  # the engine has shorter lines: make lint
            cwd=project,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_its_workflow_calls_targets_that_its_makefile_has(rendered):
    _, project = rendered
    jobs = yaml.safe_load((project / ".github/workflows/test.yml").read_text())["jobs"]
    called = [step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "run" in step]
    named = re.findall(r"^make (\w+)$", (project / "README.md").read_text(), re.MULTILINE)
    targets = set(re.findall(r"^([a-z-]+):", (project / "Makefile").read_text(), re.MULTILINE))
    assert called == ["test", "preflight"]
    assert set(called) | set(named) <= targets


INSTALLED = "generative"
"""The preset that is installed for its tests. To install another would say the same again, as the next test holds."""


def test_presets_are_installed_alike_but_for_their_dependencies(rendered, template, tmp_path):
    _, project = rendered
    other = render(template, tmp_path / "my-paper", preset=INSTALLED)
    told = [tomllib.loads((one / "pyproject.toml").read_text(encoding="utf-8")) for one in (project, other)]
    libraries = [one["project"].pop("dependencies") for one in told]
    assert told[0] == told[1] and set(libraries[0]) <= set(libraries[1])


@pytest.mark.slow
def test_it_passes_its_own_tests(rendered, tmp_path):
    """Its preflight among them; of one preset in an environment of its own."""
    preset, project = rendered
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    done = in_an_environment(tmp_path, project, *tests) if preset == INSTALLED else in_project(project, *tests)
    assert done.returncode == 0, done.stdout + done.stderr


def in_an_environment(folder: Path, project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python ...` where the project is installed, and which sees the libraries of this environment but not its packages."""
    venv.create(folder / "venv", with_pip=False)
    own = folder / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (own / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")  # and the tools
    python = str(folder / "venv" / "bin" / "python")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."]
    for asked in (install, arguments):
        done = subprocess.run([python, *asked], cwd=project, capture_output=True, text=True, timeout=LONGEST_S)
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_full_run_of_the_toy_earns_no_verdict(rendered):
    _, project = rendered
    runs = [["run", "*", "--seeds", seed] for seed in "012"]  # at once they would be a new Python each
    for command in (*runs, ["report", "--note", "--checklist", "--html"]):
        done = in_project(project, "-m", "repro_tools", *command)
        assert done.returncode == 0, done.stderr
    claims = json.loads((project / "reports/results.json").read_text())["claims"]
    assert {(claim["verdict"], "to be filled in" in claim["reason"]) for claim in claims} == {("inconclusive", True)}
    assert len(list((project / "reports/figures").glob("*.png"))) == 2


@pytest.mark.slow
def test_its_notebook_runs(rendered):
    _, project = rendered
    folder = project / "notebooks"
    notebook = nbformat.read(folder / "first-look.ipynb", as_version=4)
    NotebookClient(notebook, timeout=LONGEST_S, resources={"metadata": {"path": str(folder)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1


def made(project: Path, *arguments: str) -> str:
    """What make prints in a project."""
    return subprocess.run(["make", *arguments], cwd=project, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("named", "asked"), [((), "'*'"), (("EXPERIMENTS=small large",), "'small' 'large'")])
def test_make_run_takes_every_experiment_or_those_that_are_named(template, tmp_path, named, asked):
    project = render(template, tmp_path / "my-paper")
    done = made(project, "-n", "run", *named)
    assert f"\n.venv/bin/repro run {asked} --seeds 0 1 2 --resume\n" in done


def test_make_notebook_takes_the_data_cell_that_is_there(template, tmp_path):
    project = render(template, tmp_path / "my-paper")

    def shown() -> bool:
        return "--data-cell notebooks/data.py" in made(project, "-n", "notebook")

    assert not shown()
    (project / "notebooks/data.py").write_text("")
    assert shown()
