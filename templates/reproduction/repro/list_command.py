"""`repro list`: the experiments and their phases."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from repro.arguments import add_json
from repro.config import load
from repro.errors import EXIT_OK
from repro.method import find_project
from repro.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists the experiments and their phases."
    parser.epilog = "example: repro list --json"
    add_json(parser)


def command(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    experiments = {}
    for name, path in project.experiments().items():
        config, _ = load(project.config_class(name), path)
        phases = project.method.phases(config, Runtime(torch.device("cpu")))
        experiments[name] = {phase.name: phase.iterations for phase in phases}
    if options.json:
        print(json.dumps(experiments, indent=1))
    else:
        for name, phases in experiments.items():
            print(
                f"{name}: "
                + ", ".join(
                    f"{number} {phase} ({steps} steps)" for number, (phase, steps) in enumerate(phases.items(), start=1)
                )
            )
    return EXIT_OK
