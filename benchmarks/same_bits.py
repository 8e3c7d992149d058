"""The engine of an earlier commit against the one that lies here: the same bits? `python -m benchmarks.same_bits` (make same-bits).

Short runs of three methods, with the code of either tree in processes of their own: NSGF++ on points and on images, and the tutorial's
Forward-Forward. Every tensor of the finished networks, every logged loss and every metric is compared, and a run that was killed and resumed with
the one that was not. Nothing is imported from either tree. Exit codes: 0 all is equal, 1 something differs, 2 a run was not possible.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[1]
OLD_ENGINE = "303bc3b"
SEED = 0
EQUAL, DIFFERENT, IMPOSSIBLE = 0, 1, 2

KILLED_AFTER = 8
"""Files that are put in their place before a run is killed: within the second phase, with a state of it saved."""
KILLED = f"""
import os, runpy, signal, sys
replace, left = os.replace, {KILLED_AFTER}
def counted(source, target, **options):
    global left
    replace(source, target, **options)
    left -= str(target).endswith(".safetensors")
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = counted
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""Runs the module that its first argument names, and kills the process at the same instruction each time."""


class CannotRun(Exception):
    """Why there is nothing to compare, in one line."""


@dataclass(frozen=True)
class Short:
    """A run of seconds. `title` is its name in the table; `tutorial` says whether it is of the tutorial's project."""

    title: str
    experiment: str
    settings: tuple[str, ...]
    tutorial: bool = False


POINTS = Short(
    "2d-moons",
    "2d-moons",
    (
        "phases.*.iterations=20",
        "phases.velocity_field.pool.batches=2",
        "phases.velocity_field_100.pool.batches=1",
        "evaluation.test_points=128",
        "evaluation.floor_draws=1",
        "pace.log_every=4",
        "pace.checkpoint_every=5",
    ),
)
IMAGES = Short(
    "digits",
    "digits",
    (
        "phases.*.iterations=8",
        "phases.velocity_field.pool.batches=2",
        # What a step can do besides the plain one.
        "phases.velocity_field.ema_decay=0.9",
        "phases.straight_flow.network.dropout=0.1",
        "phases.straight_flow.clip_norm=0.5",
        "phases.time_predictor.warmup_steps=5",
        "phases.feature_classifier.precision=bf16",
        "evaluation.samples=20",
        "evaluation.euler_steps=[10]",
        "evaluation.nearest=10",
        "evaluation.pictures=4",
        "nsgf_plus_plus.straight_flow_step=0.1",
        "pace.log_every=2",
    ),
)
LAYERS = Short("forward-forward", "digits", ("phases.*.iterations=30", "pace.log_every=5"), tutorial=True)
RUNS = (POINTS, IMAGES, LAYERS)


@dataclass(frozen=True)
class Tree:
    """A version of this repository: its folder, and the tutorial's project rendered from it."""

    folder: Path
    tutorial: Path

    def place(self, short: Short) -> Path:
        return self.tutorial if short.tutorial else self.folder

    def environment(self, short: Short) -> dict[str, str]:
        """One thread, and no code but this tree's: the tutorial's project has a kit of its own."""
        code = [] if short.tutorial else [self.folder / "templates/reproduction", self.folder / "reference_impl"]
        code += [self.folder] if self.has_tools else []
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(map(str, code))}

    @property
    def has_tools(self) -> bool:
        """Whether the commands lie in a package of their own, above the kit."""
        return (self.folder / "repro_tools").is_dir()

    @property
    def module(self) -> str:
        return "repro_tools" if self.has_tools else "repro"


@dataclass(frozen=True)
class Finished:
    """What is compared of a run: tensors by phase and name, (step, loss) by phase, metrics by name."""

    tensors: dict[str, dict[str, Tensor]]
    curves: dict[str, list[tuple[int, float]]]
    metrics: dict[str, float]


def network_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the one network in a file of a finished phase, by their names within the network, whatever stands before `model.`."""
    found: dict[str, Tensor] = {}
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (no dict)
            if match := re.match(r"(?:[^.]+\.)*?model\.(.+)", name):
                if match[1] in found:
                    raise CannotRun(f"{path}: found {name} and another tensor {match[1]}, expected one network")
                found[match[1]] = file.get_tensor(name)
    if not found:
        raise CannotRun(f"{path}: found no tensor of a network, expected names with 'model.'")
    return found


def curves_of(record: Mapping) -> dict[str, list[tuple[int, float]]]:
    """The losses of a record, whether a phase has one curve or several by name, to the six digits that records had at first."""
    curves = {}
    for phase, curve in record["curves"].items():
        points = curve["loss"] if isinstance(curve, Mapping) else curve
        curves[phase] = [(step, float(f"{loss:.6g}")) for step, loss in points]
    return curves


def read(folder: Path) -> Finished:
    """A finished run. Raises CannotRun where a part of it is missing."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        files = {path.parent.name.partition("-")[2]: path for path in sorted(folder.glob("*-*/model.safetensors"))}
        tensors = {phase: network_tensors(path) for phase, path in files.items()}
        return Finished(tensors, curves_of(record), dict(record["metrics"]))
    except (OSError, KeyError, ValueError) as error:
        raise CannotRun(f"{folder}: found no finished run ({error!r})") from None


def same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(*(one.contiguous().reshape(-1).view(torch.uint8) for one in (first, second)))


