"""The command line. Data on standard output, progress on standard error.

Exit codes: 0 done, 1 a run failed or a check found a fault, 2 bad input (nothing written), 130 interrupted by Ctrl-C, 143
ended by SIGTERM after saving, 141 nobody reads the output any more (`repro ... | head -1`). Runs that were interrupted or ended go on with --resume.

Each command is a module with `add_arguments(parser)` and `command(options) -> exit code`. Only the module of the command that was
asked for is imported: `repro --help` must not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import os
import sys
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
)
from repro.termination import termination

COMMANDS = {
    "check": ("repro.check.command", "is the spec complete, sourced, and what the configurations say?"),
    "probe": ("repro.probe", "call every library with the shapes of every experiment"),
    "memory": ("repro.memory.command", "device memory and time of every phase, without a GPU"),
    "preflight": ("repro.preflight.command", "all that can be known before a run, as one table"),
    "list": ("repro.list_command", "the experiments and their phases"),
    "run": ("repro.run_command", "train every phase of an experiment and evaluate it"),
    "diagnose": ("repro.diagnose.command", "why does it not train? measured, with the next test to make"),
    "evaluate": ("repro.evaluate", "judge the finished networks of a run anew"),
    "report": ("repro.report.command", "judge every claim and write the results page"),
    "notebook": ("repro.notebook.command", "a Kaggle or Colab notebook, session by session"),
}
"""The module and the purpose of each command, in the order of the work."""

LONGEST_LINE = 1000
"""Of a message, in signs. The end is kept: it says what is expected."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, since at the end of the interpreter a broken pipe can no longer be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO_READER


def _run(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser(arguments[0] if arguments else None).parse_args(arguments)
        with termination():
            return options.command(options)
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
    """What was found may hold anything: line breaks that look like another message, colours of a terminal, a whole file."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in problem)
    return shown if len(shown) <= LONGEST_LINE else f"{shown[: LONGEST_LINE // 2]} ... {shown[-LONGEST_LINE // 3 :]}"


def parser(asked: str | None) -> _Parser:
    """The parser of all commands, with the options of the one that is asked for."""
    whole = _Parser(prog="repro", description="Reproduce a paper: run its experiments, judge its claims.")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        one = commands.add_parser(name, help=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == asked:
            found = import_module(module)
            found.add_arguments(one)
            one.set_defaults(command=found.command)
    return whole


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as everywhere else; no abbreviated options."""

    def __init__(self, **arguments):
        super().__init__(**arguments, allow_abbrev=False)

    def error(self, message: str):
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")
