"""The project that a command is about, and the engine in it: found and checked before anything of either is imported.

A project carries its engine, the folder `repro/`, and the tools come from outside. So which engine is imported follows from where the
command is given, and the tools say at once when it is not one that they know.
"""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERFACES = (2,)
"""The values of `repro.INTERFACE` that these tools work with."""


class NoEngine(Exception):
    """No engine can be used here. One line: the file, what was found, what was expected."""


def use_engine(start: Path) -> None:
    """Puts the engine and the method of the project at or above `start` first on Python's path, and imports the engine's top.

    `root` in [tool.repro] (default ".") is the folder of the method, `engine` (default: that of `root`) the one in which repro/ lies.
    Where none lies there and no `engine` is given, one that is installed will do. Raises NoEngine.
    """
    pyproject, table = _table(start)
    root = pyproject.parent / str(table.get("root", "."))
    engine = pyproject.parent / str(table["engine"]) if "engine" in table else root
    top = engine / "repro" / "__init__.py"
    if "engine" in table and not top.is_file():
        raise NoEngine(f"{pyproject}: tool.repro.engine: found no {top}, expected the engine there")
    first = [str(engine), str(root)] if top.is_file() else [str(root)]
    sys.path[:] = [*dict.fromkeys(first), *(path for path in sys.path if path not in first)]
    try:
        repro = importlib.import_module("repro")
    except ImportError:
        repro = None
    if repro is None or repro.__file__ is None:  # a folder of that name without code is a module too
        raise NoEngine(f"{pyproject}: found no engine in {engine} and none installed, expected its folder repro/ there")
    if top.is_file() and not top.samefile(repro.__file__):
        found = Path(repro.__file__).parent
        raise NoEngine(f"{pyproject}: found the kit of {found} running, expected {top.parent}")
    interface = getattr(repro, "INTERFACE", None)
    if interface not in INTERFACES:
        known = " or ".join(map(str, INTERFACES))
        raise NoEngine(
            f"{repro.__file__}: INTERFACE: found {interface}, expected {known}; take tools and engine of one version"
        )


def _table(start: Path) -> tuple[Path, dict[str, Any]]:
    """The nearest pyproject.toml with a [tool.repro] table, and the table."""
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            try:
                tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
                raise NoEngine(f"{path}: no TOML: {error}") from None
            table = tools.get("repro") if isinstance(tools, dict) else None
            if table is not None and not isinstance(table, dict):
                raise NoEngine(f"{path}: tool.repro: found {table!r}, expected a table")
            if table is not None:
                return path, table
    raise NoEngine(f"{start}: found no pyproject.toml with a [tool.repro] table here or above, expected one")


def resolved(given: Callable | str, field: str) -> Callable:
    """A function of a Method that may be named by "package.module:function", because it needs what the engine does without.

    Raises BadInput when there is none by that name; what the module needs and is not installed is told as that.
    """
    from repro.errors import BadInput

    if callable(given):
        return given
    module, colon, name = given.partition(":")
    expected = "expected 'package.module:function'"
    if not colon:
        raise BadInput(f"Method.{field}: found {given!r}, {expected}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"Method.{field}: found {given!r} ({error}), {expected} that can be imported") from None
    if not callable(found):
        raise BadInput(f"Method.{field}: found {type(found).__name__} in {given!r}, {expected}")
    return found
