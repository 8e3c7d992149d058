"""Real runs of every phase, killed by `kill -9` at moments drawn at random, end in the bits of an uninterrupted one.

A moment is a number of events (a function called or left, Python's or C's), so that it is random over the code and yet
the same each time. As many moments are drawn in each kind of code, or nearly all would lie in the evaluation.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from forked import run
from tiny_project import DIGITS, POINTS, merged, write_project

from nsgf import phases
from repro import checkpoint, loop, rounds
from repro import run as running
from repro.update import Update
from repro_tools import cli

PHASES = [phases.VelocityField, phases.StraightFlow, phases.TimePredictor, phases.FeatureClassifier]
KINDS = {
    "start": [cli.main],
    "pool": [phases.VelocityField.collect],
    "minibatch": [kind.minibatch for kind in PHASES],
    "loss": [kind.loss for kind in PHASES],
    "step": [Update.backward, Update.step],
    "checkpoint": [checkpoint.save],
    "flush": [checkpoint.flush],
    "round": [rounds.allocate, rounds.seal, rounds.read, rounds.keep],
    "log": [loop._Log.__init__, loop._Log.write],
    "clean-up": [Path.unlink, shutil.rmtree],
    "phase": [loop.run_phase],
    "evaluation": [running._evaluate],
    "record": [running._write_text],
}
"""The functions below which an event is of a kind; the innermost counts."""
KIND_OF = {function.__code__: kind for kind, functions in KINDS.items() for function in functions}

WAYS = {
    "images": ("digits", DIGITS),
    "in parts": ("digits", merged(DIGITS, {"phases": {"velocity_field": {"pool": {"resident_batches": 2}}}})),
    "points": ("2d-moons", POINTS),
}
"""The experiment, and what is changed in it."""

ONCE = [("images", kind) for kind in KINDS]
ONCE += [("in parts", kind) for kind in ("pool", "round", "minibatch", "checkpoint")]
ONCE += [("points", kind) for kind in ("pool", "step", "record")]
TWICE = [("images", "checkpoint"), ("in parts", "pool"), ("in parts", "round"), ("points", "phase")]

AT_EACH_CHANGE = [("images", kind) for kind in ("step", "checkpoint", "round")]
AT_EACH_CHANGE += [("in parts", "pool"), ("in parts", "round"), ("points", "record")]
"""One or two of each way; the others are tests that are slow."""


def cases(pairs: list[tuple[str, str]]) -> list:
    """The pairs as parameters, with the marker where they need not be tried at each change."""
    return [pytest.param(*pair, marks=() if pair in AT_EACH_CHANGE else pytest.mark.slow) for pair in pairs]


class Watch:
    """A profile function that notes at which event each kind of code begins, and kills its process at one event."""

    def __init__(self, kills_at: int | None = None):
        self.events, self.kills_at = 0, kills_at
        self.stack, self.begins = ["start"], [(0, "start")]

    def __call__(self, frame, event, argument):
        kind = KIND_OF.get(frame.f_code) if event in ("call", "return") else None
        if kind and event == "call":
            self.begin(self.events, self.stack + [kind])
        if self.events == self.kills_at:
            print(f"killed in {self.stack[-1]}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        self.events += 1
        if kind and event == "return":
            self.begin(self.events, self.stack[:-1])

    def begin(self, event: int, stack: list[str]):
        self.stack = stack
        self.begins.append((event, stack[-1]))


def watched(arguments: list[str], notes: str) -> int:
    """Runs the command line and writes which events were of which kind."""
    watch = Watch()
    code = profiled(arguments, watch)
    Path(notes).write_text(json.dumps({"events": watch.events, "begins": watch.begins}))
    return code


def killed(arguments: list[str], moment: int) -> int:
    return profiled(arguments, Watch(moment))


def profiled(arguments: list[str], profile) -> int:
    sys.setprofile(profile)
    try:
        return quick(arguments)
    finally:
        sys.setprofile(None)


def quick(arguments: list[str]) -> int:
    """Without a description of the machine, which takes longer than the run and another number of events each time."""
    running.describe, running.versions = lambda root, runtime: {}, dict
    return cli.main(arguments)


def bits(folder: Path) -> dict:
    """All that a run leaves but times and places: the files, every weight, every curve, every metric."""
    left = {"files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "model.safetensors":
            state = checkpoint.load(path)
            left[name] = (
                {key: weight.numpy().tobytes() for key, weight in state["networks"]["model"].items()},
                state["curves"],
            )
        elif path.name == "record.json":
            record = json.loads(path.read_text())
            left[name] = {key: record[key] for key in ("config_hash", "metrics", "curves", "parameters")}
        elif path.is_file():
            left[name] = path.read_bytes()
    return left


def moment_of(kind: str, notes: dict, stream: random.Random) -> int:
    """One of the events of a kind, each as likely as another."""
    begins = [*notes["begins"], (notes["events"], "end")]
    spans = [range(first, behind) for (first, one), (behind, _) in zip(begins, begins[1:], strict=False) if one == kind]
    drawn = stream.randrange(sum(map(len, spans)))
    for span in spans:
        if drawn < len(span):
            return span[drawn]
        drawn -= len(span)
    raise AssertionError("unreachable")


def cut_short(folder: Path) -> None:
    """Leaves half of every file that was not finished, as a kill in the middle of a write does."""
    for path in [*folder.rglob("*.partial"), *folder.rglob("*.partial/*")]:
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Of each way: the project, the command, what a whole run leaves, which of its events were of which kind."""
    known = {}

    def of(way: str):
        if way not in known:
            experiment, changes = WAYS[way]
            root = write_project(tmp_path_factory.mktemp(way), experiment, changes)
            command = ["run", experiment, "--device", "cpu", "--resume"]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(root)
                assert run(watched, [*command, "--runs", "whole"], "notes", output=root / "whole.log") == 0
            left = bits(root / "whole" / experiment / "seed-0")
            known[way] = root, command, left, json.loads((root / "notes").read_text())
        return known[way]

    return of


