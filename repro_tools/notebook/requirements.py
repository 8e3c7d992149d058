"""What a notebook installs for a project, and what it cannot know that the project needs."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REQUIREMENTS = ("torch", "numpy", "scipy", "pydantic", "pyyaml", "safetensors", "tqdm")
"""What the kit needs."""

IMPORTED_AS = {"pyyaml": "yaml"}
"""Of these, the names that differ in an import."""

PASSED_OVER = {"repro", "tests", "build", "dist", "node_modules", "__pycache__", "runs"}
"""Folders without code of the project that a run needs, beside hidden ones and virtual environments."""


def declared(pyproject: Mapping[str, Any]) -> list[str] | None:
    """The `dependencies` of a pyproject.toml; None where it declares none."""
    found = pyproject.get("project", {}).get("dependencies")
    return None if found is None else list(found)


def requirements(pyproject: Mapping[str, Any]) -> list[str]:
    """What the kit needs and what the project declares, which is the more exact where both name a package."""
    own = declared(pyproject) or []
    named = {_name(one) for one in own}
    return [*own, *(one for one in REQUIREMENTS if one not in named)]


def imports_beyond_the_kit(folder: Path) -> list[str]:
    """Top-level modules that the .py files in `folder` import, and that are neither Python's, nor the kit's, nor the project's own.

    Nothing is executed; a file that is no Python is passed over.
    """
    files = list(_files(folder))
    own = {"repro", *(path.stem for path in files), *(path.parent.name for path in files)}
    known = own | set(sys.stdlib_module_names) | {IMPORTED_AS.get(one, one) for one in REQUIREMENTS}
    return sorted({name for path in files for name in _imports(path)} - known)


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = [
            one
            for one in folders
            if one not in PASSED_OVER and not one.startswith(".") and not (here / one / "pyvenv.cfg").exists()
        ]
        yield from (here / one for one in names if one.endswith(".py"))


def _imports(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name.partition(".")[0] for one in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def _name(requirement: str) -> str:
    """The package of a requirement, as indices compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]).lower()
