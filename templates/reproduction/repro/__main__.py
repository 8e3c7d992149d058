"""`python -m repro run|list`. Data on standard output, progress on standard error.

Exit codes: 0 done, 1 a run failed, 2 bad input (nothing written), 130 interrupted by Ctrl-C, 143 ended by
SIGTERM after saving, 141 nobody reads the output any more (`... | head -1`). Runs that were interrupted or
ended go on with --resume.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from repro import errors
from repro.errors import EXIT_OK, BadInput, RunFailed, Terminated, ToldElsewhere, ending_at_once, termination

if TYPE_CHECKING:
    from repro.method import Project
    from repro.run import Plan
    from repro.runtime import Runtime, World

LONGEST_LINE = 1000
"""Of a message, in signs. The end is kept: it says what is expected."""
LINE = 120
"""The longest line about a finished run, in signs."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = Parser(prog="python -m repro", description="Trains and evaluates the experiments of a method.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (add, command, purpose) in COMMANDS.items():
        one = commands.add_parser(name, help=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
        add(one)
        one.set_defaults(command=command)

    def work() -> int:
        options = parser.parse_args(arguments)
        code: int = options.command(options)
        return code

    return carried_out(work)


def carried_out(work: Callable[[], int]) -> int:
    """The exit code of a command: what it returns, or that of what stopped it, which is told in a line."""
    try:
        try:
            with termination():
                return work()
        except BadInput as error:
            return _told(errors.EXIT_BAD_INPUT, *(f"repro: {_one_line(one)}" for one in error.problems))
        except RunFailed as error:
            return _told(errors.EXIT_RUN_FAILED, f"repro: {_one_line(str(error))}")
        except KeyboardInterrupt:
            return _told(errors.EXIT_INTERRUPTED, errors.INTERRUPTED)
        except Terminated:
            return _told(errors.EXIT_TERMINATED, errors.TERMINATED)
        except ToldElsewhere as error:
            return error.code
        finally:
            # Here, since at the end of the interpreter a broken pipe can no longer be caught.
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.EXIT_NO_READER


def _told(code: int, *lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return code


def _one_line(problem: str) -> str:
    """What was found may hold anything: line breaks that look like another message, colours, a whole file."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in problem)
    if len(shown) <= LONGEST_LINE:
        return shown
    return f"{shown[: LONGEST_LINE // 2]} ... {shown[-LONGEST_LINE // 3 :]}"


class Parser(argparse.ArgumentParser):
    """Errors in one line, as everywhere else; no abbreviated options."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        first = os.environ.get("RANK", "0") == "0"  # all processes of torchrun are given the same
        self.exit(
            errors.EXIT_BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n" if first else None
        )


# Options, which the tools have as well.


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


class MicroBatches(argparse.Action):
    """N for all phases, PHASE=N for one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        found = {}
        for value in values:
            phase, _, number = value.rpartition("=")
            try:
                found[phase or "*"] = positive(number)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, found)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number of at least {least}")
    return int(text)


class Seeds(argparse.Action):
    """A seed that is named twice is one run: of two processes in one folder, one fails at a save."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


DEVICE = "cpu, cuda, cuda:1, or auto: cuda if there is one (default: auto)"
DATA_ROOT = "where data sets lie; nothing is downloaded (default: data)"
DIVIDED = "into how many a minibatch is divided, so that it fits: the same result (default: 1)"
DRAWN_AHEAD = "processes that draw minibatches ahead: the same bits (default: 0)"
STRICT = "strict: the same bits each time, or an error; warn: a warning (default: strict)"
DRY_RUN = "print the resolved configuration and what would run, write nothing"

OPTIONS: dict[str, dict[str, Any]] = {
    "experiments": {"nargs": "+", "metavar": "NAME", "help": "experiment, or a pattern such as '2d-*'"},
    "--seeds": {"nargs": "+", "action": Seeds, "type": seed, "metavar": "SEED"},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "dest": "overrides"},
    "--train-iters": {"type": positive, "metavar": "N", "help": "short for --set 'phases.*.iterations=N'"},
    "--resume": {"action": "store_true", "help": "go on with runs that exist, skip finished ones"},
    "--resume-phase": {"type": positive, "metavar": "N", "help": "start phase N over, keep the earlier ones"},
    "--runs": {"type": Path, "metavar": "DIR", "help": "where runs are kept (default: runs)"},
    "--device": {"default": "auto", "metavar": "NAME", "help": DEVICE},
    "--determinism": {"choices": ["strict", "warn"], "default": "strict", "help": STRICT},
    "--micro-batches": {"nargs": "+", "action": MicroBatches, "default": {}, "metavar": "N", "help": DIVIDED},
    "--workers": {"type": seed, "default": 0, "metavar": "N", "help": DRAWN_AHEAD},
    "--data-root": {"type": Path, "default": Path("data"), "metavar": "DIR", "help": DATA_ROOT},
    "--dry-run": {"action": "store_true", "help": DRY_RUN},
    "--json": {"action": "store_true", "help": "print JSON"},
}
OPTIONS["--seeds"] |= {"default": [0], "help": "one run per seed (default: 0)"}
OPTIONS["--set"]["help"] = "override every field that KEY matches; '*' is any one name"
OPTIONS["--runs"]["default"] = Path("runs")

EVERY = {"nargs": "*", "default": ["*"], "help": f"{OPTIONS['experiments']['help']} (default: all)"}
"""Of the experiments of a command that is about all of them, when none is named."""


def add(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Adds options of this table to a parser, with `changes` to what argparse is given of them."""
    for name in names:
        parser.add_argument(name, **OPTIONS[name] | changes)


def overrides(options: argparse.Namespace) -> list[str]:
    """What --set and --train-iters override, in the order in which it applies."""
    short = [] if options.train_iters is None else [f"phases.*.iterations={options.train_iters}"]
    return [*options.overrides, *short]


# Commands.


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains every phase of each experiment and evaluates it, once per seed."
    parser.epilog = f"example: {parser.prog} '2d-*' --seeds 0 1 2 --resume"
    add(parser, *OPTIONS)


def names(project: Project, patterns: list[str]) -> list[str]:
    """The experiments that the patterns match, each once. Raises BadInput for a pattern that matches none."""
    known, chosen = list(project.experiments()), list[str]()
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            place = project.root / "configs"
            raise BadInput(f"{place}: found no experiment '{pattern}', expected one of: {', '.join(known)}")
        chosen += [name for name in found if name not in chosen]
    return chosen


def planned(options: argparse.Namespace) -> list[Plan]:
    """The plan of every experiment that the options name."""
    with ending_at_once():
        from repro.method import find_project
        from repro.run import plan

        project = find_project(Path.cwd())
    return [plan(project, name, overrides(options)) for name in names(project, options.experiments)]


def prepared(options: argparse.Namespace, plans: Sequence[Plan], world: World) -> Runtime | None:
    """Where the runs run, after what the options change is told; None for a dry run, which is told as well.

    Raises BadInput for a device that this machine, or this number of processes, cannot use.
    """
    from repro.runtime import Runtime, find_device

    device = find_device(options.device, world)
    if world.first:
        for one in plans:
            for change in one.changes:
                print(f"{one.experiment}: {change}", file=sys.stderr)
    if not options.dry_run:
        chosen = {"determinism": options.determinism, "workers": options.workers}
        return Runtime(device, options.data_root, world, micro_batches=options.micro_batches, **chosen)
    if world.first:
        print(json.dumps({one.experiment: one.config.model_dump(mode="json") for one in plans}, indent=1))
    return None


Tell = Callable[["Plan", int, Path, bool], list[str]]
"""(plan, seed, run folder, whether the run was finished before) -> lines about a finished run."""


def run(options: argparse.Namespace) -> int:
    with ending_at_once():
        from repro.runtime import world_of_this_process

    with world_of_this_process() as world:
        plans = planned(options)
        runtime = prepared(options, plans, world)
        if runtime is not None:
            run_here(options, plans, runtime, {}, tell)
    return EXIT_OK


def run_here(
    options: argparse.Namespace,
    plans: Sequence[Plan],
    runtime: Runtime,
    gates: Mapping[str, Mapping[str, Any]],
    tell: Tell,
) -> None:
    """Every seed of every plan in this process, one after the other; `gates`: see `repro.run.execute`."""
    from repro.run import RECORD, execute, run_folder
    from repro.runtime import say

    folders = []
    for number in options.seeds:
        for one in plans:
            folder = run_folder(options.runs, one.experiment, number)
            was_there = (folder / RECORD).exists() and options.resume_phase is None
            gate = gates.get(one.experiment)
            execute(one, number, options.runs, runtime, options.resume, options.resume_phase, gate)
            folders.append(str(folder))
            if runtime.world.first:
                for line in tell(one, number, folder, was_there):
                    say(line)
                if not options.json:
                    print(folder)
    if runtime.world.first and options.json:
        print(json.dumps({"runs": folders, "failures": []}, indent=1))


def tell(one: Plan, number: int, folder: Path, was_there: bool) -> list[str]:
    """What is said of a finished run: a line with all its metrics."""
    from repro.run import RECORD

    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        metrics = [f"{name} {value:.3g}" for name, value in record["metrics"].items()]
        return [finished_line(one, number, record, was_there, metrics)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # damaged: the others go on
        return [f"repro: warning: {folder / RECORD}: found no run record ({error}), expected one"]


def finished_line(
    one: Plan, number: int, record: Mapping[str, Any], was_there: bool, metrics: Sequence[str]
) -> str:
    """Experiment, seed, seconds and the metrics, as many as fit into a line."""
    seconds = sum(record.get("wall_s", {}).values())
    decimals = 0 if seconds >= 10 else 1
    told = f"{one.experiment} seed {number}: {'was finished, ' * was_there}{seconds:.{decimals}f} s"
    for index, metric in enumerate(metrics):
        left = len(metrics) - index - 1
        more = f" and {left} more" if left else ""
        if len(f"{told}, {metric}{more}") > LINE:
            return f"{told} and {left + 1} more"
        told += f", {metric}"
    return told


def add_list(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists the experiments and their phases."
    parser.epilog = f"example: {parser.prog} --json"
    add(parser, "--json")


def list_experiments(options: argparse.Namespace) -> int:
    """The experiments, and each phase's steps: with the paper's units where the phase counts them."""
    with ending_at_once():
        from repro.config import load
        from repro.method import find_project
        from repro.runtime import CPU

        project = find_project(Path.cwd())
    experiments = {}
    for name, path in project.experiments().items():
        config, _ = load(project.config_class(name), path)
        experiments[name] = project.method.phases(config, CPU)
    if options.json:
        steps = {name: {phase.name: phase.steps for phase in phases} for name, phases in experiments.items()}
        print(json.dumps(steps, indent=1))
        return EXIT_OK
    for name, phases in experiments.items():
        told = []
        for number, phase in enumerate(phases, start=1):
            units = "".join(f", {float(phase.steps * one):g} {unit}" for unit, one in phase.counts.items())
            told.append(f"{number} {phase.name} ({phase.steps} steps{units})")
        print(f"{name}: {', '.join(told)}")
    return EXIT_OK


COMMANDS: dict[str, tuple[Callable[..., None], Callable[..., int], str]] = {
    "list": (add_list, list_experiments, "the experiments and their phases"),
    "run": (add_run, run, "train every phase of an experiment and evaluate it"),
}

if __name__ == "__main__":
    raise SystemExit(main())
