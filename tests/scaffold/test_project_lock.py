"""The locks of a project: one version of each package, held by hashes, of everything that its setup installs."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rendering import PRESETS, ROOT, render

from bundle import lock

NAMES = ("torch-cpu", "torch-cuda", "engine", "tools")
ENTRY = re.compile(r"([a-z0-9-]+)(={2,3})([\w.+]+)(?: ; ([^\\\n]+?))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)")


def entries(name: str) -> list[tuple[str, ...]]:
    """Package, operator, version, marker and hashes of each requirement. A line that is none of one fails."""
    text = (lock.LOCKS / f"{name}.lock").read_text(encoding="utf-8")
    head, rest = text.split("\n", 1)
    found = list(ENTRY.finditer(rest))
    assert head.startswith("# ") and "\n".join(one[0] for one in found) + "\n" == rest
    return [one.groups() for one in found]


@pytest.fixture(scope="module")
def locked() -> dict[str, Version]:
    """What `make setup TORCH=cpu` installs, by name."""
    return {
        name: Version(version) for part in ("torch-cpu", "engine", "tools") for name, _, version, *_ in entries(part)
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_requirement_is_exact_and_has_hashes(name):
    assert entries(name)


def test_no_package_is_locked_twice():
    common = [one[0] for part in ("torch-cuda", "engine", "tools") for one in entries(part)]
    assert len(common) == len(set(common))
    assert [one[0] for one in entries("torch-cpu")] == ["torch", "torch"]


def test_the_versions_are_those_that_this_repository_is_tested_with(locked):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    tested = {canonicalize_name(name): Version(version) for name, version in tested.items()}
    differing = {
        name: str(found) for name, found in locked.items() if name in tested and found.public != str(tested[name])
    }
    assert differing == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_all_that_a_project_declares_is_locked(template, tmp_path, locked, preset):
    made = tomllib.loads((render(template, tmp_path / "my-paper", preset=preset) / "pyproject.toml").read_text())
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    of_the_engine = {one[0] for part in ("torch-cpu", "engine") for one in entries(part)}
    for one in map(Requirement, [*made["project"]["dependencies"], *made["build-system"]["requires"]]):
        assert canonicalize_name(one.name) in of_the_engine
    extras = [one for extra in made["project"]["optional-dependencies"].values() for one in extra]
    for one in map(Requirement, [*made["project"]["dependencies"], *extras, *tools]):
        assert one.specifier.contains(locked[canonicalize_name(one.name)]), one


def test_what_the_locked_packages_need_is_locked(locked):
    """Of those that are installed here, in the environment that this is."""
    lacking = []
    for name in locked:
        try:
            needed = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # of another platform
            continue
        for one in needed:
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                found = locked.get(canonicalize_name(one.name))
                if found is None or not one.specifier.contains(found):
                    lacking.append(f"{name}: {one}: {found}")
    assert lacking == []


def test_the_builds_of_torch_are_two_of_one_version():
    linux, darwin = entries("torch-cpu")
    (cuda,) = [one for one in entries("torch-cuda") if one[0] == "torch"]
    assert linux[1:4] == ("==", f"{lock.TORCH}+cpu", "sys_platform == 'linux'")
    # Exactly that text: a CPU build that is there, or that an index offers, must not do for the other.
    assert darwin[1:4] == ("===", lock.TORCH, "sys_platform == 'darwin'") and cuda[1:4] == ("===", lock.TORCH, None)

    def hashes(one):
        return set(re.findall(r"[0-9a-f]{64}", one[4]))

    assert hashes(darwin) < hashes(cuda) and not hashes(linux) & hashes(cuda)
