"""SIGTERM, sent by the code under test to its own process at a place that the test chooses."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forked import end, start
from toy_method import Config, Constant, Line
from toy_project import CONFIG, python_path

from repro import checkpoint, loop, run
from repro.__main__ import main
from repro.config import Pace, validate
from repro.errors import Terminated, termination
from repro.loop import run_phase
from repro.runtime import Runtime, World
from repro.update import Update
from repro_tools import cli

LINE = "repro: ended by SIGTERM; go on with the same command and --resume\n"


@pytest.fixture(autouse=True)
def received():
    """The signals that reached the test process itself, which no handler of ours took."""
    signals = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    yield signals
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No look through everything that is installed, which takes longer than a run."""
    monkeypatch.setattr(run, "imported_versions", dict)


def ask(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def asking(monkeypatch, owner, name, number=1, after=False):
    """Has the process asked to end in the call of that number of a function, before it does its work or after."""
    original, calls = getattr(owner, name), []

    def function(*arguments, **keywords):
        calls.append(1)
        if len(calls) == number and not after:
            ask()
        result = original(*arguments, **keywords)
        if len(calls) == number and after:
            ask()
        return result

    monkeypatch.setattr(owner, name, function)


def steps_of(monkeypatch, phase):
    """The steps for which a phase is asked for a minibatch from now on."""
    steps, original = [], phase.minibatch
    monkeypatch.setattr(phase, "minibatch", lambda self, step, draws: steps.append(step) or original(self, step, draws))
    return steps


def weights(folder):
    return {
        f"{path.parent.name}/{name}": weight
        for path in sorted(folder.glob("toy/seed-0/*/model.safetensors"))
        for name, weight in checkpoint.load(path)["networks"]["model"].items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("owner", "name", "number", "steps_done"),
    [
        (Line, "minibatch", 1, 1),
        (Line, "loss", 4, 4),
        (Line, "loss", 5, 5),
        (Update, "step", 8, 8),
        (checkpoint, "save", 1, 6),
        (loop._Log, "write", 3, 10),
    ],
    ids=["draws of the first step", "loss", "step that is saved anyway", "update", "saving", "logging"],
)
def test_a_phase_finishes_its_step_saves_and_goes_on_without_repeating_one(
    project, capsys, monkeypatch, owner, name, number, steps_done
):
    """States are saved every 5 steps. A signal while a state is saved or a loss written is seen after the next step."""
    assert main(["run", "toy", "--runs", "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        asking(patch, owner, name, number)
        assert main(["run", "toy"]) == 143
    assert capsys.readouterr() == ("", LINE)
    assert checkpoint.load(project / "runs/toy/seed-0/1-line/running.safetensors")["steps_done"] == steps_done
    steps = steps_of(monkeypatch, Line)
    assert main(["run", "toy", "--resume"]) == 0
    assert steps == list(range(steps_done, 12))
    assert same(weights(project / "whole"), weights(project / "runs"))
    for log in ("1-line/log.jsonl", "2-constant/log.jsonl"):
        assert (project / "runs/toy/seed-0" / log).read_text() == (project / "whole/toy/seed-0" / log).read_text()


@pytest.mark.parametrize(
    ("owner", "name", "number", "after"),
    [(Line, "loss", 12, False), (checkpoint, "save", 3, True)],
    ids=["in the last step", "after the last save"],
)
def test_a_phase_that_is_at_its_end_is_finished_and_the_next_not_begun(
    project, capsys, monkeypatch, owner, name, number, after
):
    with monkeypatch.context() as patch:
        asking(patch, owner, name, number, after)
        assert main(["run", "toy"]) == 143
    assert capsys.readouterr().err == LINE
    assert not (project / "runs/toy/seed-0/2-constant").exists()
    steps = steps_of(monkeypatch, Line)
    assert main(["run", "toy", "--resume"]) == 0
    assert steps == []


def test_a_signal_after_the_phase_has_looked_for_the_last_time_is_not_lost(project, monkeypatch):
    """The line phase of 12 steps looks 13 times: after each step and after its end."""
    with monkeypatch.context() as patch:
        asking(patch, World, "any", 13, after=True)
        assert main(["run", "toy"]) == 143
    assert not (project / "runs/toy/seed-0/2-constant").exists()


@pytest.mark.parametrize(("owner", "name"), [(Line, "prepare"), (Constant, "make_model")])
def test_between_phases_there_is_nothing_to_save_and_the_process_ends_at_once(
    project, capsys, monkeypatch, owner, name
):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, ask)
        steps = steps_of(patch, owner)
        assert main(["run", "toy"]) == 143
    assert capsys.readouterr() == ("", LINE) and steps == []
    assert main(["run", "toy", "--resume"]) == 0


def test_an_evaluation_ends_at_once_and_leaves_no_record(project, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "seed_global_generators", lambda *_: ask())
        assert main(["run", "toy"]) == 143
    assert capsys.readouterr() == ("", LINE)
    assert not (project / "runs/toy/seed-0/record.json").exists()
    steps = steps_of(monkeypatch, Constant)
    assert main(["run", "toy", "--resume"]) == 0
    assert steps == []


def test_a_second_signal_does_not_interrupt_the_way_out():
    """Schedulers and torchrun may both send one."""
    reached = []
    with pytest.raises(Terminated) as raised:
        with termination():
            try:
                ask()
            finally:
                ask()
                reached.append("end of the way out")
    assert reached and raised.value.__context__ is None


def test_the_command_line_gives_the_signal_back(project, received):
    assert main(["list"]) == 0
    ask()
    assert received == [signal.SIGTERM]


def line_phase(folder, checkpoint_every=5):
    return run_phase(
        Line(validate(Config, CONFIG, "toy")),
        folder=folder,
        identity={},
        seed=0,
        runtime=Runtime(torch.device("cpu")),
        pace=Pace(log_every=3, checkpoint_every=checkpoint_every),
        earlier={},
    )


def test_as_a_library_the_kit_leaves_the_signal_to_its_caller(tmp_path, monkeypatch, received):
    asking(monkeypatch, Line, "loss", 4)
    steps = steps_of(monkeypatch, Line)
    line_phase(tmp_path)
    assert received == [signal.SIGTERM] and steps == list(range(12))


def test_what_a_kill_left_of_a_state_is_gone_when_the_phase_is_finished(tmp_path):
    """A state that was saved for a signal is not saved again at that step, so nothing writes over a part of it."""
    (tmp_path / "running.safetensors.partial").write_bytes(b"the first half of a")
    line_phase(tmp_path, checkpoint_every=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "model.safetensors"]


def test_in_a_thread_the_command_line_leaves_the_signal_alone(project, monkeypatch, received):
    asking(monkeypatch, Line, "loss", 4)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["run", "toy"])))
    thread.start()
    thread.join()
    assert codes == [0] and received == [signal.SIGTERM]


