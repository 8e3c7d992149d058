from pathlib import Path

import pytest
from toy_project import CONFIG, SPEC, write_yaml


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The root of a toy project; the working directory is inside it."""
    root = tmp_path / "project"
    write_yaml(root / "configs" / "toy.yaml", CONFIG)
    write_yaml(root / "spec.yaml", SPEC)
    (root / "pyproject.toml").write_text('[tool.repro]\nmethod = "toy_method:METHOD"\n')
    monkeypatch.chdir(root)
    return root
