"""Where a run runs: device, processes, number formats, machine, progress. Nothing here shapes a result but
what is said so.

Several processes of one machine, started by `torchrun --nproc-per-node N`, train one network: each draws the
whole minibatch from the same generator and trains on its own share of it. So the result is that of one
process with the same minibatch, up to the rounding of a sum in another order.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from repro.errors import BadInput, RunFailed

Determinism = Literal["strict", "warn"]

LONGEST_WAIT = timedelta(days=7)
"""Of a process for the others, who may be evaluating or building a pool. One that has ended is noticed at
once."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run: rank 0 .. size - 1. One process alone is rank 0 of 1.

    What asks the others raises RunFailed when one of them has ended.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes: states, logs, records and messages are written once."""
        return self.rank == 0

    @property
    def rank_part(self) -> tuple[str | int, ...]:
        """What the rank adds to the name of a draw that processes must not share, such as dropout; nothing
        for one process."""
        return () if self.size == 1 else ("rank", self.rank)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th of `items`, beginning with the rank-th: the shares of all processes are all items."""
        return items[self.rank :: self.size]

    def require_shares(self, rows: int, name: str) -> None:
        """Raises BadInput when a minibatch of the phase `name` cannot be shared out equally."""
        if rows % self.size:
            expected = f"expected a multiple of the {self.size} processes"
            raise BadInput(f"phases.{name}.batch_size: found a minibatch of {rows}, {expected}")

    def share_of(self, batch: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """This process' rows of a minibatch. Raises BadInput when they cannot be shared out equally.

        Unequal shares would weigh examples differently: the gradients are averaged over processes.
        """
        if self.size == 1:
            return dict(batch)
        for column in batch.values():
            self.require_shares(len(column), name)
        return {key: column[self.rank :: self.size] for key, column in batch.items()}

    def sum_gradients(self, weights: list[Tensor]) -> None:
        """Puts the sum of all processes' gradients in the place of each. One that only some have counts as
        zero elsewhere."""
        if self.size == 1:
            return
        there = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.float64)
        self._sum(there)
        held = [weight for weight, anywhere in zip(weights, there.tolist(), strict=True) if anywhere]
        for weight in held:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for dtype in dict.fromkeys(weight.dtype for weight in held):
            gradients = [weight.grad for weight in held if weight.dtype == dtype and weight.grad is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._sum(flat)
            for gradient, part in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def total(self, value: float) -> float:
        """The sum of a number over the processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        self._sum(total)
        return float(total)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in one of the processes. All of them get the same answer at the same step."""
        return self.total(float(flag)) > 0

    def barrier(self) -> None:
        """Waits for all processes."""
        self.total(0.0)  # unlike dist.barrier it needs no device

    def _sum(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise RunFailed(f"process {self.rank} of {self.size}: another one ended ({why})") from None


@contextmanager
def world_of_this_process() -> Iterator[World]:
    """The world that torchrun describes in the environment; without it this process is alone.

    Raises BadInput for processes on more than one machine, since the data of rounds are shared by way of
    local files, and for an environment that torchrun did not make.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if (local := int(os.environ.get("LOCAL_WORLD_SIZE", size))) != size:
        here = f"{local} of them here, expected all on one machine"
        raise BadInput(f"WORLD_SIZE: found {size} processes, {here}")
    # Gradients of a GPU go by NCCL, and numbers that decide what to do next by gloo, without a device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    except ValueError as error:
        expected = f"expected them started by torchrun ({error})"
        raise BadInput(f"WORLD_SIZE: found {size} processes, {expected}") from None
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Runtime:
    """Device, folder of data sets, and this process among the others.

    `stand_in_data`: a method reads no data set and takes a few random examples of the same shape, range and
    type in its place. `repro preflight` sets it where data is not to be had; no run ever does. `determinism`:
    see `deterministic`; a resume to the same bits is promised for `strict`.
    """

    device: torch.device
    data_root: Path = Path("data")
    world: World = field(default_factory=World)
    stand_in_data: bool = False
    determinism: Determinism = "strict"


@contextmanager
def deterministic(device: torch.device, determinism: Determinism = "strict") -> Iterator[None]:
    """Within this block a GPU takes algorithms that give the same bits each time, as a CPU with a fixed
    number of threads does.

    Otherwise its convolutions add up gradients in the order in which they happen to be ready, and no resume
    can be exact. An operation that has no such algorithm raises with `strict`; with `warn` it warns and is
    done.
    """
    if device.type != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before it is first used
    torch.use_deterministic_algorithms(True, warn_only=determinism == "warn")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


CPU = Runtime(torch.device("cpu"))
"""Where what is asked about a method needs no device."""


def find_device(name: str, world: World) -> torch.device:
    """The device that --device names. Raises BadInput when this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and world.size > 1:
        if name != "cuda":
            expected = f"expected cuda, auto or cpu with {world.size} processes"
            raise BadInput(f"--device: found '{name}', {expected}")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    count = torch.cuda.device_count()
    devices = ["cpu", *(f"cuda:{index}" for index in range(count))]
    refusal = f"--device: found '{name}', expected {', '.join(devices)} or auto"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise BadInput(refusal) from None
    if found.type not in ("cpu", "cuda") or (found.index or 0) >= (count if found.type == "cuda" else 1):
        raise BadInput(refusal)
    return found


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Within this block a GPU's products of float32 numbers are what `precision` says, float32 unless it says
    tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def check_precision(precision: str, phase: str, device: torch.device) -> None:
    """Raises BadInput for a precision that the device has no hardware for: emulated, it is slower than
    float32."""
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            expected = f"expected float32 or fp16 on {torch.cuda.get_device_name(device)}"
            raise BadInput(f"phases.{phase}.precision: found bf16, {expected}")


def progress(
    steps: Iterable[T], label: str, total: int | None = None, initial: int = 0, shown: bool = True
) -> tqdm[T]:
    """`steps` with a bar, where standard error is a terminal."""
    look: dict[str, Any] = {
        "delay": 2.0,
        "leave": False,
        "dynamic_ncols": True,
        "disable": None if shown else True,
    }
    return tqdm(steps, desc=label, total=total, initial=initial, **look)


def say(line: str) -> None:
    """A line on standard error, above any bar."""
    tqdm.write(line, file=sys.stderr)


def imported_versions() -> dict[str, str]:
    """The version of every installed distribution of which this process has imported something."""
    distributions = metadata.packages_distributions()
    names = {name for module in list(sys.modules) for name in distributions.get(module, ())}
    found = {name: metadata.version(name) for name in sorted(names)}
    # With its build, such as +cu130, which the metadata may leave out.
    return found | {"torch": str(torch.__version__)}


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that a run used: processor, cores, threads, memory, and the GPU's name if it ran on
    one."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
    }


def peak_host_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())
