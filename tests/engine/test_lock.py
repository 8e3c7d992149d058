"""One process at a time works on a run: another is refused and writes nothing, and a lock ends with its process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repro import run
from repro.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from repro_tools import cli

RUN = ["run", "toy", "--seeds", "0", "--device", "cpu"]
HOLDS = "import sys; from pathlib import Path; from repro.run import alone_in\nwith alone_in(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder():
    """Processes that hold the lock of a folder until they are told to end."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def left(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [[*RUN, "--resume"], ["evaluate", "toy", "--seeds", "0", "--device", "cpu"]])
def test_a_second_process_is_refused_and_writes_nothing(project, holder, capsys, command):
    assert cli.main(RUN) == EXIT_OK
    folder = project / "runs/toy/seed-0"
    if command[0] == "run":
        (folder / "record.json").unlink()  # or the run is finished, and there is nothing to do
    before = left(project / "runs")
    holder(folder)
    capsys.readouterr()
    assert cli.main(command) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("repro: runs/toy/seed-0: found another process at work on this run")
    assert left(project / "runs") == before


def test_a_lock_ends_with_its_process_even_one_that_is_killed(project, holder):
    folder = project / "runs/toy/seed-0"
    folder.mkdir(parents=True)
    process = holder(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli.main(RUN) == EXIT_OK


def test_another_run_goes_on_meanwhile(project, holder):
    folder = project / "runs/toy/seed-1"
    folder.mkdir(parents=True)
    holder(folder)
    assert cli.main(RUN) == EXIT_OK


def test_a_run_that_was_begun_while_this_process_looked_is_not_written_over(project, monkeypatch, capsys):
    """Both found no run; the other one was first, and has ended before this one asks for the lock."""
    real, folder = run.alone_in, project / "runs/toy/seed-0"

    def late(path):
        (folder / "config.yaml").write_bytes((project / "configs/toy.yaml").read_bytes())
        return real(path)

    monkeypatch.setattr(run, "alone_in", late)
    assert cli.main(RUN) == EXIT_BAD_INPUT
    assert "found a run, expected none" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_an_error_within_leaves_no_lock(tmp_path):
    with pytest.raises(RuntimeError), run.alone_in(tmp_path):
        raise RuntimeError
    with run.alone_in(tmp_path), pytest.raises(BadInput, match="another process"), run.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("lacks", ["the module", "the call"])
def test_without_locks_nothing_is_locked(tmp_path, monkeypatch, lacks):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    if lacks == "the module":
        monkeypatch.setattr(run, "fcntl", None)
    else:
        monkeypatch.setattr(run.fcntl, "flock", unsupported)
    with run.alone_in(tmp_path), run.alone_in(tmp_path):
        pass
