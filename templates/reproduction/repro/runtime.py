"""Where a run runs: device, processes, number formats, machine, progress. Nothing here shapes a result but
what is said so.

Several processes of one machine, started by `torchrun --nproc-per-node N`, train one network: each draws the
whole minibatch from the same generator and trains on its own rows of it. Gradients are added up when an
optimiser steps. So the result is that of one process with the same minibatch, up to the rounding of a sum in
another order.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from repro.errors import BadInput, RunFailed, ToldElsewhere, exit_code

Determinism = Literal["strict", "warn"]

MET = 3
"""Numbers that processes exchange with each comparison of where they are."""
LONGEST_WAIT = timedelta(days=7)
"""Of a process for the others, who may be evaluating. One that has ended is noticed at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run: rank 0 .. size - 1. One process alone is rank 0 of 1.

    What asks the others is done by all of them, in one order. Each says first where it is, `place`, so that
    two at different places find out and none waits. Raises RunFailed then, and when another one has ended.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes: states, logs, records and messages are written once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th of `items`, beginning with the rank-th: the shares of all processes are all items."""
        return items[self.rank :: self.size]

    def require_rows(self, rows: int, name: str) -> None:
        """Raises BadInput when a minibatch of the phase `name` has fewer rows than there are processes."""
        if rows < self.size:
            found, expected = (
                f"found a minibatch of {rows} rows",
                f"expected at least {self.size}, one a process",
            )
            raise BadInput(f"phases.{name}.batch_size: {found}, {expected}")

    def sum_gradients(
        self, weights: Sequence[Tensor], *numbers: float, place: str = "gradients"
    ) -> list[float]:
        """Puts the sum over processes in the place of each weight's gradient. Returns those of the numbers.

        A gradient that some processes lack counts as zero there; one that all lack stays None.
        """
        if self.size == 1:
            return list(numbers)
        there = bytes(weight.grad is not None for weight in weights)
        met = self._meet(f"{place}, {len(weights)} weights", zlib.crc32(there), *numbers)
        if len({held for held, *_ in met}) > 1:
            there = bytes(self.gather(torch.tensor([list(there)]), place).any(0).tolist())
        sums = []
        for weight, anywhere in zip(weights, there, strict=True):
            if anywhere:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                sums.append(weight.grad)
        if any(one.is_sparse for one in sums):
            expected = f"expected dense ones with {self.size} processes"
            raise RunFailed(f"{place}: found a sparse gradient, {expected}")
        self._together(sums, dist.all_reduce)
        return [sum(column) for column in list(zip(*met, strict=True))[1:]]

    def gather(self, rows: Tensor, place: str = "gather") -> Tensor:
        """The rows of all processes, (sum of n, ...) from (n, ...) each, in the order of the ranks.

        The gradient of what is made of them goes back to the process of each row.
        """
        return rows if self.size == 1 else _Gather.apply(rows, self, place)

    def all_reduce(self, tensor: Tensor, place: str = "all_reduce") -> Tensor:
        """The sum of a tensor over the processes, without a gradient."""
        if self.size == 1:
            return tensor.detach()
        self._meet(f"{place} {tuple(tensor.shape)}")
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._wait(dist.all_reduce, total)
        return total

    def broadcast(self, tensor: Tensor, place: str = "broadcast") -> Tensor:
        """The first process' tensor, in all of them."""
        if self.size == 1:
            return tensor.detach()
        self._meet(f"{place} {tuple(tensor.shape)}")
        own = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._wait(dist.broadcast, own, 0)
        return own

    def broadcast_into(self, tensors: Sequence[Tensor], place: str) -> None:
        """Puts the first process' numbers into the tensors of all of them."""
        if self.size > 1:
            self._meet(f"{place}, {len(tensors)} tensors")
            self._together(tensors, dist.broadcast, 0)

    def texts(self, text: str, place: str) -> list[str]:
        """The text of each process."""
        if self.size == 1:
            return [text]
        lengths = self.gather(torch.tensor([len(text.encode())]), place).tolist()
        letters = self.gather(torch.tensor(list(text.encode()), dtype=torch.uint8), place)
        return [bytes(own.tolist()).decode() for own in letters.split(lengths)]

    def require_same(self, facts: Mapping[str, Any], place: str) -> None:
        """Raises BadInput for a fact, a plain value, in which a process differs from the first process."""
        for rank, text in enumerate(all_facts := self.texts(json.dumps(facts), place)):
            if text != all_facts[0]:
                expected, found = json.loads(all_facts[0]), json.loads(text)
                key = next(key for key in {**expected, **found} if expected.get(key) != found.get(key))
                told = f"process {rank} found {found.get(key)}, expected {expected.get(key)} as process 0"
                raise BadInput(f"{place}: {key}: {told}")

    def total(self, value: float, place: str = "total") -> float:
        """The sum of a number over the processes."""
        return value if self.size == 1 else sum(own for (own,) in self._meet(place, value))

    def any(self, flag: bool, place: str = "any") -> bool:
        """Whether `flag` holds in one of the processes. All of them get the same answer at the same step."""
        return self.total(float(flag), place) > 0

    def barrier(self, place: str = "barrier") -> None:
        """Waits for all processes."""
        self.total(0.0, place)  # unlike dist.barrier it needs no device

    def _meet(self, place: str, *numbers: float) -> list[list[float]]:
        """The numbers of each process, at most MET, once all of them are at this place."""
        own = torch.zeros(1 + MET, dtype=torch.float64)  # of one size at all places
        own[: 1 + len(numbers)] = torch.tensor([zlib.crc32(place.encode()), *numbers], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(dist.all_gather, found, own)
        if any(one[0] != own[0] for one in found):
            found_at = f"found process {self.rank} of {self.size} at {place} and another one elsewhere"
            expected = "expected all there: which calls there are must not depend on the process or its rows"
            raise RunFailed(f"{found_at}, {expected}")
        return [one[1 : 1 + len(numbers)].tolist() for one in found]

    def _together(self, tensors: Sequence[Tensor], exchange: Callable[..., object], *arguments: Any) -> None:
        """One exchange for all tensors of a kind, in place."""
        for kind in dict.fromkeys((one.dtype, one.device) for one in tensors):
            own = [one for one in tensors if (one.dtype, one.device) == kind]
            flat = torch.cat([one.detach().reshape(-1) for one in own])
            self._wait(exchange, flat, *arguments)
            with torch.no_grad():
                for one, part in zip(own, flat.split([one.numel() for one in own]), strict=True):
                    one.copy_(part.view_as(one))

    def _wait(self, exchange: Callable[..., object], *arguments: Any) -> None:
        try:
            exchange(*arguments)
        except RuntimeError as error:
            why, here = " ".join(str(error).split()), f"process {self.rank} of {self.size}"
            if re.search("connection|read error|write error|socket", why, re.IGNORECASE):
                kept = "the last saved state is kept, go on with the same command and --resume"
                raise RunFailed(f"{here}: another one ended; {kept}") from None
            raise RunFailed(f"{here}: found an exchange that failed ({why[:300]}), expected none") from None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, world: World, place: str) -> Tensor:
        met = world._meet(f"{place} of {tuple(rows.shape[1:])}", len(rows))
        counts = [int(count) for (count,) in met]
        most = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        most[: len(rows)] = rows
        found = [torch.empty_like(most) for _ in counts]
        world._wait(dist.all_gather, found, most)
        context.world, context.counts, context.place = world, counts, place
        return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        total = context.world.all_reduce(slope, f"{context.place}, backward")
        return total.split(context.counts)[context.world.rank], None, None


