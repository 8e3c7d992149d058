"""What the proofs of this folder share. Each file proves one entry of LEARNING.md and has the same parts:

check     what must hold of the real code; an AssertionError that says what was found if it does not
plant     the smallest patch of the real code that puts the mistake back, with the reason for which the check must fail
innocent  patches that change the code and are correct; the check must stay silent

A plant or an innocent variant is a function of pytest's monkeypatch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repro.method import Project, find_project

ROOT = Path(__file__).parents[2]

Patch = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[], None]


class Proof:
    """Runs a check with a patch applied, and takes the patch back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._monkeypatch = monkeypatch

    def silent(self, check: Check, innocent: Patch) -> None:
        """`check` passes with `innocent` applied."""
        with self._monkeypatch.context() as patch:
            innocent(patch)
            check()

    def caught(self, check: Check, plant: Patch, reason: str) -> None:
        """`check` fails with `plant` applied, by an AssertionError that says `reason` literally; no other exception counts."""
        with self._monkeypatch.context() as patch:
            plant(patch)
            with pytest.raises(AssertionError, match=re.escape(reason)):
                check()


@pytest.fixture
def proof(monkeypatch) -> Proof:
    return Proof(monkeypatch)


@pytest.fixture(scope="session")
def project() -> Project:
    """The reference implementation, found as the command finds it."""
    return find_project(ROOT)


class Storages(TorchDispatchMode):
    """Counts the storages that operations make while it is entered: `made` and `largest` in bytes, `peak` of those alive at once.

    A storage is alive until its last reference is gone, a graph's included. What an operation allocates and frees inside itself is not
    seen, nor are storages that were there before.
    """

    def __init__(self):
        super().__init__()
        self.made = self.largest = self.peak = 0
        self.names: set[str] = set()
        self._known: dict[StorageWeakRef, int] = {}

    @property
    def live(self) -> int:
        self._known = {reference: size for reference, size in self._known.items() if not reference.expired()}
        return sum(self._known.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in self._storages((args, kwargs)):
            self._known.setdefault(storage[0], 0)
        result = function(*args, **(kwargs or {}))
        self.names.add(function.name().split(".")[0])
        for reference, size in self._storages(result):
            if reference not in self._known:
                self._known[reference] = size
                self.made += size
                self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)
        return result

    @staticmethod
    def _storages(tree) -> list[tuple[StorageWeakRef, int]]:
        storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]


@pytest.fixture
def storages() -> type[Storages]:
    return Storages
