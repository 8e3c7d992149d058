"""What a user may rely on of the saved states of a run: damage is noticed, named and survived, a full disk costs nothing."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from forked import run, run_ranks
from safetensors import SafetensorError
from tiny_project import DIGITS, merged, write_project
from toy_method import Constant, Line

from repro import checkpoint
from repro import run as running
from repro.__main__ import main
from repro.update import Update

TOY = ["run", "toy", "--device", "cpu", "--set", "pace.checkpoint_every=2"]
"""The line phase does 12 steps. Its state is saved every 2."""
RUN = Path("runs/toy/seed-0")
NEWEST, BEFORE = (Path("1-line") / f"{name}.safetensors" for name in ("running", "running.previous"))
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
"""What safetensors says of a full disk: an error class of its own, so that `except OSError` misses it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No look through everything that is installed, which takes longer than a run."""
    monkeypatch.setattr(running, "imported_versions", dict)


def killed(monkeypatch, phase, step, *arguments):
    """Runs the toy until it dies before a step."""
    with monkeypatch.context() as patch:
        original = phase.minibatch

        def minibatch(self, number, draws):
            if number == step:
                raise KeyboardInterrupt
            return original(self, number, draws)

        patch.setattr(phase, "minibatch", minibatch)
        assert main([*TOY, *arguments]) == 130


def steps_of(monkeypatch, phase):
    """The steps that a phase does from now on."""
    steps, original = [], phase.minibatch
    monkeypatch.setattr(phase, "minibatch", lambda self, step, draws: steps.append(step) or original(self, step, draws))
    return steps


def damage(path):
    """Flips one bit in the last tensor."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def weights(folder):
    """The weights and the curves of every finished phase, as bytes and numbers."""
    states = {path.parent.name: checkpoint.load(path) for path in sorted(folder.glob("*/model.safetensors"))}
    return {
        name: ({key: weight.numpy().tobytes() for key, weight in state["networks"]["model"].items()}, state["curves"])
        for name, state in states.items()
    }


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def whole(project, capsys):
    """What an uninterrupted run leaves."""
    assert main([*TOY, "--runs", "whole"]) == 0
    capsys.readouterr()
    return weights(project / "whole/toy/seed-0")


# --- damage ------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_state_costs_one_interval_and_is_named(project, capsys, monkeypatch, whole):
    killed(monkeypatch, Line, 9)
    damage(RUN / NEWEST)
    capsys.readouterr()
    steps = steps_of(monkeypatch, Line)
    assert main([*TOY, "--resume"]) == 0
    _, told, warning, *_ = capsys.readouterr().err.splitlines()
    assert told.endswith("goes on at phase 1 line, from its last saved state")
    assert warning.startswith(f"repro: warning: {RUN / NEWEST}: no sound checkpoint: found other contents than its che")
    assert "goes on from the state before it, step 6; the damaged one is now running.damaged.safetensors" in warning
    assert steps == list(range(6, 12)) and weights(RUN) == whole


