"""What the cells of a session's notebook do (`repro notebook` writes them): machine, libraries, the run, its progress, what it gave.

The notebook carries this file and `carry`: where it runs there are only the engine and the method. It runs in the notebook's own process,
which takes no device memory: PyTorch is asked in a process of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from repro.config import read_yaml
from repro.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, EXIT_TERMINATED, BadInput, RunFailed
from repro_tools.notebook import carry

FINISHED, NOT_FINISHED, FAILED = "finished", "not finished", "failed"
TIMED_OUT, KILLED = 124, 137
"""Exit codes of coreutils' `timeout`: it ended the command, or had to kill it."""

GRACE_S = 600
"""Between SIGTERM and a kill: the phase finishes its step and saves."""

KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy")
"""What stays as the platform has it: built for its driver, or compiled against."""

ASK_TORCH = (
    'import torch; found = torch.cuda.is_available(); name = torch.cuda.get_device_name() if found else "none"; '
    'print(f"torch {torch.__version__} | CUDA {torch.version.cuda} | GPU {name}")'
)


def do(command: Sequence[str | Path], folder: Path, paths: Sequence[Path] = ()) -> int:
    """Prints and runs a command in `folder`, its output below. `paths` is where Python looks first. Returns the exit code."""
    return _finish(_start(command, folder, paths))


