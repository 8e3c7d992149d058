"""A template to render projects from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rendering import make_template, render


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    return make_template(tmp_path_factory.mktemp("template") / "paper-reproduction")


@pytest.fixture
def project(template, tmp_path) -> Callable[..., Path]:
    """Renders a project into a fresh folder."""
    return lambda **answers: render(template, tmp_path / "my-paper", **answers)
