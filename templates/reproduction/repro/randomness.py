"""Every random draw is a pure function of what it is for, so a resumed run needs no saved random state, and
any process can draw a minibatch ahead."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repro.errors import BadInput, RunFailed
from repro.rounds import NOTHING, Rows


def derive_seed(*parts: str | int) -> int:
    """A seed for the draw that `parts` name, e.g. (run seed, phase, "step", 17). Below 2**32.

    PyTorch's CPU generator keeps 32 bits of a seed: a wider one would promise more streams than there are.
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for the draw that `parts` name."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


def seed_global_generators(*parts: str | int) -> None:
    """Seeds what a library draws from without asking: Python, NumPy and PyTorch (dropout, initialisation)."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed)
    # What torch.manual_seed does, without a look at every kind of device: that takes up to a millisecond.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


Orders = MutableMapping[tuple[str, int], tuple[tuple[int, int], Tensor]]
"""The newest order of each kind of epoch, so that it is not drawn again at every step."""


class Draw(torch.Generator):
    """What one minibatch is drawn from: a generator on the CPU for the draw that `parts` name.

    `collected` holds what the phase's `collect` made for this round, nothing without rounds; `round_step`
    counts the round's steps.
    """

    step: int
    round_step: int
    collected: Rows

    def __new__(cls, *arguments: Any, **named: Any) -> Draw:
        return super().__new__(cls)

    def __init__(
        self,
        seed: int,
        stream: str,
        *parts: str | int,
        step: int = 0,
        round_step: int = 0,
        collected: Mapping[str, Tensor] | None = None,
        orders: Orders | None = None,
    ):
        self.step, self.round_step, self.collected = (
            step,
            round_step,
            Rows.of(collected) if collected else NOTHING,
        )
        self._of, self._orders = (seed, stream), {} if orders is None else orders
        self.manual_seed(derive_seed(seed, stream, *parts))

    def epoch_rows(self, rows: int, batch_size: int, *, last: Literal["drop", "keep"]) -> Tensor:
        """The numbers of this step's rows, where each epoch goes once through all `rows` in an order of its
        own.

        `last` says whether the smaller minibatch at an epoch's end is left out or kept. The order of an epoch
        is a function of (seed, phase, epoch): shape (batch_size,), int64.
        """
        return self._rows("epoch", 0, self.step, rows, batch_size, last)

    def round_rows(self, batch_size: int, *, last: Literal["drop", "keep"]) -> Tensor:
        """The same among the rows of `collected`; the epochs are counted from the beginning of the round."""
        begun, count = self.step - self.round_step, self.collected.count
        return self._rows("round", begun, self.round_step, count, batch_size, last)

    def _rows(self, kind: str, begun: int, step: int, rows: int, batch_size: int, last: str) -> Tensor:
        if not 0 < batch_size <= rows:
            expected = f"expected 1 to {rows}, the rows there are"
            raise ValueError(f"rows of an epoch: found a minibatch of {batch_size}, {expected}")
        per_epoch = rows // batch_size if last == "drop" else -(-rows // batch_size)
        epoch, number = divmod(step, per_epoch)
        epoch_of, order = self._orders.get((kind, rows), (None, torch.empty(0)))
        if epoch_of != (begun, epoch):
            order = torch.randperm(rows, generator=generator(*self._of, kind, begun, epoch))
            self._orders[kind, rows] = (begun, epoch), order
        return order[number * batch_size : (number + 1) * batch_size]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this block torch computes on one thread, as it does in workers: sums have the same bits then."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


class Ahead:
    """What `draw` gives for each of the steps, in their order, drawn by workers: copies of this process.

    With `pin` in memory from which a GPU copies without waiting. `close` ends the workers.
    """

    def __init__(self, draw: Callable[[int], Any], steps: range, workers: int, pin: bool):
        loader = DataLoader(
            _Drawn(draw),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            multiprocessing_context="fork",  # a phase and its data need no pickling
            collate_fn=_as_it_is,
            worker_init_fn=_deaf,
            pin_memory=pin,
            generator=torch.Generator(),  # not the global one, which belongs to the step
        )
        others = set(multiprocessing.active_children())
        self.left, self._drawn = steps, iter(loader)
        self._workers = set(multiprocessing.active_children()) - others

    def next(self) -> Any:
        """What was drawn for the first of the steps `left`. Raises RuntimeError where a worker ended."""
        self.left = self.left[1:]
        try:
            return next(self._drawn)
        except (OSError, EOFError) as error:  # in the middle of what it sent
            for worker in self._workers:
                worker.join(1.0)
                if not worker.is_alive():
                    raise RuntimeError(f"DataLoader worker (pid {worker.pid}): {error}") from None
            raise

    def close(self) -> None:
        """A process waits for its children before it ends, and these hear no signal but SIGKILL."""
        told = threading.current_thread() is threading.main_thread()  # of children that end, by the loader
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if told else None
        try:
            # Not left to the end of the last reference: that of an exception may be the last.
            self._drawn._shutdown_workers()  # type: ignore[attr-defined]
        finally:
            for worker in self._workers:
                worker.kill()  # one that is still drawing
                worker.join()
            if told:
                signal.signal(signal.SIGCHLD, before)


class _Drawn(Dataset[Any]):
    def __init__(self, draw: Callable[[int], Any]):
        self._draw = draw

    def __getitem__(self, step: int) -> Any:
        try:
            return self._draw(step)
        except (BadInput, RunFailed) as error:
            return error


def _as_it_is(drawn: Any) -> Any:
    return drawn


def _deaf(worker: int) -> None:
    """Signals to the whole group are for the process that trains: it saves, and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
