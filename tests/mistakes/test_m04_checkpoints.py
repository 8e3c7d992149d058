"""m04: no checkpoints.

A run that is killed, anywhere, goes on from its last saved state and ends in the bits of one that was not: every weight, every loss, every
metric. Only the steps after that state are done again. A test that only asks whether training went on would pass when nothing was restored.
"""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import count

import pytest
import torch
from proof import Proof

from nsgf import phases as methods
from repro import checkpoint, loop, run
from repro.errors import BadInput
from repro.run import execute, plan, run_folder
from repro.runtime import Runtime

STEPS, SAVED_EVERY = 5, 2
CPU = Runtime(torch.device("cpu"))
COMMON = [
    f"phases.*.iterations={STEPS}",
    "phases.*.batch_size=8",
    "phases.*.pool.batches=2",
    "phases.*.pool.batch_size=8",
    "pace.log_every=1",
    f"pace.checkpoint_every={SAVED_EVERY}",
]


@dataclass(frozen=True)
class Tiny:
    """An experiment made small, and the phases that it still has."""

    experiment: str
    phases: list[str]
    overrides: list[str]


MOONS = Tiny(
    "2d-moons",
    ["velocity_field", "straight_flow", "time_predictor"],
    [
        *COMMON,
        "phases.velocity_field_100=null",
        "phases.ot_cfm=null",
        "phases.*.network.width=8",
        "evaluation.test_points=8",
        "evaluation.path_points=2",
        "evaluation.floor_draws=1",
    ],
)
# Images, with all that a step can have: a pool that changes while the phase runs, warm-up, clipping, averaged weights.
DIGITS = Tiny(
    "digits",
    [*MOONS.phases, "feature_classifier"],
    [
        *COMMON,
        "phases.*.pool.batches=3",
        "phases.*.pool.resident_batches=1",
        "phases.*.warmup_steps=4",
        "phases.*.clip_norm=0.5",
        "phases.*.ema_decay=0.5",
        "phases.[sv]*.network.channels=8",
        "nsgf_plus_plus.straight_flow_step=0.5",
        "evaluation.samples=4",
        "evaluation.euler_steps=[2]",
        "evaluation.nearest=2",
        "evaluation.pictures=2",
    ],
)


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


@dataclass(frozen=True)
class Kill:
    """When the process dies: in the given call of a function of the real code, whose arguments tell the phase."""

    phase: str
    step: int
    """Of the phase, from 0. -1: while its pool is built."""
    in_the_checkpoint: bool = False
    """Only after the step, with the file of its state half written."""
    tiny: Tiny = MOONS

    @property
    def saved(self) -> int:
        """The steps that the last whole state holds."""
        return max(0, self.step) // SAVED_EVERY * SAVED_EVERY


