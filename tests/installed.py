"""What is installed, read once: every run asks which package each module is of, and to list their files takes ten times as long as a toy's run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest


def read_once(patch: pytest.MonkeyPatch) -> None:
    """From now on importlib.metadata gives the same answers, sooner from the second time on."""
    for function in (metadata.packages_distributions, metadata.version):
        patch.setattr(metadata, function.__name__, _once(function))


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[tuple[Any, ...], Any] = {}

    def answer(*arguments: str) -> Any:
        # Each project's root is a folder of its own on the path, and says nothing: no package is installed in it.
        folders = tuple(folder for folder in sys.path if _holds_packages(folder, _changed(folder)))
        if (folders, arguments) not in known:
            known[folders, arguments] = function(*arguments)
        return known[folders, arguments]

    return answer


@cache
def _holds_packages(folder: str, changed: int) -> bool:
    return any(Path(folder).glob("*-info"))


def _changed(folder: str) -> int:
    """When a file was last added to a folder, in ns; 0 for none that is there."""
    return os.stat(folder or ".").st_mtime_ns if os.path.isdir(folder or ".") else 0
