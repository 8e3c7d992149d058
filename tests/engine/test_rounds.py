"""The data of a round on the disk."""

import errno
import json
import os
import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from forked import run
from tiny_project import POINTS, write_project
from toy_method import Constant, Line

from nsgf.config import PointConfig
from nsgf.phases import VelocityField, make_phases
from repro import rounds
from repro.__main__ import main
from repro.checkpoint import Damaged
from repro.config import load
from repro.errors import BadInput, RunFailed
from repro.rounds import Rows
from repro.runtime import Runtime

MIB = 2**20
SHAPES = {"x": (3,), "t": (), "label": ()}
DTYPES = {"x": torch.float32, "t": torch.float16, "label": torch.int64}
Usage = namedtuple("Usage", "total used free")


def rows(count: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(count, 3, generator=draws),
        "t": torch.rand(count, generator=draws).half(),
        "label": torch.randint(9, (count,), generator=draws),
    }


def test_rows_are_filled_in_place_and_drawn_with_replacement():
    made = Rows(40, SHAPES, DTYPES)
    for first in range(0, 40, 7):
        made.add(**{name: column[first : first + 7] for name, column in rows(40).items()})
    drawn = made.sample(200, torch.Generator().manual_seed(1))
    chosen = torch.randint(40, (200,), generator=torch.Generator().manual_seed(1))
    assert drawn["t"].dtype == torch.float32 and drawn["label"].dtype == torch.int64
    for name, column in rows(40).items():
        assert torch.equal(drawn[name], column[chosen].to(drawn[name].dtype))
    assert made.nbytes == 40 * (12 + 2 + 8)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"x": torch.zeros(5, 3)}, r"rows: found \['x'\], expected \['label', 't', 'x'\]"),
        ({"x": torch.zeros(5, 3), "t": torch.zeros(4), "label": torch.zeros(5)}, r"found \[4, 5\], expected the same"),
        ({"x": torch.zeros(5, 2), "t": torch.zeros(5), "label": torch.zeros(5)}, r"column x: found \(5, 2\), expected"),
        ({"x": torch.zeros(6, 3), "t": torch.zeros(6), "label": torch.zeros(6)}, "rows: found 11, expected at most 10"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(given, found):
    made = Rows(10, SHAPES, DTYPES)
    made.add(**rows(5))
    with pytest.raises(ValueError, match=found):
        made.add(**given)
    assert torch.equal(made["x"][:5], rows(5)["x"]) and not made.full


def test_rows_are_not_drawn_from_before_all_are_there():
    made = Rows(10, SHAPES, DTYPES)
    made.add(**rows(9))
    with pytest.raises(ValueError, match="rows: found 9, expected all 10"):
        made.sample(2, torch.Generator())


def filled(folder: Path, count: int) -> str:
    """In any order, as several processes write."""
    made = rounds.allocate(folder, count, SHAPES, DTYPES)
    for first in reversed(range(0, count, 7)):
        made.put(first, **{name: column[first : first + 7] for name, column in rows(count).items()})
    return rounds.seal(folder)


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("keep", [filled, lambda folder, count: rounds.write(folder, rows(count))])
def test_what_was_kept_is_read(keep, count, tmp_path):
    found = rounds.read(tmp_path / keep(tmp_path, count))
    for name, column in rows(count).items():
        assert found[name].dtype == column.dtype and torch.equal(found[name], column)


def test_the_same_rows_have_the_same_name_however_they_came(tmp_path):
    assert filled(tmp_path, 40) == rounds.write(tmp_path, rows(40)) != rounds.write(tmp_path, rows(41))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.complex64])
def test_every_kind_of_number_is_kept(dtype, tmp_path):
    column = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    assert torch.equal(rounds.read(tmp_path / rounds.write(tmp_path, {"a/b": column}))["a/b"], column)


