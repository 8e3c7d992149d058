"""`python ...` in a process of its own that need not import the libraries first: a fork of one that has. It begins seconds earlier.

Nothing of this repository is imported before the fork, so that the process finds engine, tools and method where any other would.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from multiprocessing import util
from pathlib import Path
from typing import NoReturn

import pytest
from forked import LONGEST_S
from installed import read_once

LIBRARIES = ("matplotlib.pyplot", "pydantic", "safetensors.torch", "scipy.optimize", "scipy.stats", "torch._dynamo", "tqdm", "yaml")  # fmt: skip
"""What most commands import; torch._dynamo is what the first optimiser imports."""


def python(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python -m ...` or `python -c ...` prints and ends with, in a folder. PYTHONPATH is this process' own."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {"arguments": arguments, "cwd": str(cwd), "environment": dict(environment), "output": folder}
        server = _server()
        assert server.stdin and server.stdout  # pipes
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        printed = [Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([sys.executable, *arguments], code, *printed)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(server.communicate)  # its input ends, so it does
    return server


def _serve() -> dict | None:
    """Forks for every line of the input. Returns in each child, with what it is to do, and at the end of the input."""
    for name in LIBRARIES:
        importlib.import_module(name)
    read_once(pytest.MonkeyPatch())
    metadata.packages_distributions()
    gc.freeze()  # else the first collection of each child copies every page
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _run(arguments: Sequence[str], cwd: str, environment: Mapping[str, str], output: str) -> NoReturn:
    """Becomes `python` with these arguments."""
    signal.alarm(LONGEST_S)  # the system ends a process that hangs
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT), stream)
    for name in ("warm", "forked", "installed"):
        sys.modules.pop(name, None)
    _keep_a_copy_for_multiprocessing()
    _end(_code(arguments))


def _keep_a_copy_for_multiprocessing() -> None:
    """Its server of forks, which `repro preflight` starts, is a new Python too: here a copy of this process as it is now."""
    ours, its = socket.socketpair()
    copy = os.fork()
    if copy == 0:
        ours.close()
        _serve_forks(its)
    its.close()
    spawn = util.spawnv_passfds

    def spawnv_passfds(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
        code = arguments[-1]
        if "multiprocessing.forkserver" not in code:
            return spawn(path, arguments, descriptors)
        socket.send_fds(ours, [json.dumps([code, list(descriptors)]).encode()], list(descriptors))
        return copy

    util.spawnv_passfds = spawnv_passfds


def _serve_forks(its: socket.socket) -> NoReturn:
    """Waits for the code of the server and the descriptors that it takes by their numbers; ends where none comes."""
    message, received, *_ = socket.recv_fds(its, 2**16, 16)
    if not message:
        os._exit(0)
    code, numbers = json.loads(message)
    its.close()
    above = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, max(numbers) + 1) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for descriptor, number in zip(above, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    _end(_code(["-c", code]))


def _end(code: int) -> NoReturn:
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # to take the libraries apart again would take a second


def _code(arguments: Sequence[str]) -> int:
    """What `python` with these arguments exits with."""
    option, what, *others = arguments
    sys.argv = [option, *others]
    try:
        if option == "-m":
            sys.path[0] = os.getcwd()
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert option == "-c"
            sys.path[0] = ""
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(main))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    asked = _serve()
    if asked is not None:
        _run(**asked)
