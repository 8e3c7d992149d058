"""A template to render projects from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rendering import make_template, render


@pytest.fixture(autouse=True, scope="session")
def git_without_settings_of_the_user() -> Iterator[None]:
    """Such as to sign every commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        yield


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    return make_template(tmp_path_factory.mktemp("template") / "paper-reproduction")


@pytest.fixture
def project(template, tmp_path) -> Callable[..., Path]:
    """Renders a project into a fresh folder."""
    return lambda **answers: render(template, tmp_path / "my-paper", **answers)
