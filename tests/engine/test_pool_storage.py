"""Where a pool is kept, what is said of it, and that it is the same pool wherever it is."""

import errno
import json
import os
import re
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from forked import run
from tiny_project import DIGITS, POINTS, write_project
from toy_method import Constant, Line

from nsgf.config import ImageConfig, PointConfig
from nsgf.phases import VelocityField, make_phases
from repro import pool as pools
from repro import runtime as machines
from repro.__main__ import main
from repro.config import load
from repro.errors import BadInput, RunFailed
from repro.pool import Pool, make_file, place, publish
from repro.runtime import Runtime, World

CPU = torch.device("cpu")
GIB, MIB = 2**30, 2**20
COLUMNS = {"x": (3,), "t": ()}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def machine(monkeypatch):
    """Sets how much memory is available and how much of the disk is free, in bytes."""

    def has(memory, disk):
        monkeypatch.setattr(pools, "available_host_bytes", lambda: int(memory))
        monkeypatch.setattr(pools.shutil, "disk_usage", lambda folder: Usage(0, 0, int(disk)))

    return has


@pytest.mark.parametrize(
    ("nbytes", "memory", "disk", "changes", "expected"),
    [
        (70, 100, 1000, {}, ("memory", True)),
        (71, 100, 1000, {}, ("disk", True)),
        (70, 100, 70, {}, ("memory", False)),
        (90, 100, 100, {}, ("disk", True)),
        (91, 100, 100, {}, None),
        (100, 100, 1000, {"asked": "memory"}, ("memory", True)),
        (100, 100, 100, {"asked": "memory"}, ("memory", False)),
        (101, 100, 1000, {"asked": "memory"}, None),
        (10, 100, 1000, {"asked": "disk"}, ("disk", True)),
        (10, 100, 11, {"asked": "disk"}, None),
        (10, 100, 1000, {"processes": 2}, ("disk", True)),
        (10, 100, 11, {"processes": 2}, None),
        (10, 100, 1000, {"processes": 2, "asked": "memory"}, None),
        (90, 100, 40, {"own": 60}, ("disk", True)),
        (90, 100, 40, {"own": 59}, None),
    ],
)
def test_a_pool_is_kept_where_there_is_room(machine, tmp_path, nbytes, memory, disk, changes, expected):
    machine(memory, disk)
    found = place(nbytes, tmp_path, **{"asked": "auto", "processes": 1, "own": 0, **changes})
    assert (found and (found.storage, found.kept)) == expected


def test_the_reason_is_what_is_needed_and_what_there_is(machine, tmp_path):
    machine(100 * GIB, 40 * GIB)
    found = place(90 * GIB, tmp_path, asked="auto", processes=1, own=60 * GIB)
    assert found.reason == "90.0 GiB needed, 100.0 GiB of memory available, 100.0 GiB of disk free"


def test_the_disk_is_the_one_where_the_folder_will_lie(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pools.shutil, "disk_usage", lambda folder: asked.append(folder) or Usage(0, 0, 0))
    monkeypatch.chdir(tmp_path)
    place(1, Path("runs/toy/seed-0"), asked="auto", processes=1)
    (tmp_path / "runs").mkdir()
    place(1, Path("runs/toy/seed-0"), asked="auto", processes=1)
    assert asked == [tmp_path, tmp_path / "runs"]