def killed_and_resumed(root: Path, command: list[str], moments: list[int]) -> tuple[list[str], dict]:
    """The kinds of code in which a run was killed, its resume and so on, one for each moment; what was left."""
    name = "-".join(map(str, moments))
    command, log = [*command, "--runs", name], root / f"{name}.log"
    for moment in moments:
        assert run(killed, command, moment, output=log) == -signal.SIGKILL
        cut_short(root / name)
    assert run(quick, command, output=log) == 0, log.read_text()
    return re.findall("^killed in (.*)$", log.read_text(), re.MULTILINE), bits(root / name / command[1] / "seed-0")


@pytest.mark.parametrize(("way", "kind"), cases(ONCE))
def test_a_run_killed_anywhere_ends_in_the_bits_of_an_uninterrupted_one(uninterrupted, monkeypatch, way, kind):
    root, command, whole, notes = uninterrupted(way)
    monkeypatch.chdir(root)
    moment = moment_of(kind, notes, random.Random(f"{way} {kind}"))
    kinds, left = killed_and_resumed(root, command, [moment])
    assert kinds == [kind] and left == whole


@pytest.mark.parametrize(("way", "kind"), cases(TWICE))
def test_a_resume_that_is_killed_too_ends_in_the_same_bits(uninterrupted, monkeypatch, way, kind):
    """The resumed run has all that came after the first moment before it, so that its kill does come."""
    root, command, whole, notes = uninterrupted(way)
    monkeypatch.chdir(root)
    stream = random.Random(f"{way} {kind} twice")
    first = moment_of(kind, notes, stream)
    second = stream.randrange(notes["events"] - first)
    kinds, left = killed_and_resumed(root, command, [first, second])
    assert kinds[0] == kind and len(kinds) == 2 and left == whole
