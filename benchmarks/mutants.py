"""How many small changes of the core modules a test notices: the score of mutmut.

    pip install mutmut==3.8.0
    python -m benchmarks.mutants FOLDER      a quarter of an hour on one core; an interrupted run goes on
    python -m benchmarks.mutants --page      write the table of refs/coverage.md from the results, measure nothing

mutmut knows packages only at the root of a project. So this copies the repository into FOLDER, puts `repro` and `nsgf` at its root beside `repro_tools` and links to
them from where they were. Results go to benchmarks/results/mutants.json, with every mutant that survived.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from repro.run import git_commit
from repro.runtime import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/mutants.json"
PAGE = ROOT / "refs/coverage.md"
MARKS = ("<!-- measured:mutmut -->", "<!-- /measured:mutmut -->")
PACKAGES = {"repro": "templates/reproduction/repro", "nsgf": "reference_impl/nsgf", "repro_tools": "repro_tools"}

MODULES = (
    "nsgf/sinkhorn.py", "nsgf/flow.py", "nsgf/metrics.py", "nsgf/sample.py", "repro/randomness.py",
    "repro_tools/report/judge.py", "repro_tools/report/statistics.py",
)  # fmt: skip
"""What a wrong character in would make a result wrong without an error."""

TESTS = (
    "tests/nsgf/test_sinkhorn.py", "tests/nsgf/test_flow.py", "tests/nsgf/test_metrics.py", "tests/nsgf/test_frechet.py",
    "tests/nsgf/test_sample.py", "tests/engine/test_step.py", "tests/engine/test_steps.py",
    "tests/engine/test_loop.py", "tests/engine/test_randomness.py",
    "tests/tools/test_statistics.py", "tests/tools/test_report.py",
)  # fmt: skip
MISTAKES = ["01", "02", "12", "13", "15", "16", "17", "18", "19", "20", "21", "22", "23", "24", "25"]
"""The entries that are about these modules and take seconds; all of them would take hours."""


def lay_out(folder: Path) -> None:
    """A copy of what git knows, both packages at its root, and mutmut's settings in its pyproject.toml."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for package, place in PACKAGES.items():
        if package == place:
            continue
        shutil.move(folder / place, folder / package)
        (folder / place).symlink_to(os.path.relpath(folder / package, (folder / place).parent))
    proofs = [str(path.relative_to(folder)) for n in MISTAKES for path in folder.glob(f"tests/mistakes/test_m{n}_*.py")]
    others = sorted({name.split("/")[0] for name in listed.split("\0") if name} - {"tests", "pyproject.toml"})
    settings = {
        "source_paths": list(PACKAGES),
        "only_mutate": list(MODULES),
        "also_copy": [name for name in others if not name.startswith(".")],
        "pytest_add_cli_args": ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"],
        "pytest_add_cli_args_test_selection": [*TESTS, *proofs],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    project = folder / "pyproject.toml"
    text = project.read_text().replace('testpaths = ["tests"]', 'testpaths = ["tests"]\npythonpath = ["."]')
    project.write_text("\n".join([text, "[tool.mutmut]", *lines, ""]))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def mutmut(folder: Path, *words: str, capture: bool = False) -> str:
    # One thread: a fork of a process whose libraries have threads waits for them forever.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("mutmut")), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=capture, text=True)
    return done.stdout if capture else ""


def gather(folder: Path) -> dict[str, dict]:
    """By module: counts of mutants by what became of them, and the changed lines of those that survived."""
    found: dict[str, dict] = {}
    for line in mutmut(folder, "results", "--all", "true", capture=True).splitlines():
        name, _, fate = line.strip().partition(": ")
        module = re.sub(r"\.x.*", "", name)
        one = found.setdefault(module, {"counts": Counter(), "survivors": {}})
        one["counts"][fate] += 1
        if fate == "survived":
            shown = mutmut(folder, "show", name, capture=True).splitlines()
            change = [text for text in shown if re.match(r"[-+](?![-+]{2})", text)]
            one["survivors"][name.removeprefix(f"{module}.")] = change
    return {module: found[module] for module in sorted(found)}


def page_table(results: Mapping) -> str:
    """The table as it stands in refs/coverage.md."""
    lines = ["| module | mutants | noticed | survived |", "|---|---|---|---|"]
    whole = Counter()
    for module, one in results["modules"].items():
        whole.update(one["counts"])
        lines.append(_row(f"`{module}`", one["counts"]))
    return "\n".join([*lines, _row("all", whole)])


def _row(name: str, counts: Mapping[str, int]) -> str:
    mutants, survived = sum(counts.values()), counts.get("survived", 0)
    noticed = sum(count for fate, count in counts.items() if fate in ("killed", "timeout", "segfault"))
    return f"| {name} | {mutants} | {noticed} ({noticed / mutants:.0%}) | {survived} |"


def write_page(results: Mapping) -> None:
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{page_table(results)}\n\n{MARKS[1]}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--page", action="store_true", help="write the table, measure nothing")
    parser.add_argument("--gather", action="store_true", help="read what mutmut has left in FOLDER, run nothing")
    options = parser.parse_args(arguments)
    if not options.page:
        if options.folder is None:
            parser.error("found no FOLDER, expected one to work in, or --page")
        if not options.gather:
            if not options.folder.exists():
                lay_out(options.folder)
            mutmut(options.folder, "run", "--max-children", "1")
        data = {"commit": git_commit(ROOT), "machine": machine(torch.device("cpu")), "torch": torch.__version__}
        data["modules"] = gather(options.folder)
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    write_page(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
