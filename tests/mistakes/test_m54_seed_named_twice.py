"""m54: a seed named twice starts two processes in one run folder.

However often a seed is named, `repro run --jobs 2` starts one process in its folder, or refuses and starts none.
"""

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from proof import Proof

from repro import __main__ as command_line
from repro_tools import cli, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(monkeypatch):
    """The seeds whose processes `repro run` starts. None of them begins."""
    seeds = []

    class Process:
        def __init__(self, command, **_):
            seeds.append(int(command[command.index("--seeds") + 1]))

        def wait(self):
            return 0

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=Process))
    return seeds


def check(started, monkeypatch, tmp_path):
    """The same seed beside itself, apart from itself, and written in another way."""
    monkeypatch.chdir(ROOT)
    for place, named in enumerate((["0", "0", "1"], ["0", "1", "0"], ["0", "1", "00"])):
        started.clear()
        words = ["run", "2d-moons", "--seeds", *named, "--jobs", "2", "--device", "cpu"]
        try:
            code = cli.main([*words, "--runs", str(tmp_path / str(place))])
        except SystemExit as end:
            code = end.code
        found = sorted(started)
        refused = code == 2 and not found
        assert refused or found == [0, 1], (
            f"--seeds {' '.join(named)}: found processes of the seeds {found}, expected [0, 1]"
        )


def kept_as_named(monkeypatch):
    """What argparse does when nobody tells it otherwise."""
    monkeypatch.setattr(
        command_line.Seeds,
        "__call__",
        lambda self, parser, space, values, option=None: setattr(space, self.dest, values),
    )


def only_neighbours(monkeypatch):
    """As `uniq` does."""

    def call(self, parser, space, values, option=None):
        setattr(space, self.dest, [value for value, _ in groupby(values)])

    monkeypatch.setattr(command_line.Seeds, "__call__", call)


def told_apart_as_text(monkeypatch):
    """Compared before it is read: 0 and 00 are two."""

    def call(self, parser, space, values, option=None):
        setattr(space, self.dest, [int(value) for value in dict.fromkeys(values)])

    monkeypatch.setitem(command_line.OPTIONS["--seeds"], "type", str)
    monkeypatch.setattr(command_line.Seeds, "__call__", call)


def in_ascending_order(monkeypatch):
    def call(self, parser, space, values, option=None):
        setattr(space, self.dest, sorted(set(values)))

    monkeypatch.setattr(command_line.Seeds, "__call__", call)


def refused(monkeypatch):
    def call(self, parser, space, values, option=None):
        if len(set(values)) < len(values):
            parser.error(f"argument --seeds: found {values}, expected each once")
        setattr(space, self.dest, values)

    monkeypatch.setattr(command_line.Seeds, "__call__", call)


def made_once_where_they_start(monkeypatch):
    """The option keeps what was named; what starts the processes takes each seed once."""
    kept_as_named(monkeypatch)
    real = run.execute_many
    monkeypatch.setattr(
        run,
        "execute_many",
        lambda plans, seeds, *rest: real(plans, list(dict.fromkeys(seeds)), *rest),
    )


PROOFS = [
    Proof(
        check,
        plant={
            kept_as_named: "--seeds 0 0 1: found processes of the seeds [0, 0, 1], expected [0, 1]",
            only_neighbours: "--seeds 0 1 0: found processes of the seeds [0, 0, 1], expected [0, 1]",
            told_apart_as_text: "--seeds 0 1 00: found processes of the seeds [0, 0, 1], expected [0, 1]",
        },
        innocent=[in_ascending_order, refused, made_once_where_they_start],
    )
]


def test_proof(case):
    case()