def show_machine(folder: Path) -> None:
    """GPU, PyTorch, processors, free memory and free disk at `folder`, one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    print(f"{os.cpu_count()} processors | {memory:.1f} GiB of memory free")
    print(f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free at {folder}")
    if do([sys.executable, "-c", ASK_TORCH], folder):
        raise SystemExit("repro: this environment has no working PyTorch; choose one of the platform that has")


def install_missing(requirements: Sequence[str]) -> None:
    """Installs what is missing or too old, and nothing else; PyTorch and what goes with it stays as it is."""
    from packaging.requirements import Requirement  # every pip has it beside it

    def lacks(text: str) -> bool:
        wanted = Requirement(text)
        try:
            return not wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
        except metadata.PackageNotFoundError:
            return True

    missing = [text for text in requirements if lacks(text)]
    if kept := [text for text in missing if Requirement(text).name in KEPT]:
        raise SystemExit(f"repro: found another {', '.join(kept)} than expected; choose an environment that has it")
    if not missing:
        print("nothing to install")
        return
    constraints = Path("constraints.txt").absolute()
    constraints.write_text("".join(f"{name}=={version}\n" for name in KEPT if (version := _version(name))))
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints, *missing]
    if do(pip, Path.cwd()):
        raise SystemExit("repro: pip failed; is the internet on?")


def seconds_left(began: float, hours: float, reserve_s: int) -> int:
    """Seconds that the run may take: until `reserve_s` before the end of a session of so many hours that began at `began`."""
    left = int(began + hours * 3600 - reserve_s - time.time())
    if left <= 0:
        raise SystemExit("repro: the session is nearly over; pack the runs and start another one")
    return left


def run(
    command: Sequence[str | Path], folder: Path, runs: Path, archive: Path, *, paths: Sequence[Path] = (), every_s: int
) -> str:
    """Runs the command to its end and says how it ended: FINISHED, NOT_FINISHED or FAILED.

    Every `every_s` seconds it packs what is saved so far and prints the progress: a session can end without a warning. Interrupting the
    cell ends the run as the time limit does.
    """
    process = _start(command, folder, paths)
    stopper = threading.Event()
    packer = threading.Thread(target=_pack_now_and_then, args=(runs, archive, every_s, stopper), daemon=True)
    packer.start()
    try:
        code = _finish(process)
    except KeyboardInterrupt:
        process.terminate()
        code = _finish(process)
    finally:
        stopper.set()
        packer.join()
    state, advice = outcome(code)
    print(f"exit code {code}: {state}; {advice}")
    return state


def outcome(code: int) -> tuple[str, str]:
    """What an exit code of `timeout ... repro run` means, and what to do."""
    if code == EXIT_OK:
        return FINISHED, "every run is done"
    if code in (TIMED_OUT, EXIT_TERMINATED, EXIT_INTERRUPTED, -15):
        return NOT_FINISHED, "the state is saved, run the next session"
    if code in (KILLED, -9):
        return NOT_FINISHED, (
            "it was killed, for want of memory or because saving took too long; the last saved state is kept, run the next session"
        )
    if code == EXIT_BAD_INPUT:
        return FAILED, "the line above says what to mend; what was saved is kept"
    return FAILED, "the lines above say why; what was saved is kept"


def show_progress(runs: Path) -> None:
    """A line for each phase of each run: steps done, the last loss, whether it is finished."""
    lines = progress(runs)
    print("\n".join(lines) if lines else f"no run in {runs} yet")


def progress(runs: Path) -> list[str]:
    """See `show_progress`."""
    lines = []
    for config_file in sorted(runs.glob("*/seed-*/config.yaml")):
        folder = config_file.parent
        try:
            phases = read_yaml(config_file).get("phases") or {}
        except BadInput:
            phases = {}
        for own in sorted(path for path in folder.glob("[0-9]*-*") if path.is_dir()):
            name = own.name.partition("-")[2]
            wanted = (phases.get(name) or {}).get("iterations", "?")
            step, loss = _last(own / "log.jsonl")
            state = "finished" if (own / "model.safetensors").exists() else f"step {step} of {wanted}"
            lines.append(
                f"{folder.parent.name} {folder.name}  {own.name}: {state}" + (f", loss {loss:.4g}" if loss else "")
            )
        done = "judged" if (folder / "record.json").exists() else "not judged yet"
        lines.append(f"{folder.parent.name} {folder.name}  evaluation: {done}")
    return lines


def pack(runs: Path, archive: Path) -> None:
    """Packs the runs and reads the archive back. Prints how large it is, or why there is none."""
    try:
        carry.pack(runs, archive)
        manifest = carry.verify(archive)
    except (BadInput, RunFailed) as error:
        print(f"repro: {error}")
        return
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{archive}: {len(manifest['files'])} files, {size / 1e6:,.1f} MB, every checksum held")


def restore(name: str, places: Sequence[Path], runs: Path) -> None:
    """Brings back the runs of the session before, if there was one. Stops the notebook when they are there and none is sound."""
    try:
        print(carry.restore(name, places, runs))
    except (BadInput, RunFailed) as error:
        raise SystemExit(f"repro: {error}\nTo begin anew on purpose, detach or delete these archives.") from None


def show_results(runs: Path, archive: Path) -> None:
    """The metrics of every finished run, and how they are judged at home: the specification and the tools are there."""
    for path in sorted(runs.glob("*/seed-*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        print(f"{record['experiment']} seed {record['seed']}")
        for name, value in record["metrics"].items():
            print(f"  {name} {value:.6g}")
    print(f"next, in the project at home: mkdir -p runs && tar -xf {archive.name} -C runs && repro report")


def _start(command: Sequence[str | Path], folder: Path, paths: Sequence[Path]) -> subprocess.Popen:
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    return subprocess.Popen(
        words,
        cwd=folder,
        env=_environment(os.environ, paths),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Interrupting a cell would reach the run as Ctrl-C, which saves nothing.
        start_new_session=True,
    )


def _finish(process: subprocess.Popen) -> int:
    assert process.stdout is not None  # `_start` asks for a pipe
    for line in process.stdout:
        print(line, end="", flush=True)
    return process.wait()


def _environment(given: Mapping[str, str], paths: Sequence[Path]) -> dict[str, str]:
    before = [str(path) for path in paths] + [part for part in given.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**given, **({"PYTHONPATH": os.pathsep.join(before)} if before else {})}


def _pack_now_and_then(runs: Path, archive: Path, every_s: int, stopper: threading.Event) -> None:
    while not stopper.wait(every_s):
        try:
            carry.pack(runs, archive)
        except (BadInput, RunFailed) as error:
            print(f"repro: {error}")
        print("\n".join(progress(runs)), flush=True)


def _last(log: Path) -> tuple[int, float | None]:
    """The last step and its loss in a phase's log, which may be cut anywhere."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return 0, None
    for line in reversed(lines):
        try:
            point = json.loads(line)
            return int(point["step"]), float(point["loss"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0, None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
