"""The files of a toy project for the tests of engine and tools."""

import os
from pathlib import Path

import yaml

import repro
import repro_tools

CONFIG = {
    "experiment": "toy",
    "pool_size": 64,
    "phases": {
        "line": {"iterations": 12, "batch_size": 8, "learning_rate": 1e-2},
        "constant": {"iterations": 9, "batch_size": 4, "learning_rate": 1e-2},
    },
    "pace": {"log_every": 3, "checkpoint_every": 5},
}
SPEC = {
    "paper": {
        "title": "Toy",
        "authors": ["Nobody"],
        "arxiv": "0000.00000",
        "version": "v1",
        "url": "https://arxiv.org/abs/0000.00000",
    },
    "level": "conceptual",
    "seeds": [0, 1],
    "tolerances": {"wide": {"reproduced": 0.5, "close": 1.0, "why": "chosen for the test"}},
    "claims": [
        {
            "id": "constant",
            "statement": "The constant is three.",
            "where": "page 1",
            "experiment": "toy",
            "kind": "equal",
            "metric": "constant.value",
            "divided_by": None,
            "reported": 3.0,
            "floor": None,
            "tolerance": "wide",
        }
    ],
    "settings": [
        {
            "name": "pool",
            "experiments": "toy",
            "key": "pool_size",
            "value": 64,
            "origin": "paper",
            "where": "page 1",
            "alternatives": [],
            "why": "given",
        }
    ],
    "deviations": [],
    "not_attempted": [],
}


def write_yaml(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def python_path() -> str:
    """PYTHONPATH of a process of its own: the toy methods, and the engine and the tools that are tested here."""
    folders = [Path(__file__).parent, *(Path(one.__file__).parents[1] for one in (repro, repro_tools))]
    return os.pathsep.join(str(folder.resolve()) for folder in folders)
