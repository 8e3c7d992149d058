"""SIGTERM, which a batch system sends before it kills: a running phase finishes its step, saves its state and ends.

Elsewhere (a pool being built, an evaluation) there is nothing to save, and the process ends at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from repro.errors import Terminated


class StopRequest:
    """Whether the process was asked to end."""

    def __init__(self) -> None:
        self.made = False

    def make(self, number: int, frame: FrameType | None) -> None:
        self.made = True


def terminate(number: int, frame: FrameType | None) -> None:
    """The handler of the command line: raises Terminated wherever the process is."""
    # Schedulers and torchrun may both send the signal: a second one would interrupt the way out of the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


@contextmanager
def termination() -> Iterator[None]:
    """Within this block SIGTERM raises Terminated, once. In a thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred_termination() -> Iterator[StopRequest]:
    """Within this block SIGTERM only makes a request, which the block has to look at.

    One that the block did not see any more raises Terminated behind it. Where no handler of ours is set (a thread, a
    test, a notebook) nothing changes and no request is ever made.
    """
    request = StopRequest()
    if signal.getsignal(signal.SIGTERM) is not terminate:
        yield request
        return
    signal.signal(signal.SIGTERM, request.make)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if request.made else terminate)
    if request.made:
        raise Terminated
