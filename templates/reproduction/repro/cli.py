"""`python -m repro`. Data on standard output, progress on standard error.

Exit codes: 0 done, 1 a run failed, 2 bad input (nothing written), 130 interrupted by Ctrl-C, 143 ended by SIGTERM after
saving, 141 nobody reads the output any more (`... | head -1`). Runs that were interrupted or ended go on with --resume.

Each command is a module with `add_arguments(parser)` and `command(options) -> exit code`, which is imported only when it
is asked for: `python -m repro --help` must not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module

from repro.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_NO_READER,
    EXIT_RUN_FAILED,
    EXIT_TERMINATED,
    BadInput,
    RunFailed,
    Terminated,
    termination,
)

COMMANDS = {
    "list": ("repro.list_command", "the experiments and their phases"),
    "run": ("repro.run_command", "train every phase of an experiment and evaluate it"),
}
"""The module and the purpose of each command."""

LONGEST_LINE = 1000
"""Of a message, in signs. The end is kept: it says what is expected."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments

    def work() -> int:
        options = parser(given[0] if given else None).parse_args(given)
        return options.command(options)

    return carried_out(work)


def carried_out(work: Callable[[], int]) -> int:
    """The exit code of a command: what it returns, or that of what stopped it, which is told in a line."""
    try:
        try:
            return _carried_out(work)
        finally:
            sys.stdout.flush()  # here, since at the end of the interpreter a broken pipe can no longer be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO_READER


def _carried_out(work: Callable[[], int]) -> int:
    try:
        with termination():
            return work()
    except BadInput as error:
        for problem in error.problems:
            print(f"repro: {_one_line(problem)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunFailed as error:
        print(f"repro: {_one_line(str(error))}", file=sys.stderr)
        return EXIT_RUN_FAILED
    except KeyboardInterrupt:
        print("repro: interrupted; go on with the same command and --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Terminated:
        print("repro: ended by SIGTERM; go on with the same command and --resume", file=sys.stderr)
        return EXIT_TERMINATED


def _one_line(problem: str) -> str:
    """What was found may hold anything: line breaks that look like another message, colours of a terminal, a file."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in problem)
    if len(shown) <= LONGEST_LINE:
        return shown
    return f"{shown[: LONGEST_LINE // 2]} ... {shown[-LONGEST_LINE // 3 :]}"


def parser(asked: str | None) -> Parser:
    """The parser of the engine's own commands, with the options of the one that is asked for."""
    whole = Parser(prog="python -m repro", description="Trains and evaluates the experiments of a method.")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        one = commands.add_parser(name, help=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == asked:
            found = import_module(module)
            found.add_arguments(one)
            one.set_defaults(command=found.command)
    return whole


class Parser(argparse.ArgumentParser):
    """Errors in one line, as everywhere else; no abbreviated options."""

    def __init__(self, **arguments):
        super().__init__(**arguments, allow_abbrev=False)

    def error(self, message: str):
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")
