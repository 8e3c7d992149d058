"""The command `repro`. Data on standard output, progress on standard error.

Exit codes: 0 done, 1 a run failed or a check found a fault, 2 bad input (nothing written), 3 not measured, 130 interrupted by Ctrl-C, 143
ended by SIGTERM after saving, 141 nobody reads the output any more (`repro ... | head -1`). Runs that were interrupted or ended go on with --resume.

Each command is a module with `add_arguments(parser)` and `command(options) -> exit code`. Only the module of the command that was
asked for is imported, after the project's engine was found: `repro --help` must not wait for PyTorch, and needs no project.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from repro_tools.project import NoEngine, use_engine

COMMANDS = {
    "new": ("repro_tools.new", "a new project: a toy method in every place where the paper's belongs"),
    "check": ("repro_tools.check.command", "is the spec complete, sourced, and what the configurations say?"),
    "probe": ("repro_tools.probe", "call every library with the shapes of every experiment"),
    "memory": ("repro_tools.memory.command", "device memory and time of every phase, without a GPU"),
    "preflight": ("repro_tools.preflight.command", "all that can be known before a run, as one table"),
    "list": ("repro_tools.list", "the experiments and their phases"),
    "run": ("repro_tools.run", "train every phase of an experiment and evaluate it"),
    "diagnose": ("repro_tools.diagnose.command", "why does it not train? measured, with the next test to make"),
    "evaluate": ("repro_tools.evaluate", "judge the finished networks of a run anew"),
    "report": ("repro_tools.report.command", "judge every claim and write the results page"),
    "notebook": ("repro_tools.notebook.command", "a Kaggle or Colab notebook, session by session"),
}
"""The module and the purpose of each command, in the order of the work."""

WITHOUT_A_PROJECT = ("new",)

BAD_INPUT, NO_READER = 2, 141
"""Exit codes of `repro.errors`, which is not there before the engine was found."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    asked = given[0] if given else None
    if asked not in COMMANDS or asked in WITHOUT_A_PROJECT:
        return _without_a_project(given, asked)
    try:
        use_engine(Path.cwd())
    except NoEngine as error:
        print(f"repro: {error}", file=sys.stderr)
        return BAD_INPUT
    from repro.__main__ import carried_out
    from repro.errors import ending_at_once

    with ending_at_once():
        known = parser(asked)
        from repro_tools.own_loop import EXIT_NOT_MEASURED, NotMeasured

    def work() -> int:
        options = known.parse_args(given)
        try:
            return options.command(options)
        except NotMeasured as refused:
            print(*(f"repro: {line}" for line in refused.lines), sep="\n", file=sys.stderr)
            return EXIT_NOT_MEASURED

    return carried_out(work)


def _without_a_project(given: list[str], asked: str | None) -> int:
    """Carries out a command that needs no engine. Without one it ends the process, with the help or with a refusal."""
    try:
        try:
            options = parser(asked).parse_args(given)
            return options.command(options)
        finally:
            sys.stdout.flush()  # here, since at the end of the interpreter a broken pipe can no longer be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER


def parser(asked: str | None) -> Parser:
    """The parser of all commands, with the options of the one that is asked for."""
    whole = Parser(prog="repro", description="Reproduce a paper: run its experiments, judge its claims.")
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
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")
