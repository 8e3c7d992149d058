"""Processes that a test may kill: forks of one server that has imported everything, so that each starts at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, NoReturn

SERVER = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first optimiser imports.
SERVER.set_forkserver_preload(["nsgf.method", "pytest", "repro_tools.run", "sklearn.datasets", "torch._dynamo"])
LONGEST_S = 900  # a process that takes longer hangs, also on a machine under load
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def start(
    function: Callable[..., int],
    *arguments: Any,
    output: Path,
    environment: Mapping[str, str] | None = None,
    daemon: bool = True,
) -> BaseProcess:
    """Calls `function` in a process of its own, in the current folder. What it returns is the exit code, what it prints
    goes to the end of `output`. One that is to have workers is no daemon."""
    process = SERVER.Process(
        target=_child, args=(function, arguments, str(output), dict(environment or {}), os.getcwd()), daemon=daemon
    )
    process.start()
    return process


def end(process: BaseProcess) -> int:
    """The exit code of a process, -9 for one that was killed. A process that hangs is a failure."""
    process.join(LONGEST_S)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{process.name} hangs")
    assert process.exitcode is not None  # it has ended
    return process.exitcode


def run(
    function: Callable[..., int], *arguments: Any, output: Path, environment: Mapping[str, str] | None = None
) -> int:
    """The exit code of `function` in a process of its own."""
    return end(start(function, *arguments, output=output, environment=environment))


class Command:
    """In place of subprocess.Popen for `python -m repro ...`: a process that need not import everything first."""

    def __init__(self, command: list[str], stdout: IO[Any], stderr: IO[Any], env: Mapping[str, str]):
        assert command[:3] == [sys.executable, "-m", "repro_tools"] and stdout is stderr
        self.process = start(_command, command[3:], output=Path(stdout.name), environment=env)

    def wait(self) -> int:
        return end(self.process)

    def terminate(self) -> None:
        self.process.terminate()


def run_ranks(
    functions: list[Callable[..., int]], *arguments: Any, output: Path, environment: Mapping[str, str] | None = None
) -> list[int]:
    """The exit codes of the processes of one run, one for each function, in the environment that torchrun makes.

    The first rank's output goes to `output`, the second's to `output`.1, and so on.
    """
    shared = {"WORLD_SIZE": str(len(functions)), "LOCAL_WORLD_SIZE": str(len(functions))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **LOOPBACK}
    processes = []
    for rank, function in enumerate(functions):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
        path = output.with_name(output.name + f".{rank}" * (rank > 0))
        processes.append(start(function, *arguments, output=path, environment=shared | own))
    return [end(process) for process in processes]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _command(arguments: list[str]) -> int:
    from repro_tools import cli

    sys.argv[1:] = arguments
    return cli.main()


def _child(
    function: Callable[..., int], arguments: tuple[Any, ...], output: str, environment: dict[str, str], folder: str
) -> NoReturn:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.exit(function(*arguments))
