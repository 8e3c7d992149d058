"""The wheel of the tools: one, whether it is built from the clone, from the skill, or packed for a project."""

import subprocess
import sys
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from rendering import ROOT

from bundle.build import build
from repro_tools.wheel import packed

WITHOUT = {"torch", "torchvision", "torch-fidelity", "geomloss", "pykeops", "pot"}


def built(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def of_the_clone(tmp_path_factory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("clone"))


def files(archive) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/RECORD")}


def test_the_skill_and_the_clone_give_the_same_bytes(of_the_clone, tmp_path):
    # A .gitignore above the skill, such as that of somebody who keeps the home folder in git, must not empty the wheel.
    (tmp_path / ".gitignore").write_text("*\n")
    skill = build(ROOT, tmp_path / "dist")
    assert built(skill, tmp_path / "wheels").read_bytes() == of_the_clone.read_bytes()


def test_what_a_project_carries_has_the_same_code_and_template(of_the_clone):
    def code(found: dict[str, bytes]) -> dict[str, bytes]:
        return {name: text for name, text in found.items() if name.startswith("repro_tools/")}

    wheel = packed()
    assert code(files(BytesIO(wheel.contents))) == code(files(of_the_clone))
    assert wheel.name == of_the_clone.name
    assert {Path(name).name for name in files(BytesIO(wheel.contents)) if ".dist-info/" in name} == {
        "METADATA", "WHEEL", "entry_points.txt", "LICENSE",
    }  # fmt: skip


def test_two_packings_give_the_same_bytes():
    assert packed() == packed()


def test_it_holds_what_copier_reads_and_nothing_of_a_cache(of_the_clone):
    names = set(files(of_the_clone))
    wanted = {"copier.yml", "LICENSE", "templates/answers.jinja", "templates/reproduction/.github/workflows/test.yml"}
    assert {f"repro_tools/template/{name}" for name in wanted} <= names
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []


def test_an_installation_needs_neither_torch_nor_the_papers_libraries():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert not {one.partition(">")[0].strip().lower() for one in declared} & WITHOUT
