"""One process at a time works on a run. The lock ends with its process, however that ends, and leaves no file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repro.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within this block no other process of this machine is in one for the same folder. Raises BadInput when another one is.

    Where the system or the file system knows no such lock, none is taken.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{folder}: found another process at work on this run, expected none; wait until it has ended, or stop it"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
