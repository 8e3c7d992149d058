"""Progress bars: on standard error, only in a terminal, only for what takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(steps: Iterable, label: str, total: int | None = None, initial: int = 0, shown: bool = True) -> tqdm:
    """`steps` with a bar. `disable=None` makes tqdm silent when standard error is no terminal."""
    silent = None if shown else True
    return tqdm(
        steps, desc=label, total=total, initial=initial, delay=2.0, disable=silent, leave=False, dynamic_ncols=True
    )


def say(line: str) -> None:
    """A line on standard error, above any bar."""
    tqdm.write(line, file=sys.stderr)
