"""An exception of the user's code in one line: what it says, and the line of their code that it came from."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import repro
from repro.errors import BadInput, RunFailed

OURS = (Path(__file__).parent, Path(repro.__file__).parent)
LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
LONGEST = 300


def describe(error: BaseException) -> str:
    """`Kind: message (file:line)`; the line is the innermost one that is neither the engine's, the tools' nor a library's.

    An assertion without a message is told by its source. BadInput and RunFailed say all by themselves.
    """
    if isinstance(error, BadInput):
        return "; ".join(error.problems)
    if isinstance(error, RunFailed):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(Path(frame.filename))]
    told = own or frames
    frame = told[-1] if told else None
    message = " ".join(str(error).split())
    if not message and isinstance(error, AssertionError) and frame and frame.line:
        message = frame.line
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 3]}..."
    return f"{text} ({place(Path(frame.filename), frame.lineno)})" if frame else text


def place(path: Path, line: int | None) -> str:
    """`file:line`, the file relative to the working directory where it lies below it."""
    path = path.absolute()
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}"


def _is_users(path: Path) -> bool:
    if not path.is_file():  # <string>, <frozen importlib>
        return False
    path = path.absolute()
    return not (
        any(path.is_relative_to(folder) for folder in (*OURS, *LIBRARIES))
        or {"site-packages", "dist-packages"} & set(path.parts)
    )
