"""`repro probe`: calls every library as the method calls it, with the shapes of every experiment, and checks what it answers.

A call that accepts a shape may still read it as something else, so a probe holds an answer that was constructed: a
translation, two Diracs, a permutation (SKILL section 2).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from repro import __main__ as command_line
from repro.config import load
from repro.errors import EXIT_OK, EXIT_RUN_FAILED
from repro.method import Probe, Project, find_project
from repro.randomness import seed_global_generators
from repro.runtime import Runtime, progress
from repro_tools.failure import describe
from repro_tools.project import resolved
from repro_tools.table import in_patterns, table, wrapped


@dataclass(frozen=True)
class Probed:
    """One library call with one set of shapes, made once for all `experiments` that have it. `error` is None when it is fine."""

    name: str
    library: str
    version: str | None
    shapes: str
    experiments: tuple[str, ...]
    seconds: float
    error: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Calls every library with the shapes of every experiment and checks one constructed answer of each."
    )
    parser.epilog = "example: repro probe '2d-*' --json"
    command_line.add(parser, "experiments", **command_line.EVERY)
    command_line.add(parser, "--set", "--train-iters", "--data-root", "--json")


def command(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    names, overrides = command_line.names(project, options.experiments), command_line.overrides(options)
    configs = {name: load(project.config_class(name), project.experiments()[name], overrides)[0] for name in names}
    found = probe(project, configs, Runtime(torch.device("cpu"), options.data_root, stand_in_data=True))
    if options.json:
        print(json.dumps({"probes": [asdict(one) for one in found]}, indent=1))
    else:
        print(page(found, project.experiments()))
    return EXIT_RUN_FAILED if any(one.error for one in found) else EXIT_OK


def probe(project: Project, configs: dict[str, Any], runtime: Runtime) -> list[Probed]:
    """Every probe of the experiments, each name with the same shapes once."""
    asked: dict[tuple[str, str, str], tuple[Probe, dict[str, None]]] = {}
    failed: list[Probed] = []
    probes = resolved(project.method.probes, "probes")
    for experiment, config in configs.items():
        try:
            for one in probes(config, runtime):
                asked.setdefault((one.name, one.library, one.shapes), (one, {}))[1][experiment] = None
        except Exception as error:
            failed.append(Probed("(making the probes)", "", None, "", (experiment,), 0.0, describe(error)))
    return failed + [_call(one, experiments) for one, experiments in progress(asked.values(), "probes")]


def _call(one: Probe, experiments: Iterable[str]) -> Probed:
    began, version, error = time.perf_counter(), None, None
    try:
        version = metadata.version(one.library)
    except metadata.PackageNotFoundError:
        error = f"found no distribution '{one.library}', expected it installed; `pip list` has the names"
    # The same draws whatever was called before; and a library may leave gradients switched on or print on stdout.
    seed_global_generators("probe", one.name, one.shapes)
    try:
        with redirect_stdout(sys.stderr), torch.set_grad_enabled(True):
            one.call()
    except Exception as problem:
        error = describe(problem) if error is None else f"{error}; {describe(problem)}"
    return Probed(one.name, one.library, version, one.shapes, tuple(experiments), time.perf_counter() - began, error)


def page(found: Sequence[Probed], known: Iterable[str]) -> str:
    """The table that a reader sees, and what it comes to. `known` are all experiments of the project."""
    known = list(known)
    if not found:
        return "no probes: give the Method `probes`, one for each library call (repro/method.py, Probe)"
    rows = [
        [
            one.name,
            f"{one.library} {one.version or '-'}",
            one.shapes,
            in_patterns(one.experiments, known),
            "ok" if one.error is None else "FAILED",
        ]
        for one in found
    ]
    lines = [table(["probe", "library", "shapes", "experiments", "result"], rows), ""]
    broken = [one for one in found if one.error]
    for one in broken:
        what = ", ".join(filter(None, [one.name, one.shapes, in_patterns(one.experiments, known)]))
        lines += wrapped(f"FAILED {what}: {one.error}", "       ")
    seconds = sum(one.seconds for one in found)
    lines.append(f"{len(found)} probes, {len(broken)} failed; {seconds:.1f} s")
    return "\n".join(lines)


def only(found: Iterable[Probed], experiment: str) -> list[Probed]:
    """The probes of one experiment."""
    return [replace(one, experiments=(experiment,)) for one in found if experiment in one.experiments]