def tensor_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str:
    """In words: "equal", or how many tensors differ and which one most."""
    if first.keys() != second.keys():
        return _other_names(first, second)
    distances = {}
    for name in first:
        if not same_bits(first[name], second[name]):
            if first[name].shape != second[name].shape or first[name].dtype != second[name].dtype:
                return f"{name}: {_kind(first[name])} became {_kind(second[name])}"
            distances[name] = float((first[name].double() - second[name].double()).abs().max())
    return _largest(distances, len(first))


def number_difference(first: Mapping, second: Mapping) -> str:
    """The same for numbers by name; NaN equals NaN."""
    if first.keys() != second.keys():
        return _other_names(first, second)
    pairs = {name: (first[name], second[name]) for name in first}
    distances = {name: abs(a - b) for name, (a, b) in pairs.items() if a != b and not (a != a and b != b)}
    return _largest(distances, len(first))


def _other_names(first: Mapping, second: Mapping) -> str:
    gone, new = ([str(name) for name in one if name not in other] for one, other in ((first, second), (second, first)))
    return "; ".join(f"{words}: {', '.join(names[:3])}" for words, names in (("gone", gone), ("new", new)) if names)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _largest(distances: Mapping, of: int) -> str:
    if not distances:
        return "equal"
    # What is no number is the largest difference of all.
    name = max(distances, key=lambda one: (distances[one] != distances[one], distances[one]))
    return f"{len(distances)} of {of} differ, most {name}: {distances[name]:.2g}"


def rows(title: str, first: Finished, second: Finished) -> Iterator[tuple[str, str, int, str]]:
    """(run, part, number of values, difference in words) for the network and the curve of every phase, and for the metrics."""
    for phase in dict.fromkeys([*first.tensors, *second.tensors]):
        old, new = (one.tensors.get(phase, {}) for one in (first, second))
        yield title, phase, len(old), tensor_difference(old, new)
    for phase in dict.fromkeys([*first.curves, *second.curves]):
        old, new = ({f"step {at}": loss for at, loss in one.curves.get(phase, [])} for one in (first, second))
        yield title, f"{phase}, curve", len(old), number_difference(old, new)
    yield title, "metrics", len(first.metrics), number_difference(first.metrics, second.metrics)


def table(lines: Sequence[tuple[str, str, int, str]]) -> str:
    cells = [("run", "part", "values", "difference"), *((a, b, str(c), d) for a, b, c, d in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in cells)


def finished(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, code: int = 0) -> str:
    """What a command printed in `folder`. Raises CannotRun with its last line when it ends with another exit code."""
    done = subprocess.run([*command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != code:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        shown = " ".join(word if "\n" not in word else "..." for word in command)
        raise CannotRun(f"{folder}: {shown}: found exit code {done.returncode}, expected {code}: {said}")
    return done.stdout


def run(tree: Tree, short: Short, runs: Path, *, killed: bool = False) -> Finished:
    """Trains and evaluates with the code of `tree`; `killed` on the way, and resumed."""
    place, environment = tree.place(short), tree.environment(short)
    where = finished([sys.executable, "-c", "import repro; print(repro.__file__)"], place, environment).strip()
    if not Path(where).resolve().is_relative_to(place.resolve()):
        raise CannotRun(f"{place}: found the kit of {where}, expected its own")
    options = ["run", short.experiment, "--seeds", str(SEED), "--runs", str(runs), "--device", "cpu"]
    options += [f"--set={setting}" for setting in short.settings]
    if killed:
        finished([sys.executable, "-c", KILLED, tree.module, *options], place, environment, code=-signal.SIGKILL)
        options.append("--resume")
    finished([sys.executable, "-m", tree.module, *options], place, environment)
    return read(runs / short.experiment / f"seed-{SEED}")


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of this repository at `commit`, as long as the block lasts."""
    finished(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], ROOT)
    try:
        yield folder
    finally:
        finished(["git", "worktree", "remove", "--force", str(folder)], ROOT)


def with_tutorial(folder: Path, project: Path) -> Tree:
    """The tree in `folder`, its tutorial made in `project` as `make tutorial` does, from the files as they lie there."""
    copier = [sys.executable, "-m", "copier", "copy", "--quiet", "--defaults", "--vcs-ref", "HEAD"]
    finished([*copier, "--data-file", "tutorial/answers.yaml", ".", str(project)], folder)
    shutil.copytree(folder / "tutorial/project", project, dirs_exist_ok=True)
    return Tree(folder, project)


def compare(commit: str, scratch: Path) -> list[tuple[str, str, int, str]]:
    """The rows of every run, the old tree's against this one's; then a killed run against one that was not."""
    found = []
    with checked_out(commit, scratch / "old") as folder:
        old = with_tutorial(folder, scratch / "old-tutorial")
        new = with_tutorial(ROOT, scratch / "new-tutorial")
        for short in RUNS:
            runs = scratch / short.title
            unbroken = run(new, short, runs / "new")
            found += rows(short.title, run(old, short, runs / "old"), unbroken)
            if short is POINTS:
                resumed = run(new, short, runs / "resumed", killed=True)
                found += rows(f"{short.title}, resumed", unbroken, resumed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_bits", description=__doc__)
    parser.add_argument("--commit", default=OLD_ENGINE, help=f"the version to compare with (default: {OLD_ENGINE})")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="same-bits-") as scratch:
            found = compare(options.commit, Path(scratch))
    except CannotRun as error:
        print(f"same_bits: {error}", file=sys.stderr)
        return IMPOSSIBLE
    print(table(found))
    return EQUAL if all(difference == "equal" for *_, difference in found) else DIFFERENT


if __name__ == "__main__":
    raise SystemExit(main())
