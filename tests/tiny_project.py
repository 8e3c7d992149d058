"""Projects of one shipped NSGF++ experiment, so small that every phase and the evaluation take a third of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from repro.config import read_yaml
from repro.method import find_project

TRAINING = {"iterations": 5, "batch_size": 8}
POOL = {"batches": 3, "batch_size": 8}
FLOW = {"steps": 2, "step_size": 0.5}
PLUS_PLUS = {"sinkhorn_steps": 1, "straight_flow_step": 0.5}
PACE = {"log_every": 2, "checkpoint_every": 2}
UNET = {
    "channels": 4, "blocks": 1, "multipliers": [1], "heads": 1, "head_channels": None, "attention_resolutions": [],
    "dropout": 0.1, "groups": 2,
}  # fmt: skip
OPTIONS = {"warmup_steps": 3, "clip_norm": 0.5, "ema_decay": 0.5}

DIGITS = {
    "phases": {
        "velocity_field": {**TRAINING, **OPTIONS, "network": UNET, "flow": FLOW, "pool": POOL},
        "straight_flow": {**TRAINING, "precision": "fp16", "ema_decay": 0.5, "network": UNET},
        "time_predictor": {**TRAINING, "warmup_steps": 4, "network": {"channels": [2, 2]}},
        "feature_classifier": {**TRAINING, "network": {"channels": [2, 2]}},
    },
    "nsgf_plus_plus": PLUS_PLUS,
    "evaluation": {
        "samples": 8, "batch_size": 8, "euler_steps": [2], "handover_times": [0.5], "nearest": 4, "pictures": 2,
        "inception": False,
    },
    "pace": PACE,
}  # fmt: skip
"""Phases 1 and 2 use every option of a step between them: dropout, average, warm-up, clipping, a scaled loss."""

MLP = {"width": 8, "hidden_layers": 1, "activation": "silu"}
POINTS = {
    "phases": {
        "velocity_field": {**TRAINING, "network": MLP, "flow": FLOW, "pool": POOL},
        "straight_flow": {**TRAINING, "network": MLP},
        "time_predictor": {**TRAINING, "network": MLP},
        "velocity_field_100": {**TRAINING, "network": MLP, "flow": FLOW, "pool": POOL},
        "ot_cfm": {**TRAINING, "network": MLP},
    },
    "nsgf_plus_plus": PLUS_PLUS,
    "evaluation": {"test_points": 16, "euler_steps": [2], "floor_draws": 1, "path_points": 4},
    "pace": PACE,
}


def write_project(root: Path, experiment: str, changes: dict[str, Any]) -> Path:
    """A project of the shipped experiment with `changes`, nested as in its configuration, and a spec of one claim."""
    config = merged(read_yaml(find_project(Path(__file__).parent).experiments()[experiment]), changes)
    (root / "configs").mkdir(parents=True)
    (root / "configs" / f"{experiment}.yaml").write_text(yaml.safe_dump(config))
    (root / "spec.yaml").write_text(yaml.safe_dump(spec(experiment)))
    (root / "pyproject.toml").write_text('[tool.repro]\nmethod = "nsgf.method:METHOD"\n')
    return root


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return config | {
        key: merged(config[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def spec(experiment: str) -> dict[str, Any]:
    paper = {"title": "Tiny", "authors": ["Nobody"], "arxiv": "0000.00000", "version": "v1"}
    claim = {
        "id": "tiny", "statement": "The number of steps is one.", "where": "page 1", "experiment": experiment,
        "kind": "equal", "metric": "nsgf.nfe", "divided_by": None, "reported": 1.0, "floor": None, "tolerance": "wide",
    }  # fmt: skip
    return {
        "paper": {**paper, "url": "https://arxiv.org/abs/0000.00000"},
        "level": "conceptual",
        "seeds": [0],
        "tolerances": {"wide": {"reproduced": 0.5, "close": 1.0, "why": "chosen for the test"}},
        "claims": [claim],
        "settings": [],
        "deviations": [],
        "not_attempted": [],
    }
