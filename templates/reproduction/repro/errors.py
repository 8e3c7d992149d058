"""Errors that a user can act on, exit codes of the command line, and how a process ends when it is asked to.

On SIGTERM, which a batch system sends before it kills, a running phase finishes its step, saves its state and
ends. Elsewhere (a pool being built, an evaluation) there is nothing to save, and the process ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_OK, EXIT_RUN_FAILED, EXIT_BAD_INPUT = 0, 1, 2
EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_TERMINATED = 130, 141, 143


class BadInput(Exception):
    """What was given cannot be used. Each line names file, key, what was found and what was expected."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunFailed(Exception):
    """A run started and could not go on, for instance because a loss stopped being finite."""


class Terminated(BaseException):
    """SIGTERM asked the process to end. No Exception, like KeyboardInterrupt: nothing swallows it."""


class ToldElsewhere(BaseException):
    """Another process of the run says why all of them end; this one only ends, with the exit code `code`."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def exit_code(error: BaseException) -> int:
    """Of the command line that an exception ends."""
    codes = {BadInput: EXIT_BAD_INPUT, KeyboardInterrupt: EXIT_INTERRUPTED, Terminated: EXIT_TERMINATED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_RUN_FAILED)


INTERRUPTED = "repro: interrupted; go on with the same command and --resume"
TERMINATED = "repro: ended by SIGTERM; go on with the same command and --resume"


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within this block SIGTERM and Ctrl-C end the process with their line, as long as there is nothing to
    save.

    While modules are imported an exception would leave half of one behind, and a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        asked = number == signal.SIGINT
        os.write(2, f"{INTERRUPTED if asked else TERMINATED}\n".encode())
        os._exit(EXIT_INTERRUPTED if asked else EXIT_TERMINATED)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
def deferred_termination() -> Iterator[list[int]]:
    """Within this block a SIGTERM only goes into the list, at which the block has to look.

    One that the block did not see any more raises Terminated behind it. Where no handler of ours is set (a
    thread, a test, a notebook) nothing changes and the list stays empty.
    """
    asked = list[int]()
    if signal.getsignal(signal.SIGTERM) is not terminate:
        yield asked
        return
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if asked else terminate)
    if asked:
        raise Terminated