def damage_json(path):
    (path / "columns.json").write_text("{")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "0", 5),
        lambda path: (path / "1").unlink(),
        lambda path: (path / "3").write_bytes(b""),
        damage_json,
        lambda path: path.rename(path.with_name("gone")),
    ],
)
def test_other_contents_than_the_name_says_are_damaged(damage, tmp_path):
    path = tmp_path / filled(tmp_path, 40)
    damage(path)
    with pytest.raises(Damaged, match=re.escape(str(path))):
        rounds.read(path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS reserves no place")
def test_a_round_has_its_place_on_the_disk_before_it_is_filled(tmp_path):
    """A mapped file that finds the disk full while it is filled kills its process without a word."""
    rounds.allocate(tmp_path, MIB, {"x": (4,)})
    assert (tmp_path / rounds.PARTIAL / "0").stat().st_blocks * 512 >= 16 * MIB


def test_a_disk_that_is_full_is_said_to_be(tmp_path, monkeypatch):
    def refuse(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    found = r"round\.partial: cannot be written \(No space left on device\): found .* expected room for 220 bytes"
    with pytest.raises(RunFailed, match=found):
        rounds.allocate(tmp_path, 10, SHAPES, DTYPES)


def test_a_file_that_cannot_be_mapped_is_said_to_be(tmp_path, monkeypatch):
    def refuse(*given, **named):
        raise RuntimeError("unable to mmap 40 bytes: Operation not supported")

    monkeypatch.setattr(torch, "from_file", refuse)
    with pytest.raises(RunFailed, match=r"cannot be written \(unable to mmap"):
        rounds.allocate(tmp_path, 10, SHAPES, DTYPES)


def test_a_round_larger_than_all_memory_can_be_drawn_from(tmp_path, monkeypatch):
    """A file of a hundred times the machine's memory, nearly all of it a hole."""
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, offset, size: None, raising=False)
    count = 100 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16
    made = rounds.allocate(tmp_path, count, {"x": (4,)})
    assert (tmp_path / rounds.PARTIAL / "0").stat().st_blocks * 512 < MIB
    assert made["x"][torch.tensor([3, count - 1])].tolist() == [[0.0] * 4] * 2


def anonymous_bytes():
    """Memory of this process that belongs to no file, and so cannot be given back by forgetting it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


def measure(folder, notes):
    """How much memory grows while a round of 64 MiB is filled, read, drawn from, and taken into memory."""
    count, draws = 64 * MIB // (1024 * 4), torch.Generator().manual_seed(0)
    part = torch.randn(256, 1024, generator=draws)
    before = anonymous_bytes()
    made = rounds.allocate(Path(folder), count, {"x": (1024,)})
    for _ in range(0, count, 256):
        made.add(x=part)
    grown = {"filled": anonymous_bytes() - before}
    found = rounds.read(Path(folder) / rounds.seal(Path(folder)))["x"]
    for _ in range(4 * count // 256):
        found[torch.randint(count, (256,), generator=draws)]
    grown["drawn"] = anonymous_bytes() - before
    copy = found.clone()
    grown["taken"] = anonymous_bytes() - before + 0 * len(copy)
    Path(notes).write_text(json.dumps(grown))
    return 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
def test_a_round_takes_no_memory(tmp_path):
    """In a process of its own, which has no memory that was freed and may be taken again."""
    assert run(measure, str(tmp_path / "round"), str(tmp_path / "notes"), output=tmp_path / "log") == 0
    grown = json.loads((tmp_path / "notes").read_text())
    assert grown["filled"] < 16 * MIB and grown["drawn"] < 16 * MIB
    assert grown["taken"] >= 64 * MIB  # so the account would have shown it


def test_only_what_is_named_is_kept_and_nothing_else_is_touched(tmp_path):
    one, other = filled(tmp_path, 3), filled(tmp_path, 4)
    rounds.allocate(tmp_path, 5, SHAPES, DTYPES)
    (tmp_path / "running.safetensors").write_bytes(b"")
    rounds.keep(tmp_path, [one, None])
    assert sorted(path.name for path in tmp_path.iterdir()) == [one, "running.safetensors"] and other != one


def test_the_disk_that_is_asked_is_the_one_where_the_folder_will_lie(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(rounds.shutil, "disk_usage", lambda folder: asked.append(folder) or Usage(0, 0, 1000))
    monkeypatch.chdir(tmp_path)
    assert rounds.room(Path("runs/toy/seed-0")) == 900
    (tmp_path / "runs").mkdir()
    rounds.room(Path("runs/toy/seed-0"))
    assert asked == [tmp_path, tmp_path / "runs"]


def test_what_rounds_take_already_counts_as_free(monkeypatch, tmp_path):
    rounds.write(tmp_path, {"x": torch.zeros(MIB)})
    monkeypatch.setattr(rounds.shutil, "disk_usage", lambda folder: Usage(0, 0, 0))
    assert rounds.room(tmp_path) >= 0.9 * 4 * MIB


def velocity_field(root, overrides=()):
    """The first phase of a tiny experiment."""
    if not root.exists():
        write_project(root, "2d-moons", POINTS)
    config, _ = load(PointConfig, root / "configs" / "2d-moons.yaml", list(overrides))
    return make_phases(config, Runtime(torch.device("cpu")))[0]


def test_a_pool_without_room_is_refused_before_an_earlier_phase_begins_and_nothing_is_written(
    tmp_path, monkeypatch, capsys
):
    """The large pool is that of the fourth phase."""
    monkeypatch.chdir(write_project(tmp_path / "project", "2d-moons", POINTS))
    monkeypatch.setattr(rounds.shutil, "disk_usage", lambda folder: Usage(0, 0, MIB))
    large = "phases.velocity_field_100.pool.batches=100000"
    assert main(["run", "2d-moons", "--device", "cpu", "--set", large]) == 2
    assert "repro: phases.velocity_field_100.pool: found a pool" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "project" / "runs").exists()


def test_a_phase_that_says_nothing_itself_is_asked_by_the_engine(project, monkeypatch, capsys):
    monkeypatch.setattr(Line, "storage", lambda self: {"bank": 10 * MIB})
    monkeypatch.setattr(rounds.shutil, "disk_usage", lambda folder: Usage(0, 0, 10 * MIB))
    assert main(["run", "toy"]) == 2
    assert "1-line: found 0.0 GiB of data of its rounds, expected at most 90%" in capsys.readouterr().err
    assert not (project / "runs").exists()


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


def test_the_line_of_a_refused_pool_names_what_fits(tmp_path, monkeypatch):
    phase = velocity_field(tmp_path / "project")
    monkeypatch.setattr(rounds.shutil, "disk_usage", lambda folder: Usage(0, 0, int(0.9 * phase.storage()["pool"])))
    with pytest.raises(BadInput) as refused:
        phase.check(tmp_path)
    (way,) = re.findall(r"--set (\S+)", str(refused.value))
    velocity_field(tmp_path / "project", [way]).check(tmp_path)
    assert isinstance(phase, VelocityField)
