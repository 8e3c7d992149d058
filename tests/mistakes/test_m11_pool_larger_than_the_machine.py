"""m11: a pool that exceeds host memory and disk.

Before anything is written, the pool of the paper is held against the memory that is available and the disk that is free. It is begun where it
fits; where it fits nowhere, one line says what would.
"""

import math
import os
import re
from collections import namedtuple
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from proof import Proof

from nsgf import phases
from nsgf.phases import VelocityField
from repro import pool as pools
from repro import run, runtime
from repro.config import load
from repro.errors import BadInput
from repro.pool import Placement
from repro.runtime import Runtime

GIB = 2**30
STATES, FLOAT32 = 5, 4
POOLS = {
    # Minibatches, points in each and numbers in a point (paper, E.2); a row holds position, velocity and time.
    "mnist": 1500 * 256 * STATES * (2 * 784 + 1) * FLOAT32,
    "cifar10": 2500 * 128 * STATES * (2 * 3072 + 1) * FLOAT32,
}
MACHINES = [(64, 8), (12, 20)]  # GiB of memory and of disk: room for both pools in memory, for one of them on the disk
WHOLE = 512  # GiB of memory that a machine has for all its programs
SMALL = {  # networks; the pools stay those of the paper
    "mnist": [],
    "cifar10": ["phases.velocity_field.network.channels=32", "phases.velocity_field.network.head_channels=32"],
}
Usage = namedtuple("Usage", "total used free")


class Begun(BaseException):
    """A pool was begun: in memory or on disk, of so many bytes."""


def machine(patch, folder, memory, disk, limited):
    """Memory is scarce because a container is limited to it, or because other programs hold the rest."""
    files = {
        "proc/meminfo": f"MemTotal: {WHOLE * 2**20} kB\nMemAvailable: {(WHOLE if limited else memory) * 2**20} kB\n"
    }
    if limited:
        files |= {"group/memory.max": f"{(memory + 1) * GIB}\n", "group/memory.current": f"{GIB}\n"}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    patch.setattr(runtime, "PROC", folder / "proc")
    patch.setitem(runtime.CGROUPS, "", (folder / "group", *runtime.CGROUPS[""][1:]))
    patch.setitem(runtime.CGROUPS, "memory", (folder / "none", *runtime.CGROUPS["memory"][1:]))
    patch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": WHOLE * GIB}.get)
    patch.setattr(pools.shutil, "disk_usage", lambda folder: Usage(0, 0, disk * GIB))


@pytest.fixture(scope="module")
def planned(project):
    """What `repro run` was asked to do. The spec is read once for all: that takes longer than all the rest."""
    mnist = run.plan(project, "mnist", [])

    def plan(experiment, *overrides):
        path = project.experiments()[experiment]
        config, _ = load(project.config_class(experiment), path, [*SMALL[experiment], *overrides])
        return replace(mnist, experiment=experiment, config=config)

    return cache(plan)


def outcome(planned, runs, experiment, *overrides):
    """(memory or disk, bytes) of the pool that a run begins with, or ("refused", the line). No byte of a pool is written."""

    def in_memory(self, capacity, columns, dtype=torch.float32):
        raise Begun("memory", capacity * pools.width(columns) * dtype.itemsize)

    def on_disk(path, capacity, columns, dtype):
        raise Begun("disk", capacity * pools.width(columns) * dtype.itemsize)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools.Pool, "__init__", in_memory)
        patch.setattr(phases, "make_file", on_disk)
        patch.setattr(run, "describe", lambda *_: {})  # asks git and every package
        try:
            on_the_cpu = Runtime(torch.device("cpu"), stand_in_data=True)
            run.execute(planned(experiment, *overrides), 0, runs, on_the_cpu, resume=False, resume_phase=None)
        except Begun as begun:
            return begun.args
        except BadInput as refused:
            return "refused", str(refused)


def check(planned, tmp_path, limited):
    for number, (memory, disk) in enumerate(MACHINES):
        for experiment, needed in POOLS.items():
            with pytest.MonkeyPatch.context() as patch:
                machine(patch, tmp_path / str(number), memory, disk, limited)
                runs = tmp_path / str(number) / experiment
                where, found = outcome(planned, runs, experiment)
                if where != "refused":
                    room = {"memory": memory, "disk": disk}[where]
                    told = f"{experiment}: a pool of {found / GIB:.1f} GiB is begun in {where}, with room for {room}"
                    assert found == needed and found <= room * GIB, told
                    continue
                told = f"{experiment}, with {memory} GiB of memory and {disk} of disk: refused"
                assert needed > max(memory, disk) / 2 * GIB, f"{told}, though it takes {needed / GIB:.1f}: {found}"
                assert not runs.exists(), f"{told} only after the run had begun: {found}"
                key = "phases.velocity_field.pool"
                assert found.startswith(f"{key}: found a pool of {needed / GIB:.1f} GiB, expected at most "), found
                ways = re.findall(r"--set (\S+)", found)
                assert ways and "\n" not in found, f"{told} without a way that fits: {found}"
                for way in ways:
                    where, found = outcome(planned, tmp_path / str(number) / way, experiment, way)
                    assert where != "refused", f"{told} with the advice {way}, which is refused as well: {found}"
                    assert found <= {"memory": memory, "disk": disk}[where] * GIB, (
                        f"{told} with {way}, which does not fit"
                    )


def memory_is_not_asked_for(monkeypatch):
    """The pool is allocated, and that is that."""
    monkeypatch.setattr(VelocityField, "_place", lambda self, nbytes, *rest, **more: Placement("memory", True, ""))


def the_whole_machine(monkeypatch):
    """What the machine has is taken for what is left of it."""
    monkeypatch.setattr(pools, "available_host_bytes", lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def the_container_forgotten(monkeypatch):
    """The system is asked what is available, and says it of the whole machine."""
    monkeypatch.setattr(runtime, "_read", lambda path: path.read_text() if path.name == "meminfo" else None)


def any_disk_will_do(monkeypatch):
    """What does not fit into memory goes into a file."""
    monkeypatch.setattr(pools, "DISK_SHARE", math.inf)


def asked_when_the_phase_begins(monkeypatch):
    monkeypatch.setattr(VelocityField, "check", lambda self, folder: [])


def a_larger_margin(monkeypatch):
    for module in (pools, phases):
        monkeypatch.setattr(module, "MEMORY_SHARE", 0.6)


def a_gib_for_the_process(monkeypatch):
    real = pools.available_host_bytes
    monkeypatch.setattr(pools, "available_host_bytes", lambda: real() - GIB)


PLANTS = {
    memory_is_not_asked_for: "cifar10: a pool of 36.6 GiB is begun in memory, with room for 12",
    the_whole_machine: "cifar10: a pool of 36.6 GiB is begun in memory, with room for 12",
    any_disk_will_do: "cifar10: a pool of 36.6 GiB is begun in disk, with room for 20",
    asked_when_the_phase_begins: "with 12 GiB of memory and 20 of disk: refused only after the run had begun",
}
INNOCENT = [a_larger_margin, a_gib_for_the_process]
PROOFS = [
    Proof(partial(check, limited=False), PLANTS, INNOCENT),
    Proof(
        partial(check, limited=True),
        {the_container_forgotten: "cifar10: a pool of 36.6 GiB is begun in memory, with room for 12"},
        INNOCENT,
    ),
]


def test_proof(case):
    case()


def test_the_symptom_is_what_pytorch_says():
    """Of a request beyond all memory. A smaller one is granted, and the process ends when it writes."""
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory: you tried to allocate"):
        torch.empty(2**60)
