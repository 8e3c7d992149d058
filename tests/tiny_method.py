"""A project on disk whose one phase counts its steps: the weight begins at 0 and grows by 1. A run takes a few hundredths of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import PositiveInt
from torch import nn

from repro import run
from repro.config import RunConfig, Section
from repro.method import Evaluation, Method, Project
from repro.phases import SingleLossPhase
from repro.runtime import Runtime
from repro_tools import gate
from repro_tools.spec import load_spec

STEPS, LOWEST = 6, 3
"""Steps of the shipped configuration, and the weight at which the loss is lowest: it is not the last one."""
OFF = {0: 1.0, 1: 1.1, 2: 1.4, 3: 0.5}
"""What each seed measures, as a multiple of the weight."""
CONFIG = {
    "experiment": "count",
    "phases": {"steps": {"iterations": STEPS}},
    "pace": {"log_every": 1, "checkpoint_every": 2},
}
SPEC = {
    "paper": {"title": "T", "authors": ["A"], "arxiv": "none", "version": "v1", "url": "none"},
    "level": "conceptual",
    "seeds": [0, 1, 2],
    "tolerances": {
        "narrow": {"reproduced": 0.05, "close": 0.5, "why": "chosen for the test"},
        "other": {"reproduced": 0.05, "close": 0.5, "why": "of no claim so far"},
    },
    "claims": [
        {
            "id": "count", "statement": "The weight counts the steps.", "where": "page 1", "experiment": "count", "kind": "equal",
            "metric": "weight", "divided_by": None, "reported": 6.0, "floor": None, "tolerance": "narrow",
        }
    ],
    "settings": [
        {
            "name": "steps", "experiments": "count", "key": "phases.steps.iterations", "value": STEPS, "origin": "paper",
            "where": "page 1", "alternatives": [], "why": "given",
        }
    ],
    "deviations": [],
    "not_attempted": [],
}  # fmt: skip
ORIGIN = {
    "command": "repro run count", "commit": "abc", "versions": {}, "processes": 1, "started": "2026-01-01T00:00:00+00:00",
    "machine": {"processor": "p", "cores": 2, "threads": 1, "device": "cpu"},
}  # fmt: skip
"""What a record says of its origin. To look up the versions of all packages takes a second."""


class Training(Section):
    iterations: PositiveInt


class Phases(Section):
    steps: Training


class Config(RunConfig):
    phases: Phases


class Count(SingleLossPhase):
    name = "steps"

    def __init__(self, config: Config):
        self.iterations = config.phases.steps.iterations

    def make_model(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=1.0)

    def minibatch(self, step, generator):
        return {"x": torch.ones(1, 1)}

    def loss(self, model, batch):
        out = model(batch["x"]).mean()
        # The distance to LOWEST, with the gradient -1 everywhere.
        return (out.detach() - LOWEST).abs() + out.detach() - out


def evaluate(config, models, seed, runtime):
    return Evaluation({"weight": OFF[seed] * float(models["steps"]["model"].weight)}, {})


METHOD = Method("count", Config, lambda config, runtime: [Count(config)], evaluate, lambda *_: "")


def write_project(root: Path, **changes: Any) -> Project:
    """The project, with other parts of the spec."""
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "count.yaml").write_text(yaml.safe_dump(CONFIG))
    (root / "spec.yaml").write_text(yaml.safe_dump(SPEC | changes))
    return Project(root, METHOD)


def train(project: Project, seed: int, *overrides: str, runs: str = "runs") -> Path:
    """A run as `repro run` makes it; its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "describe", lambda *_: ORIGIN)
        plan = gate.checked_plan(project, "count", list(overrides))
        fixed = gate.gate(plan, load_spec(project.spec))
        return run.execute(plan, seed, project.root / runs, runtime(), False, None, fixed)


def runtime() -> Runtime:
    return Runtime(torch.device("cpu"), Path("data"))