V2 = {"memory.max": "1000\n", "memory.current": "600\n", "memory.stat": "anon 300\ninactive_file 200\nfile 9\n"}
V1 = {
    "memory.limit_in_bytes": "1000\n",
    "memory.usage_in_bytes": "600\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
}
UNLIMITED_V1 = V1 | {"memory.limit_in_bytes": "9223372036854771712\n"}


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Writes the files in which Linux says how much memory there is: /proc and the control groups in both versions."""
    roots = {"": tmp_path / "v2", "memory": tmp_path / "v1"}
    monkeypatch.setattr(machines, "PROC", tmp_path / "proc")
    monkeypatch.setattr(
        machines, "CGROUPS", {name: (roots[name], *rest) for name, (_, *rest) in machines.CGROUPS.items()}
    )

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def group(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


MEMINFO = {"proc/meminfo": "MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:     5 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 5 * 1024),
        (MEMINFO | group("v2", V2), 1000 - 600 + 200),
        (MEMINFO | group("v2", V2 | {"memory.max": "max\n"}), 5 * 1024),
        (MEMINFO | group("v2", V2 | {"memory.max": "9000\n"}), 5 * 1024),
        (MEMINFO | group("v2", V2 | {"memory.current": "1500\n"}), 0),
        (MEMINFO | group("v2", {name: V2[name] for name in ("memory.max", "memory.current")}), 1000 - 600),
        (MEMINFO | group("v1", V1), 1000 - 600 + 200),
        (MEMINFO | group("v1", UNLIMITED_V1), 5 * 1024),
        (MEMINFO | {"proc/self/cgroup": "0::/job/step\n"} | group("v2/job/step", V2), 600),
        (MEMINFO | {"proc/self/cgroup": "0::/job/step\n"} | group("v2/job", V2), 600),
        (MEMINFO | {"proc/self/cgroup": "3:cpu,memory:/a\n"} | group("v1/a", V1) | group("v1", UNLIMITED_V1), 600),
        (MEMINFO | {"proc/self/cgroup": "0::/docker/1f\n"} | group("v2", V2), 600),
        (MEMINFO | {"proc/self/cgroup": "0::/other\n"} | group("v2/job", V2), 5 * 1024),
    ],
    ids=["no limit", "v2", "v2 without", "v2 above the memory", "v2 exceeded", "v2 without statistics", "v1",
         "v1 without", "own group", "group above", "v1 own group", "container without a name space", "group of others"],
)  # fmt: skip
def test_available_memory_is_the_least_of_what_is_free_and_every_limit(system, files, expected):
    system(files)
    assert machines.available_host_bytes() == expected


def test_without_linux_available_memory_is_all_there_is(system):
    assert machines.available_host_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def velocity_field(root, experiment="digits", overrides=(), **machine):
    """The first phase of the tiny experiment; and its configuration file."""
    kind, changes = (PointConfig, POINTS) if experiment.startswith("2d-") else (ImageConfig, DIGITS)
    if not root.exists():
        write_project(root, experiment, changes)
    config, _ = load(kind, root / "configs" / f"{experiment}.yaml", list(overrides))
    return make_phases(config, Runtime(CPU, **machine))[0]


def size(phase):
    return Pool(phase.capacity, phase.columns, phase.pool_precision).nbytes


@pytest.mark.parametrize(
    ("memory", "disk", "changes", "expected"),
    [
        (10, 10, {}, "the pool is kept in memory: "),
        (10, 1, {}, "the pool is kept in memory: .*; it is not kept on disk, a killed run builds it again$"),
        (1, 10, {}, "the pool is kept on disk: "),
        (10, 10, {"pool_storage": "disk"}, "the pool is kept on disk: "),
        (10, 10, {"world": World(0, 2)}, "the pool is kept on disk: "),
    ],
)
def test_it_is_said_where_a_pool_is_kept_and_why(machine, tmp_path, memory, disk, changes, expected):
    phase = velocity_field(tmp_path / "project", **changes)
    machine(memory * size(phase), disk * size(phase))
    (said,) = phase.check(tmp_path)
    assert re.match(expected, said) and "GiB needed" in said and ("killed" in said) == ("killed" in expected)


FLAG = re.compile(r"--set (\S+)")


@pytest.mark.parametrize(
    ("experiment", "memory", "disk", "overrides", "changes", "keys"),
    [
        ("digits", 0.75, 0.5, [], {}, ["resident_batches"]),
        ("digits", 1.0, 0.9, [], {}, ["precision", "resident_batches"]),
        ("digits", 0.6, 0.1, [], {}, ["resident_batches"]),
        ("digits", 0.1, 0.7, [], {}, ["precision"]),
        ("digits", 0.9, 9.0, [], {"pool_storage": "memory"}, ["precision", "resident_batches"]),
        ("digits", 9.0, 0.7, [], {"pool_storage": "disk"}, ["precision", "resident_batches"]),
        ("digits", 9.0, 0.1, [], {"world": World(0, 2)}, ["resident_batches"]),
        ("digits", 1.1, 0.7, [], {"world": World(0, 2)}, ["precision", "resident_batches"]),
        ("digits", 1.0, 9.0, ["resident_batches=3"], {}, ["precision", "resident_batches"]),
        ("digits", 1.8, 9.0, ["resident_batches=3"], {"world": World(0, 2)}, ["precision", "resident_batches"]),
        ("digits", 0.9, 0.1, ["precision=float16"], {}, ["resident_batches"]),
        ("digits", 0.01, 0.01, [], {}, []),
        ("2d-moons", 1.0, 0.1, [], {}, ["batches"]),
        ("2d-moons", 0.1, 0.9, [], {}, ["batches"]),
        ("2d-moons", 9.0, 0.9, [], {"pool_storage": "disk"}, ["batches"]),
        ("2d-moons", 0.01, 0.01, [], {}, []),
    ],
)
def test_a_pool_that_fits_nowhere_is_refused_with_overrides_that_fit(
    machine, tmp_path, experiment, memory, disk, overrides, changes, keys
):
    """Memory and disk are multiples of the pool of three minibatches."""
    key = "phases.velocity_field.pool"
    overrides = [f"{key}.{override}" for override in overrides]
    phase = velocity_field(tmp_path / "project", experiment, overrides, **changes)
    machine(memory * size(phase), disk * size(phase))
    with pytest.raises(BadInput) as refused:
        phase.check(tmp_path)
    (line,) = refused.value.problems
    flags = FLAG.findall(line)
    assert line.startswith(f"{key}: found a pool of 0.0 GiB, expected at most ")
    assert [flag.removeprefix(f"{key}.").partition("=")[0] for flag in flags] == keys
    for flag in flags:
        velocity_field(tmp_path / "project", experiment, [*overrides, flag], **changes).check(tmp_path)


@pytest.mark.parametrize(
    ("renewed", "changes", "expected"),
    [
        ([], {}, "70% of 2.0 GiB of available memory or 90% of 1.0 GiB of free disk"),
        ([], {"pool_storage": "memory"}, "100% of 2.0 GiB of available memory"),
        ([], {"pool_storage": "disk"}, "90% of 1.0 GiB of free disk"),
        ([], {"world": World(0, 2)}, "90% of 1.0 GiB of free disk"),
        (["resident_batches=20"], {}, "70% of 2.0 GiB of available memory"),
        (
            ["resident_batches=20"],
            {"world": World(0, 2)},
            "70% of 2.0 GiB of available memory for all of the 2 processes",
        ),
    ],
)
def test_the_size_of_a_refused_pool_and_what_it_is_held_against_are_given(
    machine, tmp_path, renewed, changes, expected
):
    """20 minibatches of two states of 250,000 entries of 2 * 64 + 1 numbers of 4 bytes are 4.8 GiB."""
    large = [f"phases.velocity_field.pool.{change}" for change in ("batch_size=250000", "batches=20", *renewed)]
    machine(2 * GIB, GIB)
    with pytest.raises(BadInput) as refused:
        velocity_field(tmp_path / "project", overrides=large, **changes).check(tmp_path)
    assert f"found a pool of 4.8 GiB, expected at most {expected}; --set" in str(refused.value)


def test_a_pool_without_room_is_refused_before_an_earlier_phase_begins_and_nothing_is_written(
    machine, tmp_path, monkeypatch, capsys
):
    """The large pool is that of the fourth phase."""
    monkeypatch.chdir(write_project(tmp_path / "project", "2d-moons", POINTS))
    machine(MIB, MIB)
    large = "phases.velocity_field_100.pool.batches=100000"
    assert main(["run", "2d-moons", "--device", "cpu", "--set", large]) == 2
    assert "repro: phases.velocity_field_100.pool: found a pool" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "project" / "runs").exists()


def test_a_finished_phase_that_is_started_over_is_asked_too_before_anything_is_set_aside(project, monkeypatch):
    def lacking(self, folder):
        raise BadInput("phases.constant: found no room, expected some")

    assert main(["run", "toy"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "check", lacking)
        assert main(["run", "toy", "--resume-phase", "2"]) == 2
    assert not (project / "runs/toy/seed-0/superseded-1").exists()
    monkeypatch.setattr(Line, "check", lacking)
    assert main(["run", "toy", "--resume-phase", "2"]) == 0


def rows(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(count, 3, generator=draws), "t": torch.rand(count, generator=draws)}


def in_memory(path, dtype, count):
    pool = Pool(count, COLUMNS, dtype)
    pool.add(**rows(count))
    return pool


def saved(path, dtype, count):
    in_memory(path, dtype, count).save(path)
    return Pool.load(path)


def built_in_a_file(path, dtype, count):
    make_file(path, count, COLUMNS, dtype)
    pool = Pool.in_file(path, count, COLUMNS, dtype)
    parts = {name: column.split(7) for name, column in rows(count).items()}
    for number in reversed(range(len(parts["t"]))):  # any order, as several processes write
        pool.replace(7 * number, **{name: columns[number] for name, columns in parts.items()})
    del pool
    publish(path, path)
    return Pool.load(path)


def taken_into_memory(path, dtype, count):
    pool = built_in_a_file(path, dtype, count).into_memory()
    path.unlink()
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kept", [saved, built_in_a_file, taken_into_memory])
def test_a_pool_draws_the_same_wherever_it_is_kept(tmp_path, kept, dtype):
    pool, expected = kept(tmp_path / "pool", dtype, 40), in_memory(None, dtype, 40)
    assert len(pool) == 40 and pool.nbytes == expected.nbytes == 40 * 4 * dtype.itemsize
    for draw in range(3):
        one, other = (each.sample(16, torch.Generator().manual_seed(draw)) for each in (pool, expected))
        assert all(torch.equal(one[name], other[name]) and one[name].dtype is torch.float32 for name in COLUMNS)


def test_half_precision_rounds_what_is_stored_and_halves_the_bytes():
    pool = in_memory(None, torch.float16, 8)
    assert torch.equal(pool.columns["x"].float(), rows(8)["x"].half().float())
    assert pool.nbytes == in_memory(None, torch.float32, 8).nbytes // 2


@pytest.mark.parametrize("cut", [1, 40 * 4 * 4 - 1, 40 * 4 * 4, 40 * 4 * 4 + 20])
def test_a_file_cut_short_is_no_pool(tmp_path, cut):
    """By a byte, of all rows but a byte, of all rows, of the end of the header."""
    path = tmp_path / "pool"
    in_memory(None, torch.float32, 40).save(path)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(ValueError, match="no pool"):
        Pool.load(path)
    size = path.stat().st_size
    with pytest.raises(ValueError, match=f"found {size} bytes, expected {size + cut}"):
        Pool.in_file(path, 40, COLUMNS)
    assert path.stat().st_size == size


def test_a_pool_larger_than_all_memory_can_be_drawn_from(tmp_path, monkeypatch):
    """A file of a hundred times the machine's memory, nearly all of it a hole."""
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, offset, size: None, raising=False)
    capacity = 100 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16
    make_file(tmp_path / "pool", capacity, COLUMNS)
    assert (tmp_path / "pool").stat().st_blocks * 512 < MIB
    pool = Pool.load(tmp_path / "pool")
    assert len(pool) == capacity
    assert pool.sample(5, torch.Generator())["t"].tolist() == 5 * [0.0]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS reserves no place")