@contextmanager
def world_of_this_process() -> Iterator[World]:
    """The world that torchrun describes in the environment; without it this process is alone.

    Of what ends several processes, or one and then the others, one process tells: in the others ToldElsewhere
    takes its place. Raises BadInput for processes on more than one machine, since the data of rounds are
    shared by way of local files, and for an environment that torchrun did not make.
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
        store, rank, _ = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    except ValueError as error:
        expected = f"expected them started by torchrun ({error})"
        raise BadInput(f"WORLD_SIZE: found {size} processes, {expected}") from None
    try:
        yield World(rank, size)
    except SystemExit:  # of which nothing is told
        raise
    except BaseException as error:
        if _is_told_elsewhere(store):
            raise ToldElsewhere(exit_code(error)) from error
        raise
    finally:
        dist.destroy_process_group()


def _is_told_elsewhere(store: Any) -> bool:
    """Whether another process has said that it tells why they end."""
    try:
        return bool(store.add("telling", 1) > 1)
    except RuntimeError:  # it has ended that kept the store, of which this one should tell
        return False


@dataclass(frozen=True)
class Runtime:
    """Device, folder of data sets, and this process among the others.

    `stand_in_data`: a method reads no data set and takes a few random examples of the same shape, range and
    type in its place. `repro preflight` sets it where data is not to be had; no run ever does. `determinism`:
    see `deterministic`; a resume to the same bits is promised for `strict`. `micro_batches`: into how many a
    process divides its rows of a minibatch, by the name of a phase, or "*" for all. `workers`: how many
    processes draw minibatches ahead.
    """

    device: torch.device
    data_root: Path = Path("data")
    world: World = field(default_factory=World)
    stand_in_data: bool = False
    determinism: Determinism = "strict"
    micro_batches: Mapping[str, int] = field(default_factory=dict)
    workers: int = 0

    def micro_batches_of(self, phase: str) -> int:
        return self.micro_batches.get(phase, self.micro_batches.get("*", 1))

    def parts_of(self, phase: str) -> int:
        """Into how many parts a minibatch of the phase is divided: micro-batches of all processes."""
        return self.world.size * self.micro_batches_of(phase)


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
    """Within this block a GPU's products of float32 numbers are float32, or tf32 if `precision` says so."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def check_precision(precision: str, phase: str, device: torch.device) -> None:
    """Raises BadInput for a precision without hardware in the device: emulated, it is slower than float32."""
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
    """The hardware that a run used: processor, cores, threads, memory, and the GPU's name if it used one."""
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
