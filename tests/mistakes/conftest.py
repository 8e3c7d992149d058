"""What the proofs of this folder share; their form is that of proof.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repro.method import Project, find_project

ROOT = Path(__file__).parents[2]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes a test of every case of every proof of the file."""
    if "case" in metafunc.fixturenames:
        cases = [(proof, *one) for proof in metafunc.module.PROOFS for one in proof.cases()]
        names = [f"{proof}-{name}" for proof, name, _, _ in cases]
        metafunc.parametrize("case", cases, ids=names, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Callable[[], None]:
    """One case of a proof, to be called."""
    proof, _, patch, reason = request.param
    return lambda: proof.run(patch, reason, request)


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


@pytest.fixture
def in_each_process() -> list[Callable[[], object]]:
    """What each process of a check does first: a patch of this process reaches no other."""
    return []