def test_a_file_has_its_place_on_the_disk_before_it_is_filled(tmp_path):
    """A mapped file that finds the disk full while it is filled kills its process without a word."""
    make_file(tmp_path / "pool", MIB, COLUMNS)
    assert (tmp_path / "pool").stat().st_blocks * 512 >= 16 * MIB


def test_a_disk_that_is_full_after_all_is_said_to_be(tmp_path, monkeypatch):
    def refuse(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(
        RunFailed, match="pool: the disk does not take the 0.0 GiB of the pool: No space left on device"
    ):
        make_file(tmp_path / "pool", 10, COLUMNS)


def anonymous_bytes():
    """Memory of this process that belongs to no file, and so cannot be given back by forgetting it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


def measure(path, notes):
    """How much memory grows while a pool of 64 MiB is built in a file, drawn from, and taken into memory."""
    path, count = Path(path), 64 * MIB // (1024 * 4)
    columns, draws = {"x": (1023,), "t": ()}, torch.Generator().manual_seed(0)
    part = {"x": torch.randn(256, 1023, generator=draws), "t": torch.rand(256, generator=draws)}
    before = anonymous_bytes()
    make_file(path, count, columns)
    pool = Pool.in_file(path, count, columns)
    for first in range(0, count, 256):
        pool.replace(first, **part)
    grown = {"built": anonymous_bytes() - before}
    pool = Pool.load(path)
    for _ in range(4 * count // 256):
        pool.sample(256, draws)
    grown["drawn"] = anonymous_bytes() - before
    pool.into_memory()
    grown["taken"] = anonymous_bytes() - before
    Path(notes).write_text(json.dumps(grown))
    return 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
def test_a_pool_in_a_file_takes_no_memory(tmp_path):
    """In a process of its own, which has no memory that was freed and may be taken again."""
    assert run(measure, str(tmp_path / "pool"), str(tmp_path / "notes"), output=tmp_path / "log") == 0
    grown = json.loads((tmp_path / "notes").read_text())
    assert grown["built"] < 16 * MIB and grown["drawn"] < 16 * MIB
    assert grown["taken"] >= 64 * MIB  # so the account would have shown it


def killed_while_building(root, scratch, batch):
    trajectory = VelocityField.trajectory

    def killed(self, seed, number):
        if number == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return trajectory(self, seed, number)

    VelocityField.trajectory = killed
    velocity_field(Path(root), pool_storage="disk").prepare(5, Path(scratch), {})
    return 0


@pytest.mark.parametrize("storage", ["disk", "memory"])
def test_a_pool_of_which_a_kill_left_a_part_is_built_again(tmp_path, storage):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    phase = velocity_field(tmp_path / "project", pool_storage=storage)
    code = run(killed_while_building, str(tmp_path / "project"), str(scratch), 2, output=tmp_path / "log")
    assert code == -signal.SIGKILL
    assert [path.name for path in scratch.iterdir()] == ["pool.safetensors.partial"]
    phase.prepare(5, scratch, {})
    built = phase.build_pool(5)
    assert all(torch.equal(phase.pool.columns[name], built.columns[name]) for name in built.columns)
    assert [path.name for path in scratch.iterdir()] == ["pool.safetensors"] or storage == "memory"


def test_a_finished_pool_is_read_and_not_built_again(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    phases = {storage: velocity_field(tmp_path / "project", pool_storage=storage) for storage in ("disk", "memory")}
    phases["disk"].prepare(5, scratch, {})
    monkeypatch.setattr(VelocityField, "trajectory", None)
    phases["memory"].prepare(5, scratch, {})
    one, other = (phase.pool.columns for phase in phases.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
