"""m11: a pool that exceeds the disk.

Before anything is written, the pool of the paper is held against the disk that is free, with all its parts that lie there at a time. It is begun
where it fits; where it does not, one line says what would.
"""

import math
import re
from collections import namedtuple
from dataclasses import replace
from functools import cache

import pytest
import torch
from proof import Proof

from nsgf import phases
from nsgf.phases import VelocityField, make_phases
from repro import loop, rounds, run
from repro.config import Pace, load
from repro.errors import BadInput, RunFailed
from repro.runtime import Runtime

GIB = 2**30
STATES, FLOAT32 = 5, 4
POOLS = {
    # Minibatches, points in each and numbers in a point (paper, E.2); a row holds position, velocity and time.
    "mnist": 1500 * 256 * STATES * (2 * 784 + 1) * FLOAT32,
    "cifar10": 2500 * 128 * STATES * (2 * 3072 + 1) * FLOAT32,
}
DISKS = [8, 20, 64]  # GiB that are free: room for neither pool, for one, for both
WHOLE = 512  # GiB that the disk has for all that lies there
PARTS_KEPT = 3  # of a pool in parts: that of the newest state, of the state before it, and the one that is built
SMALL = {  # networks; the pools stay those of the paper
    "mnist": [],
    "cifar10": ["phases.velocity_field.network.channels=32", "phases.velocity_field.network.head_channels=32"],
}
Usage = namedtuple("Usage", "total used free")


class Begun(BaseException):
    """Room for a pool, or for a part of it, was asked of the disk: so many bytes, and there were as many."""


@pytest.fixture(scope="module")
def planned(project):
    """What `repro run` was asked to do. The spec is read once for all: that takes longer than all the rest."""
    mnist = run.plan(project, "mnist", [])

    def plan(experiment, *overrides):
        path = project.experiments()[experiment]
        config, _ = load(project.config_class(experiment), path, [*SMALL[experiment], *overrides])
        return replace(mnist, experiment=experiment, config=config)

    return cache(plan)


def outcome(planned, runs, disk, experiment, *overrides):
    """(bytes that the run takes first, None), or (None, why it is refused). No byte of a pool is written."""

    def allocate(folder, count, shapes, dtype):
        needed = count * sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        if needed > disk * GIB:
            raise RunFailed("the disk has no room for it")
        raise Begun(needed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.shutil, "disk_usage", lambda folder: Usage(WHOLE * GIB, 0, disk * GIB))
        patch.setattr(rounds, "allocate", allocate)
        patch.setattr(run, "describe", lambda *_: {})  # asks git and every package
        try:
            on_the_cpu = Runtime(torch.device("cpu"), stand_in_data=True)
            run.execute(planned(experiment, *overrides), 0, runs, on_the_cpu, resume=False, resume_phase=None)
        except Begun as begun:
            return begun.args[0], None
        except (BadInput, RunFailed) as refused:
            return None, str(refused)


def check(planned, tmp_path):
    for disk in DISKS:
        for experiment, needed in POOLS.items():
            runs = tmp_path / f"{disk} {experiment}"
            begun, refused = outcome(planned, runs, disk, experiment)
            if refused is None:
                told = f"{experiment}: a pool of {begun / GIB:.1f} GiB is begun, with room for {disk}"
                assert begun == needed and begun <= disk * GIB, told
                continue
            told = f"{experiment}, with {disk} GiB of disk: refused"
            assert needed > disk / 2 * GIB, f"{told}, though it takes {needed / GIB:.1f}: {refused}"
            assert not runs.exists(), f"{told} only after the run had begun: {refused}"
            assert "\n" not in refused and f"found a pool of {needed / GIB:.1f} GiB, expected at most " in refused
            ways = re.findall(r"--set (phases\.velocity_field\.pool\.\S+)", refused)
            assert ways, f"{told} without a way that fits: {refused}"
            for way in ways:
                begun, refused = outcome(planned, runs / way, disk, experiment, way)
                assert refused is None, f"{told} with the advice {way}, which is refused as well: {refused}"
                kept = begun * (PARTS_KEPT if "resident" in way else 1) / GIB
                assert kept <= disk, f"{told} with {way}, which takes {kept:.1f} GiB: it does not fit"