KILLS = {
    "in the middle of a phase": Kill("straight_flow", 3),
    "before the first saved state": Kill("time_predictor", 1),
    "between two phases": Kill("straight_flow", 0),
    "while the pool is built": Kill("velocity_field", -1),
    "while a state is written": Kill("straight_flow", 3, in_the_checkpoint=True),
    "in phase 1 of images": Kill("velocity_field", 3, tiny=DIGITS),
    "in phase 2 of images": Kill("straight_flow", 3, tiny=DIGITS),
    "in phase 4 of images": Kill("feature_classifier", 3, tiny=DIGITS),
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What a record says of the machine is looked up on every run, and is no part of a proof."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "imported_versions", dict)
        yield


@pytest.fixture(scope="module", autouse=True)
def uninterrupted(quick, project, tmp_path_factory):
    """Runs of the code as it is that nothing killed. Made before anything is planted."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    for tiny in (MOONS, DIGITS):
        execute_tiny(project, runs, tiny=tiny)
    return runs


def watch(patch, kill=None):
    """The name of the phase of each step that is done from now on; the process dies as `kill` says."""
    steps = []

    def watched(real):
        def minibatch(self, step, generator):
            if kill and not kill.in_the_checkpoint and (self.name, step) == (kill.phase, kill.step):
                raise Killed
            steps.append(self.name)
            return real(self, step, generator)

        return minibatch

    for kind in (methods.VelocityField, methods.StraightFlow, methods.TimePredictor, methods.FeatureClassifier):
        patch.setattr(kind, "minibatch", watched(kind.minibatch))
    if kill and kill.step < 0:
        real_flow, states_made = methods.euler_flow, count()

        def euler_flow(*points, **settings):
            for state in real_flow(*points, **settings):
                if next(states_made) == 12:
                    raise Killed
                yield state

        patch.setattr(methods, "euler_flow", euler_flow)
    if kill and kill.in_the_checkpoint:
        real_flush = checkpoint.flush

        def flush(path):
            if path.is_file() and steps.count(kill.phase) == kill.step + 1:
                path.write_bytes(path.read_bytes()[:100])
                raise Killed
            real_flush(path)

        patch.setattr(checkpoint, "flush", flush)
    return steps


def execute_tiny(project, runs, kill=None, tiny=MOONS, **options):
    """Runs the experiment and returns the steps that were done, by phase."""
    with pytest.MonkeyPatch.context() as patch:
        steps = watch(patch, kill)
        asked = {"resume": False, "resume_phase": None} | options
        try:
            execute(plan(project, tiny.experiment, tiny.overrides), 0, runs, CPU, **asked)
        except Killed:
            assert kill
        else:
            assert not kill, f"the run was not killed at {kill}"
    return {name: steps.count(name) for name in tiny.phases}


def compare(found, expected, tiny=MOONS):
    """AssertionError unless the run in both folders left the same weights, losses and metrics, bit for bit."""
    found, expected = (run_folder(runs, tiny.experiment, 0) for runs in (found, expected))
    for number, name in enumerate(tiny.phases, start=1):
        one, other = (
            checkpoint.load(folder / f"{number}-{name}" / "model.safetensors") for folder in (found, expected)
        )
        weights, expected_weights = one["networks"]["model"], other["networks"]["model"]
        same = all(torch.equal(weights[key], tensor) for key, tensor in expected_weights.items())
        assert same, f"{name}: the weights differ from those of an uninterrupted run"
        assert one["curves"] == other["curves"], f"{name}: the losses differ from those of an uninterrupted run"
        assert len(one["curves"]["loss"]) == STEPS
    one, other = (json.loads((folder / "record.json").read_text()) for folder in (found, expected))
    assert one["metrics"] == other["metrics"] and one["curves"] == other["curves"], (
        "the record differs from that of an uninterrupted run"
    )


def check(killed, project, tmp_path, uninterrupted):
    kill = KILLS[killed]
    execute_tiny(project, tmp_path, kill, kill.tiny)
    try:
        steps = execute_tiny(project, tmp_path, tiny=kill.tiny, resume=True)
    except BadInput as error:
        raise AssertionError(f"the run cannot be resumed: {error}") from error
    phases = kill.tiny.phases
    before = phases[: phases.index(kill.phase)]
    left = dict.fromkeys(phases, STEPS) | dict.fromkeys(before, 0) | {kill.phase: STEPS - kill.saved}
    assert steps == left, (
        f"killed in step {kill.step} of {kill.phase}: the resumed run did {steps} steps, left were {left}"
    )
    compare(tmp_path, uninterrupted, kill.tiny)


def check_resume_phase(project, tmp_path, uninterrupted):
    """Phase 2 and what follows is trained again, to the same bits; phase 1 is kept, and so is what was there before."""
    shutil.copytree(uninterrupted, tmp_path / "again")
    steps = execute_tiny(project, tmp_path / "again", resume_phase=2)
    again = dict.fromkeys(MOONS.phases, STEPS) | {MOONS.phases[0]: 0}
    assert steps == again, f"--resume-phase 2 did {steps} steps, expected {again}"
    compare(tmp_path / "again", uninterrupted)
    kept = sorted(path.name for path in (run_folder(tmp_path / "again", "2d-moons", 0) / "superseded-1").iterdir())
    assert kept == ["2-straight_flow", "3-time_predictor", "record.json", "tensors.safetensors"]


def nothing_saved(monkeypatch):
    """The states of a running phase are not written."""
    real = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: None if path.name.startswith("running") else real(path, state)
    )


def copied_aside(monkeypatch):
    """What is superseded is copied before it is deleted."""
    move = lambda self, target: shutil.copytree(self, target) and shutil.rmtree(self)  # noqa: E731
    real = run.Path.rename
    monkeypatch.setattr(
        run.Path, "rename", lambda self, target: move(self, target) if self.is_dir() else real(self, target)
    )


def change_saved(monkeypatch, change):
    real = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda path, state: real(path, state | change(state) if path.name.startswith("running") else state),
    )


def no_optimiser(monkeypatch):
    """The moments of Adam are left out."""
    without = lambda optimiser: optimiser | {"state": {}}  # noqa: E731
    change_saved(
        monkeypatch,
        lambda saved: {"state": saved["state"] | {"optimiser": without(saved["state"]["optimiser"])}},
    )


def no_average(monkeypatch):
    """The average of the weights is not restored: a resumed phase begins a new one."""
    real = loop.Loop.restore

    def restore(self, before):
        new = {"average": checkpoint.saved(self.state)["average"]}
        real(self, before | {"state": before["state"] | new})

    monkeypatch.setattr(loop.Loop, "restore", restore)


def pool_of_the_beginning(monkeypatch):
    """A pool in parts starts over with the process: the resumed steps are drawn from its first minibatches."""
    prepare, trajectory = methods.VelocityField.prepare, methods.VelocityField.trajectory

    def prepared(self, *arguments):
        prepare(self, *arguments)
        self.first = None

    def counted(self, batch):
        self.first = batch if self.first is None else self.first
        return trajectory(self, batch - self.first)

    monkeypatch.setattr(methods.VelocityField, "prepare", prepared)
    monkeypatch.setattr(methods.VelocityField, "trajectory", counted)


def step_skipped(monkeypatch):
    change_saved(monkeypatch, lambda state: {"steps_done": state["steps_done"] + 1})


def step_repeated(monkeypatch):
    change_saved(monkeypatch, lambda state: {"steps_done": state["steps_done"] - 1})


def same_data_again(monkeypatch):
    """The half-made resume: draws are counted from where the process began, so it trains on what it has already seen."""
    real_seed, real_draw, counters = loop.seed_global_generators, loop.Draw, {}

    def seed(run_seed, name, what, *rest):
        if what == "initialise":
            counters[name] = count()
        real_seed(run_seed, name, what, *rest)

    monkeypatch.setattr(loop, "seed_global_generators", seed)
    monkeypatch.setattr(
        loop, "Draw", lambda seed, name, what, _, **more: real_draw(seed, name, what, next(counters[name]), **more)
    )


def losses_lost(monkeypatch):
    """The curve of a resumed run begins at the resume."""
    change_saved(monkeypatch, lambda state: {"curves": {}})


def written_in_place(monkeypatch):
    """The new state is written over the old one, and no other is kept."""
    monkeypatch.setattr(checkpoint, "previous", lambda path: path)
    real = checkpoint.Path.with_name
    monkeypatch.setattr(
        checkpoint.Path, "with_name", lambda self, name: self if name.endswith(".partial") else real(self, name)
    )


def phase_not_started_over(monkeypatch):
    monkeypatch.setattr(run, "_set_aside", lambda *_: None)


def everything_started_over(monkeypatch):
    real = run._set_aside
    monkeypatch.setattr(run, "_set_aside", lambda one, first: real(one, 1))


def saved_once_more(monkeypatch):
    real = checkpoint.save

    def save(path, state):
        real(path, state)
        real(path, checkpoint.load(path))

    monkeypatch.setattr(checkpoint, "save", save)


def another_wall_time(monkeypatch):
    change_saved(monkeypatch, lambda state: {"wall_s": state["wall_s"] + 100.0})


WEIGHTS = ": the weights differ from those of an uninterrupted run"
MIDDLE = {
    nothing_saved: "the resumed run did {'velocity_field': 0, 'straight_flow': 5, 'time_predictor': 5} steps, left were",
    step_skipped: "the resumed run did {'velocity_field': 0, 'straight_flow': 2, 'time_predictor': 5} steps, left were",
    step_repeated: "the resumed run did {'velocity_field': 0, 'straight_flow': 4, 'time_predictor': 5} steps, left were",
    no_optimiser: "straight_flow" + WEIGHTS,
    same_data_again: "straight_flow" + WEIGHTS,
    losses_lost: "straight_flow: the losses differ from those of an uninterrupted run",
}
IMAGES = {no_average: "velocity_field" + WEIGHTS, pool_of_the_beginning: "velocity_field" + WEIGHTS}
PROOFS = [
    Proof(partial(check, "in the middle of a phase"), MIDDLE, [saved_once_more, another_wall_time]),
    Proof(
        partial(check, "while a state is written"),
        {written_in_place: "the run cannot be resumed: "},
        [saved_once_more],
    ),
    Proof(partial(check, "in phase 1 of images"), IMAGES, [saved_once_more]),
    Proof(
        check_resume_phase,
        {
            phase_not_started_over: "--resume-phase 2 did {'velocity_field': 0, 'straight_flow': 0, 'time_predictor': 0} steps",
            everything_started_over: "--resume-phase 2 did {'velocity_field': 5, 'straight_flow': 5, 'time_predictor': 5} steps",
        },
        [copied_aside],
    ),
]


def test_proof(case):
    case()


@pytest.mark.parametrize(
    "killed",
    [
        "before the first saved state",
        "between two phases",
        "while the pool is built",
        "in phase 2 of images",
        "in phase 4 of images",
    ],
)
def test_every_other_kill(project, tmp_path, uninterrupted, killed):
    check(killed, project, tmp_path, uninterrupted)


def test_resume_phase_needs_the_phases_before_it(project, tmp_path):
    execute_tiny(project, tmp_path, Kill("velocity_field", 3))
    with pytest.raises(
        BadInput,
        match=r"^--resume-phase 2: found no .*1-velocity_field/model.safetensors, expected phase 1 \(velocity_field\)",
    ):
        execute_tiny(project, tmp_path, resume_phase=2)
    with pytest.raises(
        BadInput,
        match="^--resume-phase: found 4, expected one of: 1 velocity_field, 2 straight_flow, 3 time_predictor$",
    ):
        execute_tiny(project, tmp_path, resume_phase=4)


def test_holds_when_killed_while_a_phase_is_set_aside(project, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "again")
    moons = plan(project, MOONS.experiment, MOONS.overrides)
    with pytest.MonkeyPatch.context() as patch:
        real, moves = run.Path.rename, count()

        def rename(self, target):
            if next(moves) == 1:
                raise Killed
            return real(self, target)

        patch.setattr(run.Path, "rename", rename)
        with pytest.raises(Killed):
            execute(moons, 0, tmp_path / "again", CPU, resume=False, resume_phase=2)
    execute_tiny(project, tmp_path / "again", resume=True)
    compare(tmp_path / "again", uninterrupted)


def test_a_kill_at_the_end_of_a_phase_leaves_no_pool_behind(project, tmp_path):
    moons = plan(project, MOONS.experiment, MOONS.overrides)
    with pytest.MonkeyPatch.context() as patch:

        def rmtree(*_, **__):
            raise Killed

        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            execute(moons, 0, tmp_path, CPU, resume=False, resume_phase=None)
    execute_tiny(project, tmp_path, resume=True)
    left = sorted(path.name for path in (run_folder(tmp_path, "2d-moons", 0) / "1-velocity_field").iterdir())
    assert left == ["log.jsonl", "model.safetensors"]