def test_two_sound_states_are_resumed_without_a_word_from_the_newer(project, capsys, monkeypatch, whole):
    """The innocent variant."""
    killed(monkeypatch, Line, 9)
    capsys.readouterr()
    steps = steps_of(monkeypatch, Line)
    assert main([*TOY, "--resume"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert steps == list(range(8, 12)) and weights(RUN) == whole


def test_the_sound_state_outlives_the_saves_after_a_damaged_one(project, capsys, monkeypatch, whole):
    """A damaged file that stayed in its place would become the one before the newest, and the sound one be gone."""
    killed(monkeypatch, Line, 9)
    damage(RUN / NEWEST)
    killed(monkeypatch, Line, 7, "--resume")
    killed(monkeypatch, Line, 9, "--resume")
    damage(RUN / NEWEST)
    capsys.readouterr()
    assert main([*TOY, "--resume"]) == 0
    assert "step 6" in capsys.readouterr().err and weights(RUN) == whole
    assert not list((RUN / "1-line").glob("running*"))


def test_a_kill_between_two_renames_costs_one_interval_at_most(project, capsys, monkeypatch, whole):
    killed(monkeypatch, Line, 9)
    (RUN / NEWEST).unlink()
    capsys.readouterr()
    assert main([*TOY, "--resume"]) == 0
    assert "line, from its last saved state\n" in capsys.readouterr().err and weights(RUN) == whole


def test_where_no_state_is_sound_one_line_says_what_to_do_each_time_and_it_works(project, capsys, monkeypatch, whole):
    killed(monkeypatch, Line, 9)
    for state in (NEWEST, BEFORE):
        damage(RUN / state)
    before = contents(RUN)
    for _ in range(2):
        capsys.readouterr()
        assert main([*TOY, "--resume"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"repro: {RUN / NEWEST}: no sound checkpoint: ") and str(BEFORE) in line
        assert line.endswith("; start phase 1 over with --resume-phase 1")
        assert contents(RUN) == before
    assert main([*TOY, "--resume-phase", "1"]) == 0
    assert weights(RUN) == whole and (RUN / "superseded-1" / NEWEST).exists()


def test_a_damaged_finished_phase_is_named_with_its_number_and_the_others_are_kept(project, capsys, monkeypatch, whole):
    killed(monkeypatch, Constant, 7)
    damage(RUN / "1-line/model.safetensors")
    before = contents(RUN)
    capsys.readouterr()
    assert main([*TOY, "--resume"]) == 2
    assert capsys.readouterr().err.endswith("; start phase 1 over with --resume-phase 1\n")
    assert contents(RUN) == before


def test_the_running_states_are_there_until_the_finished_one_is_found_sound(project, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        real = checkpoint.save

        def save(path, state):
            real(path, state)
            if path.name == "model.safetensors":
                damage(path)

        patch.setattr(checkpoint, "save", save)
        assert main(TOY) == 2
    assert checkpoint.load(RUN / NEWEST)["steps_done"] == 10


def test_a_pool_that_changes_with_the_steps_follows_the_older_state(tmp_path, monkeypatch):
    """Steps 5 to 7 of 7 renew the pool; the state of step 4 is damaged, that of step 2 resumed."""
    changes = {"phases": {"velocity_field": {"iterations": 7, "pool": {"resident_batches": 2}}}}
    monkeypatch.chdir(write_project(tmp_path / "digits", "digits", merged(DIGITS, changes)))
    command = ["run", "digits", "--device", "cpu"]
    assert main([*command, "--runs", "whole"]) == 0
    with monkeypatch.context() as patch:
        real = Update.step

        def step(self, *given, **named):
            if self.step_number == 5:
                raise KeyboardInterrupt
            return real(self, *given, **named)

        patch.setattr(Update, "step", step)
        assert main(command) == 130
    damage(Path("runs/digits/seed-0/1-velocity_field/running.safetensors"))
    assert main([*command, "--resume"]) == 0
    assert weights(Path("runs/digits/seed-0")) == weights(Path("whole/digits/seed-0"))


def test_several_processes_pass_over_the_same_state_and_one_says_so(project, monkeypatch):
    assert run_ranks([main, main], [*TOY, "--runs", "whole"], output=project / "whole.log") == [0, 0]
    assert run_ranks([dying, dying], TOY, output=project / "log") == [130, 130]
    damage(RUN / NEWEST)
    assert run_ranks([main, main], [*TOY, "--resume"], output=project / "resumed.log") == [0, 0]
    logs = [(project / f"resumed.log{rank}").read_text() for rank in ("", ".1")]
    assert logs[0].count("warning") == 1 and logs[1] == ""
    assert weights(RUN) == weights(project / "whole/toy/seed-0")


def dying(arguments):
    def minibatch(self, step, draws, original=Line.minibatch):
        if step == 9:
            raise KeyboardInterrupt
        return original(self, step, draws)

    Line.minibatch = minibatch
    return main(arguments)


# --- files in another's place ------------------------------------------------------------------------------------


def test_a_state_moved_from_a_run_of_another_configuration_is_refused_with_the_differences(
    project, capsys, monkeypatch
):
    killed(monkeypatch, Line, 9, "--runs", "a", "--set", "phases.line.batch_size=4", "--set", "pool_size=32")
    killed(monkeypatch, Line, 9, "--runs", "b")
    shutil.copy(Path("a/toy/seed-0") / NEWEST, Path("b/toy/seed-0") / NEWEST)
    before = contents(Path("b"))
    capsys.readouterr()
    assert main([*TOY, "--runs", "b", "--resume"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repro: ")]
    place = f"repro: {Path('b/toy/seed-0') / NEWEST}"
    assert [line.partition(";")[0] for line in lines] == [
        f"{place}: config.phases.line.batch_size: found a state of 4, expected 8",
        f"{place}: config.pool_size: found a state of 32, expected 64",
    ]
    assert contents(Path("b")) == before


def test_a_state_of_another_seed_is_refused(project, capsys, monkeypatch):
    for number in ("0", "1"):
        killed(monkeypatch, Line, 9, "--seeds", number)
    shutil.copy(Path("runs/toy/seed-1") / NEWEST, RUN / NEWEST)
    capsys.readouterr()
    assert main([*TOY, "--resume"]) == 2
    assert "running.safetensors: seed: found a state of 1, expected 0; " in capsys.readouterr().err


def test_a_state_of_another_pace_is_not(project, monkeypatch, whole):
    """The innocent variant."""
    killed(monkeypatch, Line, 9, "--set", "pace.checkpoint_every=3")
    assert main([*TOY, "--resume"]) == 0
    assert weights(RUN) == whole


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("2-constant/running", "1-line/model", "phase: found a state of 'constant', expected 'line'"),
        ("1-line/model", "2-constant/running", "phase: found a state of 'line', expected 'constant'"),
        ("2-constant/running", "2-constant/model", "found 6 steps done, expected 9 to 9"),
    ],
)
def test_a_file_in_the_place_of_another_is_refused(project, capsys, monkeypatch, source, target, reason):
    killed(monkeypatch, Constant, 7)
    shutil.copy(RUN / f"{source}.safetensors", RUN / f"{target}.safetensors")
    before = contents(RUN)
    capsys.readouterr()
    assert main([*TOY, "--resume"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repro: ")]
    assert f"{RUN / target}.safetensors: " in line and reason in line
    assert contents(RUN) == before


def test_a_finished_state_in_the_place_of_a_running_one_is_refused(project, capsys, monkeypatch):
    assert main(TOY) == 0
    (RUN / "record.json").unlink()
    (RUN / "2-constant/model.safetensors").rename(RUN / "2-constant/running.safetensors")
    capsys.readouterr()
    assert main([*TOY, "--resume"]) == 2
    assert "does not fit phase constant as the code is now: found 9 steps done, expected 0 to 8" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(("phase", "step"), [(Line, 9), (Constant, 7)], ids=["a running phase", "a finished one"])
def test_a_state_of_another_network_is_refused_in_one_line(project, capsys, monkeypatch, phase, step):
    """The code changed between two sessions, the configuration did not."""
    killed(monkeypatch, phase, step)
    monkeypatch.setattr(Line, "make_model", lambda self: torch.nn.Linear(1, 1))
    capsys.readouterr()
    assert main([*TOY, "--resume"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repro: ")]
    assert "found a state that does not fit phase line as the code is now: Error(s) in loading state_dict" in line


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 1, 100, 2000], ids=lambda written: f"after {written} bytes")
def test_a_full_disk_costs_nothing_that_was_saved(project, capsys, monkeypatch, whole, written):
    killed(monkeypatch, Line, 7)
    states = {path: path.read_bytes() for path in (RUN / NEWEST, RUN / BEFORE)}
    capsys.readouterr()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"x" * written)
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        assert main([*TOY, "--resume"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"repro: {RUN / NEWEST}: cannot be written (No space left on device): found ")
    assert "bytes free, expected room for " in line and line.endswith("go on with the same command and --resume")
    assert {path: path.read_bytes() for path in states} == states and not list(RUN.rglob("*.partial"))
    assert main([*TOY, "--resume"]) == 0
    assert weights(RUN) == whole


def limited(arguments):
    """A real disk that takes no file of more than 1500 bytes: a state does not fit, log and configuration do."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    return main(arguments)


def test_a_disk_that_really_refuses_costs_nothing_that_was_saved(project, monkeypatch, whole):
    killed(monkeypatch, Line, 7)
    states = {path: path.read_bytes() for path in (RUN / NEWEST, RUN / BEFORE)}
    assert min(map(len, states.values())) > 1500
    log = project / "log"
    assert run(limited, [*TOY, "--resume"], output=log) == 1
    line = log.read_text().splitlines()[-1]
    assert line.startswith(f"repro: {RUN / NEWEST}: cannot be written (File too large): found ")
    assert {path: path.read_bytes() for path in states} == states
    assert sorted(os.listdir(RUN / "1-line")) == [
        "log.jsonl",
        "running.previous.safetensors",
        "running.safetensors",
    ] + ["scratch"]
    assert main([*TOY, "--resume"]) == 0
    assert weights(RUN) == whole


@pytest.mark.parametrize(
    ("owner", "name", "error", "file"),
    [
        (Path, "open", OSError(28, "No space left on device"), "1-line/log.jsonl"),
        (running, "save_file", FULL, "tensors.safetensors"),
        (checkpoint, "flush", OSError(28, "No space left on device"), "config.yaml"),
    ],
    ids=["log", "tensors", "configuration"],
)
def test_a_disk_that_is_full_for_another_file_ends_the_run_in_one_line_too(
    project, capsys, monkeypatch, whole, owner, name, error, file
):
    real = getattr(owner, name)

    def full(*given, **named):
        if owner is Path and given[0].name != Path(file).name:
            return real(*given, **named)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert main(TOY) == 1
    assert f"repro: {RUN / file}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(Path("runs").rglob("*.partial"))
    assert main([*TOY, "--resume"]) == 0
    assert weights(RUN) == whole


def test_what_a_killed_save_left_is_gone_when_the_phase_goes_on(project, monkeypatch):
    """safetensors writes into .tmpXXXXXX first. A kill leaves it there, as large as the state."""
    killed(monkeypatch, Line, 7)
    left = [RUN / "1-line" / name for name in (".tmpAbCdEf", "running.safetensors.partial")]
    for path in left:
        path.write_bytes(b"half a state")
    killed(monkeypatch, Line, 7, "--resume")
    assert not any(path.exists() for path in left)


# --- what it costs -----------------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured():
    root = Path(__file__).parents[2]
    measured = json.loads((root / "benchmarks/results/checkpoints.json").read_text())
    page = " ".join((root / "refs/checkpoints.md").read_text().split())
    assert (
        f"{measured['gigabytes']:.2f} GB, a save takes {measured['save_s']:.1f} s, {measured['checksum_s']:.1f} s of it for the checksum, "
        f"and a load {measured['load_s']:.1f} s" in page
    )
    assert f"That is {measured['checksum_s'] / measured['gigabytes']:.1f} s of checksum per GB" in page
    assert measured["machine"]["processor"] and len(measured["commit"]) >= 40
