"""Options that several commands share, and the type of their values. Errors in one line, as everywhere else."""

from __future__ import annotations

import argparse
import os
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from repro.errors import BadInput
from repro.method import Project
from repro.runtime import World


def names(project: Project, patterns: list[str]) -> list[str]:
    """The experiments that the patterns match, each once. Raises BadInput for a pattern that matches none."""
    known = list(project.experiments())
    chosen: list[str] = []
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            raise BadInput(
                f"{project.root / 'configs'}: found no experiment '{pattern}', expected one of: {', '.join(known)}"
            )
        chosen += [name for name in found if name not in chosen]
    return chosen


def device(name: str, world: World) -> torch.device:
    """The device that --device names. Raises BadInput when this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and world.size > 1:
        if name != "cuda":
            raise BadInput(f"--device: found '{name}', expected cuda, auto or cpu with {world.size} processes")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    refusal = f"--device: found '{name}', expected {', '.join(devices)} or auto"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise BadInput(refusal) from None
    if found.type not in ("cpu", "cuda") or (found.index or 0) >= (
        torch.cuda.device_count() if found.type == "cuda" else 1
    ):
        raise BadInput(refusal)
    return found


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def add_experiments(parser: argparse.ArgumentParser, *, default_all: bool) -> None:
    """NAME...: the experiments a command is about; all of them when none is named, if `default_all`."""
    parser.add_argument(
        "experiments",
        nargs="*" if default_all else "+",
        default=["*"] if default_all else None,
        metavar="NAME",
        help="experiment, or a pattern such as '2d-*'" + (" (default: all)" if default_all else ""),
    )


class Seeds(argparse.Action):
    """A seed that is named twice is one run: of two processes in one folder, one fails at a save."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def add_seeds(parser: argparse.ArgumentParser, *, default: list[int] | None, told: str) -> None:
    """--seeds SEED...; `told` is its help."""
    parser.add_argument("--seeds", nargs="+", action=Seeds, type=seed, default=default, metavar="SEED", help=told)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--set and --train-iters; read them with `overrides`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override every field that KEY matches; '*' is any one name",
    )
    parser.add_argument("--train-iters", type=positive, metavar="N", help="short for --set 'phases.*.iterations=N'")


def overrides(options: argparse.Namespace) -> list[str]:
    """The overrides in the order in which they apply."""
    short = [] if options.train_iters is None else [f"phases.*.iterations={options.train_iters}"]
    return [*options.overrides, *short]


def add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where data sets lie; nothing is downloaded (default: data)",
    )


def add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device: where this machine computes. Commands about a device that is not here call theirs --on."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, or auto: cuda if there is one (default: auto)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number of at least {least}")
    return int(text)
