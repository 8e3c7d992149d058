"""Several processes of one machine that train one network, started by `torchrun --nproc-per-node N`.

Each step every process draws the whole minibatch from the same generator and trains on its own share of it. So
the result is that of one process with the same minibatch, up to the rounding of a sum in another order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repro.errors import BadInput, RunFailed

LONGEST_WAIT = timedelta(days=7)
"""Of a process for the others, who may be evaluating or building a pool. One that has ended is noticed at once."""

_KEPT: list[dist.ProcessGroup] = []
"""Groups until the process ends. A wrapped network that outlives its group in the frames of an exception would end it
while it holds Python's lock, and wait for threads of the group that wait for the lock."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run: rank 0 .. size - 1. One process alone is rank 0 of 1."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes: states, logs, records and messages are written once."""
        return self.rank == 0

    @property
    def rank_part(self) -> tuple[str | int, ...]:
        """What the rank adds to the name of a draw that processes must not share, such as dropout; nothing for one process."""
        return () if self.size == 1 else ("rank", self.rank)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th of `items`, beginning with the rank-th: the shares of all processes are all items."""
        return items[self.rank :: self.size]

    def require_shares(self, rows: int, name: str) -> None:
        """Raises BadInput when a minibatch of the phase `name` cannot be shared out equally."""
        if rows % self.size:
            raise BadInput(
                f"phases.{name}.batch_size: found a minibatch of {rows}, expected a multiple of the {self.size} processes"
            )

    def share_of(self, batch: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """This process' rows of a minibatch. Raises BadInput when they cannot be shared out equally.

        Unequal shares would weigh examples differently: the gradients are averaged over processes.
        """
        if self.size == 1:
            return dict(batch)
        for column in batch.values():
            self.require_shares(len(column), name)
        return {key: column[self.rank :: self.size] for key, column in batch.items()}

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The network with gradients averaged over the processes; weights are those of rank 0."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            self.mean(0.0)  # unlike dist.barrier it needs no device

    def mean(self, value: float) -> float:
        """The mean of a number over the processes. Raises RunFailed when one of them has ended."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise RunFailed(f"process {self.rank} of {self.size}: another one ended ({why})") from None
        return float(total) / self.size

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in one of the processes. All of them get the same answer at the same step."""
        return flag if self.size == 1 else self.mean(float(flag)) > 0


@contextmanager
def world_of_this_process() -> Iterator[World]:
    """The world that torchrun describes in the environment; without it this process is alone.

    Raises BadInput for processes on more than one machine, since a pool is shared by way of a local file, and for an
    environment that torchrun did not make.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if (local := int(os.environ.get("LOCAL_WORLD_SIZE", size))) != size:
        raise BadInput(f"WORLD_SIZE: found {size} processes, {local} of them here, expected all on one machine")
    # Both at once: gradients of a GPU go by NCCL, and numbers that decide what to do next by gloo, without a device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    except ValueError as error:
        raise BadInput(f"WORLD_SIZE: found {size} processes, expected them started by torchrun ({error})") from None
    _KEPT.append(dist.group.WORLD)
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
