"""`make setup` of a project: which packages it takes, in which order, and when it takes them again."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from rendering import render

from repro_tools.cli import main

VENV = """#!/bin/sh
mkdir -p "$3/bin" && cp "$(dirname "$0")/python" "$3/bin/python"
"""
"""Stands for `python3 -m venv FOLDER`."""

PYTHON = """#!/bin/sh
echo "$*" >> asked.log
case "$*" in
*"pip wheel"*) mkdir -p tools && echo wheel > tools/paper_reproduction-0.1.0-py3-none-any.whl ;;
*"pip hash"*) printf 'the file:\\n--hash=sha256:00\\n' ;;
esac
if [ -n "$EDITED_DURING" ]; then case "$*" in
*"$EDITED_DURING"*) touch reference; while [ ! pyproject.toml -nt reference ]; do touch pyproject.toml; done ;;
esac; fi
if [ -n "$REFUSED" ] && echo "$*" | grep -qE -e "$REFUSED"; then exit 1; fi
"""
"""Stands for the Python of an environment: writes down what it is asked."""

GPU_HERE = Path("/proc/driver/nvidia/version").exists()


@pytest.fixture
def setup(template, tmp_path):
    """Calls make in a project whose Python only writes down what it is asked, and returns that."""
    project = render(template, tmp_path / "my-paper")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("venv", VENV), ("python", PYTHON)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def call(*arguments: str, path: str = "/usr/bin:/bin", **environment: str) -> list[str]:
        (project / "asked.log").unlink(missing_ok=True)
        command = ["make", *arguments, f"PYTHON={stubs / 'venv'}"]
        environment = {"PATH": path, "HOME": str(tmp_path), **environment}
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = project / "asked.log"
        return re.findall(r"-m pip (.*)", asked.read_text()) if asked.exists() else []

    call.project = project
    return call


def locks(asked: list[str]) -> list[str]:
    """The locks that were installed, in their order; each with pip's check of the hashes."""
    lines = [line for line in asked if line.startswith("install") and " -r " in line]
    assert all("--require-hashes" in line and "--no-deps" in line for line in lines)
    return [name for line in lines for name in re.findall(r"-r (\S+)", line)]


CPU, CUDA, ENGINE = "requirements/torch-cpu.lock", "requirements/torch-cuda.lock", "requirements/engine.lock"
TOOLS = ["requirements/tools.lock", "tools/requirements.txt"]


@pytest.mark.skipif(GPU_HERE, reason="this machine has an NVIDIA driver")
def test_without_a_gpu_it_takes_the_cpu_build(setup):
    assert locks(setup("setup")) == [CPU, ENGINE, *TOOLS]


def test_with_a_gpu_it_takes_the_other(setup, tmp_path):
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver/nvidia-smi").symlink_to("/bin/true")
    assert locks(setup("setup", path=f"{tmp_path / 'driver'}:/usr/bin:/bin")) == [CUDA, ENGINE, *TOOLS]


def test_where_no_index_has_a_cpu_build_it_asks_pytorchs_and_then_takes_pypis(setup):
    asked = setup("setup", "TORCH=cpu", REFUSED="torch-cpu.lock$")
    assert locks(asked) == [CPU, CPU, ENGINE, *TOOLS]
    assert asked[1].endswith("--index-url https://download.pytorch.org/whl/cpu")
    setup("setup", "TORCH=cuda")
    assert locks(setup("setup", "TORCH=cpu", REFUSED="torch-cpu.lock")) == [CPU, CPU, CUDA, ENGINE, *TOOLS]


def test_the_build_that_is_there_stays_until_another_is_asked_for(setup):
    assert locks(setup("setup", "TORCH=cuda"))[0] == CUDA
    assert setup("setup") == [] and setup("setup", "TORCH=cuda") == []
    assert locks(setup("setup", "TORCH=cpu")) == [CPU, ENGINE, *TOOLS]
    assert setup("setup") == []


def test_the_engine_alone_and_the_tools_when_a_command_needs_them(setup):
    alone = setup("setup", "ENGINE_ONLY=1", "TORCH=cpu")
    assert locks(alone) == [CPU, ENGINE]
    assert [line for line in alone if "report" in line] == []
    assert setup("setup", "ENGINE_ONLY=1") == []
    assert locks(setup("setup")) == TOOLS


def test_tools_that_lie_in_the_project_are_not_built(setup):
    (setup.project / "tools").mkdir()
    (setup.project / "tools/requirements.txt").write_text("./tools/there.whl --hash=sha256:00\n")
    assert [line for line in setup("setup") if line.startswith("wheel")] == []


def test_tools_that_do_not_are_built_once_and_named_with_their_hash(setup):
    (built,) = [line for line in setup("setup", "TOOLS=/somewhere") if line.startswith("wheel")]
    assert built.endswith("--wheel-dir tools /somewhere")
    line = (setup.project / "tools/requirements.txt").read_text()
    assert line == "./tools/paper_reproduction-0.1.0-py3-none-any.whl --hash=sha256:00\n"
    assert setup("setup") == []


@pytest.mark.parametrize("during", ["torch-cpu.lock", "engine.lock", "tools.lock", "[report,test]"])
def test_a_file_that_is_edited_meanwhile_is_not_taken_as_installed(setup, during):
    setup("setup", "TORCH=cpu", EDITED_DURING=during)
    assert locks(setup("setup")) == [CPU, ENGINE, *TOOLS]
    assert setup("setup") == []


def test_a_setup_that_failed_is_not_taken_as_done(setup):
    with pytest.raises(AssertionError):
        setup("setup", "TORCH=cpu", REFUSED="tools.lock")
    assert locks(setup("setup")) == TOOLS


@pytest.mark.slow
def test_a_project_is_set_up_from_its_locks_first_without_the_tools(tmp_path):
    """With pip, from an index: the engine alone trains and resumes, the tools come from the wheel, nothing is lacking."""
    project = tmp_path / "my-paper"
    assert main(["new", str(project), "--defaults"]) == 0
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PIP_COMPILE"] = "0"  # Python compiles what it imports, which is less

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = ".venv/bin/python"
    call("make", "setup", "TORCH=cpu", "ENGINE_ONLY=1")
    assert not (project / ".venv/bin/repro").exists()
    call(python, "-m", "repro", "run", "main", "--seeds", "0", "--device", "cpu")
    call(python, "-m", "repro", "run", "main", "--seeds", "0", "1", "--device", "cpu", "--resume")
    assert len(list((project / "runs").rglob("record.json"))) == 2
    call("make", "setup")
    assert "main:" in call(".venv/bin/repro", "list")
    assert "No broken requirements" in call(python, "-m", "pip", "check")
    assert sum(path.lstat().st_size for path in (project / ".venv").rglob("*")) < 2.5e9