class Forked:
    """In place of subprocess.Popen: the same command line in a process that need not import everything first."""

    def __init__(self, command, stdout, stderr, env):
        assert command[1:3] == ["-m", "repro_tools"]
        self.process = start(ask_parent_of_two, command[3:], os.getpid(), output=Path(stdout.name))

    def wait(self):
        return end(self.process)

    def terminate(self):
        self.process.terminate()


def ask_parent_of_two(arguments, parent):
    """Runs the command line; of two processes in their eighth step the second asks `parent` to end."""
    original = Line.minibatch

    def minibatch(self, step, draws):
        if step == 7:
            try:
                Path("first").touch(exist_ok=False)
            except FileExistsError:
                os.kill(parent, signal.SIGTERM)
        return original(self, step, draws)

    Line.minibatch = minibatch
    return cli.main(arguments)


def test_several_runs_are_told_and_all_save_their_states(project, capsys, monkeypatch):
    """Were they not, the hundred thousand steps would be done."""
    monkeypatch.setattr(subprocess, "Popen", Forked)
    endless = ["--set", "phases.line.iterations=100000", "--set", "pace.log_every=100000"]
    assert cli.main(["run", "toy", "--seeds", "0", "1", "2", "--jobs", "2", *endless]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == LINE.strip()
    for seed in (0, 1):
        folder = project / f"runs/toy/seed-{seed}"
        assert 8 <= checkpoint.load(folder / "1-line/running.safetensors")["steps_done"] < 100_000
        assert (folder / "output.log").read_text().endswith(LINE)
    assert not (project / "runs/toy/seed-2/config.yaml").exists()


def test_a_run_that_is_just_being_started_is_told_too_and_no_other_starts(project, monkeypatch):
    told, acted, shutdown = [], threading.Event(), ThreadPoolExecutor.shutdown

    class Starting:
        """A process that is still being started when the signal comes, and ends when it is told to."""

        def __init__(self, *arguments, **keywords):
            self.told = threading.Event()
            told.append(self.told)
            ask()
            assert acted.wait(60)

        def wait(self):
            return 143 if self.told.wait(60) else 1

        def terminate(self):
            self.told.set()

    monkeypatch.setattr(subprocess, "Popen", Starting)
    monkeypatch.setattr(
        ThreadPoolExecutor, "shutdown", lambda *given, **named: (acted.set(), shutdown(*given, **named))[1]
    )
    assert cli.main(["run", "toy", "--seeds", "0", "1", "2", "--jobs", "1"]) == 143
    assert [event.is_set() for event in told] == [True]


@pytest.mark.parametrize(
    ("number", "code", "words"), [("SIGTERM", 143, "ended by SIGTERM"), ("SIGINT", 130, "interrupted")]
)
def test_a_signal_while_modules_are_imported_ends_without_a_traceback(number, code, words, tmp_path):
    """Half a module is no place to raise an exception in."""
    (tmp_path / "half.py").write_text(
        f"import os, signal\nos.kill(os.getpid(), signal.{number})\nraise AssertionError\n"
    )
    lines = "from repro.errors import ending_at_once\nwith ending_at_once():\n    import half"
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), python_path()])}
    done = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line == f"repro: {words}; go on with the same command and --resume"