def check_parts(project, tmp_path):
    """What lies on the disk at a time of a pool in six parts, of which each is trained on for two steps."""
    settings = [
        "phases.*.pool={batches: 6, batch_size: 8, precision: float32, resident_batches: 1}",
        "phases.velocity_field.iterations=12",
        "phases.*.batch_size=4",
        "phases.[sv]*.network.channels=8",
        "sinkhorn.scaling=0.5",
    ]
    config, _ = load(project.config_class("digits"), project.experiments()["digits"], settings)
    runtime = Runtime(torch.device("cpu"), stand_in_data=True)
    phase, real, found = make_phases(config, runtime)[0], rounds.allocate, []

    def allocate(folder, *size):
        own = real(folder, *size)
        found.append(own.nbytes * len(list(folder.rglob("round[-.]*"))))
        return own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "allocate", allocate)
        for every in (2, 3, 100):
            given = {"folder": tmp_path / str(every), "pace": Pace(log_every=2, checkpoint_every=every)}
            loop.run_phase(phase, **given, identity={}, seed=0, runtime=runtime, earlier={})
    assert len(found) == 18
    asked = phase.storage()["pool"]
    assert max(found) <= asked, f"parts of {max(found)} bytes lie on the disk at a time, asked for were {asked}"


def any_disk_will_do(monkeypatch):
    """What is larger than the memory goes into files."""
    monkeypatch.setattr(rounds, "DISK_SHARE", 1000)


def the_whole_disk(monkeypatch):
    """What the disk has is taken for what is left of it."""
    monkeypatch.setattr(rounds, "room", lambda folder: rounds.shutil.disk_usage(folder).total)


def asked_when_the_phase_begins(monkeypatch):
    monkeypatch.setattr(run, "_check_machine", lambda *_: [])


def asked_without_a_way_out(monkeypatch):
    monkeypatch.setattr(VelocityField, "_ways_to_fit", lambda *_: iter(()))


def one_part_kept(monkeypatch):
    """The parts that saved states need are not counted."""
    monkeypatch.setattr(phases, "ROUNDS_KEPT", 1)


def every_part_kept(monkeypatch):
    """No part is deleted before the phase ends."""
    real = rounds.keep
    monkeypatch.setattr(rounds, "keep", lambda folder, names: None if any(names) else real(folder, names))


def a_larger_margin(monkeypatch):
    monkeypatch.setattr(rounds, "DISK_SHARE", 0.8)


def a_gib_for_the_networks(monkeypatch):
    real = rounds.room
    monkeypatch.setattr(rounds, "room", lambda folder: real(folder) - GIB)


def another_part_for_safety(monkeypatch):
    monkeypatch.setattr(phases, "ROUNDS_KEPT", 4)


LATE = "mnist, with 8 GiB of disk: refused only after the run had begun: the disk has no room for it"
PROOFS = [
    Proof(
        check,
        {
            any_disk_will_do: LATE,
            the_whole_disk: LATE,
            asked_when_the_phase_begins: LATE,
            asked_without_a_way_out: "mnist, with 8 GiB of disk: refused without a way that fits",
            one_part_kept: "mnist, with 8 GiB of disk: refused with phases.velocity_field.pool.resident_batches=",
        },
        [a_larger_margin, a_gib_for_the_networks, another_part_for_safety],
    ),
    Proof(
        check_parts,
        {
            one_part_kept: " bytes lie on the disk at a time, asked",
            every_part_kept: " bytes lie on the disk at a time, asked",
        },
        [a_larger_margin, another_part_for_safety],
    ),
]


def test_proof(case):
    case()


def test_a_disk_that_fills_up_says_so_before_the_first_row(tmp_path, monkeypatch):
    """What is free changes: the disk is asked for all of a pool at once, by the system's own call."""

    def refused(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rounds.os, "posix_fallocate", refused, raising=False)
    with pytest.raises(RunFailed, match=r"cannot be written \(No space left on device\): found .* room for 400 bytes"):
        rounds.allocate(tmp_path, 100, {"t": ()})


def test_the_symptom_is_what_pytorch_says():
    """Of a request beyond all memory. A smaller one is granted, and the process ends when it writes."""
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory: you tried to allocate"):
        torch.empty(2**60)
