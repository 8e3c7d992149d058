"""Writes the locks of the template: every package of a project's setup, in one version, with hashes. `make lock`.

uv resolves for every platform and Python at once, under the versions of requirements.txt; pip installs from that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import copier

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "templates/reproduction/requirements"
OF_CUDA = re.compile(r"torch|triton|cuda-.*|nvidia-.*")

TORCH = "2.13.0"
CPU_BUILDS = {
    # SHA-256 of the builds on https://download.pytorch.org/whl/cpu. That of CPython 3.11 on Linux x86_64 was computed
    # here, those for macOS are also PyPI's. The other ones are as public lock files copied them from that index, and
    # were not tried; pip refuses a file that differs.
    "linux": {
        "cp311-manylinux_2_28_aarch64": "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        "cp311-manylinux_2_28_x86_64": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "cp312-manylinux_2_28_aarch64": "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        "cp312-manylinux_2_28_x86_64": "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
        "cp313-manylinux_2_28_aarch64": "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
        "cp313-manylinux_2_28_x86_64": "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
        "cp314-manylinux_2_28_aarch64": "ca021f9eb2f8345c83fa03e3a04587308afb8df71bd472670b3ece00df58621c",
        "cp314-manylinux_2_28_x86_64": "d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691",
    },
    "darwin": {
        "cp311-macosx_14_0_arm64": "e76f9bcecc52b8ff711239a2f7547d5353df95878ab232f0773c1d95928b92f8",
        "cp312-macosx_14_0_arm64": "2fe228aba290d14b9f31b049be550dbd469c3fd3013d7a19705b30454da97027",
        "cp313-macosx_14_0_arm64": "33449899ce5496c1b84b4853179d94fd102028ae1407314d9fb956bb79e70d09",
        "cp314-macosx_14_0_arm64": "d849b390e07d8d333ce8ecaf91b273c656c598379a19c9acf1318a883f6b391c",
    },
}

WRITTEN = (
    "# Python 3.11 to 3.14, Linux and macOS. Written by `make lock` of paper-reproduction; pip checks the hashes.\n"
)
HEADS = {
    "torch-cpu": f"# torch without CUDA. {WRITTEN[2:]}",
    "torch-cuda": f"# torch as PyPI has it, and the libraries of CUDA that it needs on Linux. {WRITTEN[2:]}",
    "engine": f"# What the engine and the toy methods need beside torch. {WRITTEN[2:]}",
    "tools": f"# What the tools, the figures and the tests need besides. {WRITTEN[2:]}",
}


def main() -> int:
    if shutil.which("uv") is None:
        print("lock: found no uv on PATH, expected it; pip install uv", file=sys.stderr)
        return 2
    project = rendered_pyproject()
    engine = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    rest = [one for extra in project["project"]["optional-dependencies"].values() for one in extra]
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    whole = resolved([*engine, *rest, *tools])
    needed = resolved(engine)
    if not whole["torch"].startswith(f"torch=={TORCH} "):
        print(
            f"lock: torch: found {whole['torch'].split()[0]}, expected {TORCH}, whose CPU builds are listed",
            file=sys.stderr,
        )
        return 2
    of_cuda = {name for name in whole if OF_CUDA.fullmatch(name)}
    write("torch-cpu", [cpu_build("linux", f"=={TORCH}+cpu"), cpu_build("darwin", f"==={TORCH}")])
    # Three signs: else a CPU build of that version, which is there or which an index offers, would do.
    write("torch-cuda", [whole[name].replace(f"torch=={TORCH}", f"torch==={TORCH}") for name in sorted(of_cuda)])
    write("engine", [whole[name] for name in sorted(needed.keys() - of_cuda)])
    write("tools", [whole[name] for name in sorted(whole.keys() - needed.keys())])
    return 0


def rendered_pyproject() -> dict[str, Any]:
    """That of the preset with the most dependencies."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        copier.run_copy(str(ROOT), project, {"preset": "generative"}, defaults=True, quiet=True, vcs_ref="HEAD")
        return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))


def resolved(requirements: Iterable[str]) -> dict[str, str]:
    """The lines of each package that these need, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "asked.in").write_text("\n".join(requirements))
        options = ["--universal", "--python-version", "3.11", "--generate-hashes", "--only-binary", ":all:"]
        quiet = ["--quiet", "--no-header", "--no-annotate", "--constraint", str(ROOT / "requirements.txt")]
        command = ["uv", "pip", "compile", *options, *quiet, "asked.in"]
        text = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.findall(r"^([a-z0-9-]+)(==.*(?:\n .*)*)", text, re.MULTILINE)
    return {name: name + lines for name, lines in found if "'pypy'" not in lines}


def cpu_build(platform: str, version: str) -> str:
    hashes = [f" \\\n    --hash=sha256:{one}" for one in sorted(CPU_BUILDS[platform].values())]
    return f"torch{version} ; sys_platform == '{platform}'" + "".join(hashes)


def write(name: str, blocks: Iterable[str]) -> None:
    (LOCKS / f"{name}.lock").write_text("\n".join([HEADS[name].rstrip("\n"), *blocks, ""]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
