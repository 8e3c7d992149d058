"""Which storages are alive, and the worst moment: the memory of a piece of code as PyTorch's operations see it.

Own code and not `torch.distributed._tools.MemTracker`, which is private, reports nothing, without an error, when it is entered before
the fake mode, and keeps graphs alive by its module hooks. Here are weak references to storages and nothing else; the order does not
matter. What an operation takes and frees within itself is not seen: the workspace of a convolution, for one.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_BLOCK = 512
"""Bytes: PyTorch's allocator hands out multiples of it on CUDA (cited: kMinBlockSize, c10/cuda/CUDACachingAllocator)."""
REST = "activations and temporaries"


@dataclass(frozen=True)
class Peak:
    """Bytes alive at the worst moment, by kind, and the same in blocks of CUDA's allocator at the worst moment of those."""

    total: int
    in_blocks: int
    by_kind: Mapping[str, int]


@dataclass
class _Storage:
    size: int
    kind: str


class LiveStorages(TorchDispatchMode):
    """Counts the storages that are made while it is entered, until their last reference is gone, a graph's included.

    What is made counts as "activations and temporaries" until `label` says what it is. `operations`
    are the names of those that ran, `largest` the bytes of the largest storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.largest = 0
        self._storages: dict[int, _Storage] = {}
        self._by_kind: Counter[str] = Counter()
        self._total = self._in_blocks = 0
        self.restart()

    @property
    def alive(self) -> int:
        """Bytes alive now."""
        return self._total

    @property
    def peak(self) -> Peak:
        """The worst moment since the last `restart`."""
        return Peak(self._peak, self._peak_in_blocks, {kind: size for kind, size in self._peak_by_kind.items() if size})

    def restart(self) -> None:
        """Forgets the worst moment; what is alive stays counted."""
        self._peak, self._peak_in_blocks, self._peak_by_kind = self._total, self._in_blocks, dict(self._by_kind)

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what the storages of `tensors` are."""
        for tensor in tensors:
            known = self._storages.get(id(tensor.untyped_storage()))
            if known is not None:
                self._by_kind[known.kind] -= known.size
                self._by_kind[kind] += known.size
                known.kind = kind

    def label_rest(self, kind: str) -> None:
        """Says what all that is alive and has no label is."""
        for storage in self._storages.values():
            if storage.kind == REST:
                self._by_kind[REST] -= storage.size
                self._by_kind[kind] += storage.size
                storage.kind = kind

    def forget(self, kind: str = REST) -> None:
        """Counts what is alive of `kind` no longer: it lies on the host."""
        for storage in [one for one in self._storages.values() if one.kind == kind]:
            self._resize(storage, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.add(function.name().split(".")[0])
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._see(leaf.untyped_storage())
        if self._total >= self._peak:  # the latest of equal moments: by then more is labelled
            self._peak, self._peak_by_kind = self._total, dict(self._by_kind)
        self._peak_in_blocks = max(self._peak_in_blocks, self._in_blocks)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        known = self._storages.get(id(storage))
        if known is None:
            known = self._storages[id(storage)] = _Storage(0, REST)
            weakref.finalize(storage, self._gone, id(storage)).atexit = False
            self._resize(known, storage.nbytes())
            self.largest = max(self.largest, known.size)

    def _gone(self, key: int) -> None:
        self._resize(self._storages.pop(key), 0)

    def _resize(self, storage: _Storage, size: int) -> None:
        self._total += size - storage.size
        self._by_kind[storage.kind] += size - storage.size
        self._in_blocks += _in_blocks(size) - _in_blocks(storage.size)
        storage.size = size


def _in_blocks(size: int) -> int:
    return -(-size // CUDA_BLOCK) * CUDA_BLOCK
