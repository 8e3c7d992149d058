"""Which engine the tools take: that of the project in which the command is given, and no other."""

import subprocess
import sys

import pytest
from toy_project import python_path

import repro
from repro_tools.cli import main
from repro_tools.project import INTERFACES

ENGINE = "import sys\nINTERFACE = {interface}\n"
ASK = (
    "import sys; from pathlib import Path; from repro_tools.project import use_engine; use_engine(Path.cwd()); "
    "import repro; print(repro.__file__); print(*sys.path[:2], sep='\\n')"
)


def engine_in(folder, interface=INTERFACES[0]):
    (folder / "repro").mkdir(parents=True)
    (folder / "repro/__init__.py").write_text(ENGINE.format(interface=interface))


def table(project, *lines):
    (project / "pyproject.toml").write_text("\n".join(["[tool.repro]", 'method = "toy_method:METHOD"', *lines]))


def told(project, capsys):
    assert main(["list"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("lines", "place"), [((), "."), (('root = "inner"',), "inner"), (('root = "inner"', 'engine = "kept"'), "kept")]
)
def test_the_engine_of_the_project_comes_first(project, lines, place):
    (project / "inner").mkdir()
    engine_in(project / place)
    table(project, *lines)
    environment = {"PYTHONPATH": python_path(), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=project, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[:2] == [
        str(project / place / "repro/__init__.py"), str(project / place)
    ], done.stderr  # fmt: skip


def test_another_engine_than_the_project_s_is_refused(project, capsys):
    engine_in(project / "kept")
    table(project, 'engine = "kept"')
    expected = f"found the kit of {repro.__path__[0]} running, expected {project / 'kept/repro'}"
    assert told(project, capsys).endswith(expected)


def test_an_engine_that_is_not_where_it_was_said_to_be_is_named(project, capsys):
    table(project, 'engine = "gone"')
    assert f"tool.repro.engine: found no {project / 'gone/repro/__init__.py'}, expected" in told(project, capsys)


@pytest.mark.parametrize("interface", [1, INTERFACES[-1] + 1, None])
def test_an_engine_of_another_interface_is_refused_in_one_line(project, capsys, monkeypatch, interface):
    monkeypatch.setattr(repro, "INTERFACE", interface)
    assert f"{repro.__file__}: INTERFACE: found {interface}, expected {INTERFACES[0]}" in told(project, capsys)


def test_without_an_engine_one_line_says_so(project):
    environment = {"PYTHONPATH": python_path().split(":")[-1], "PATH": ""}
    command = [sys.executable, "-S", "-m", "repro_tools", "list"]  # -S: without what is installed
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"repro: {project / 'pyproject.toml'}: found no engine in {project} and none installed"
    )


def test_an_engine_is_found_from_a_folder_below(project, capsys, monkeypatch):
    (project / "notes").mkdir()
    monkeypatch.chdir(project / "notes")
    assert main(["list"]) == 0
    assert capsys.readouterr().out.startswith("toy: ")
