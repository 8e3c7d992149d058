"""m29: a checkpoint written in place.

Whenever a process dies while it saves, the old state or the new one is there, whole. Also when the next process dies at the same place.
"""

import json
import os
from itertools import count

import pytest
import torch
from proof import Proof
from tiny_phase import Killed

from repro import checkpoint

WRITTEN = (0.0, 0.5, 1.0)


def state_of(step):
    return {"step": step, "weights": torch.full((64,), float(step))}


def save_and_die(path, step, number, written):
    """Saves; the process dies at the operation `number` on the disk. Returns its name, None if there were fewer.

    A writer that is killed leaves the part `written` of the file. safetensors 0.8.0 itself writes beside the file and renames, which it does
    not promise; `torch.save` writes in place.
    """
    operations, died = count(), []

    def dying(name, real):
        def operation(*arguments, **named):
            if next(operations) != number:
                return real(*arguments, **named)
            if name == "save_file":
                real(*arguments, **named)
                os.truncate(arguments[1], int(written * os.path.getsize(arguments[1])))
            died.append(name)
            raise Killed

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((checkpoint, "save_file"), (checkpoint, "flush"), (os, "replace")):
            patch.setattr(owner, name, dying(name, getattr(owner, name)))
        try:
            checkpoint.save(path, state_of(step))
        except Killed:
            return died[0]
    return None


def check(tmp_path):
    for written in WRITTEN:
        for number in count():
            path = tmp_path / f"{written} {number}" / "running.safetensors"
            for step in (1, 2):
                checkpoint.save(path, state_of(step))
            kills = [save_and_die(path, 3, number, written) for _ in range(2)]
            where = f"killed in {kills[0]}, {written:.0%} of the file written"
            try:
                found, _ = checkpoint.newest(path) or (None, None)
            except checkpoint.Damaged:
                found = None
            assert found, f"{where}: neither the old state nor the new one is there"
            assert found["step"] in (2, 3) and torch.equal(found["weights"], state_of(found["step"])["weights"])
            if kills[0] is None:
                break
        assert number >= 1  # it died somewhere


def save_in_place(path, state):
    tensors = {}
    tree = json.dumps(checkpoint._pack(state, "state", tensors))
    header = {
        "format": checkpoint.FORMAT,
        "tree": tree,
        "sha256": checkpoint._checksum(tree, tensors, checkpoint.FORMAT),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save_file(tensors, path, metadata=header)


def written_over_the_old_one(monkeypatch):
    """`torch.save(state, "last.pt")`."""
    monkeypatch.setattr(checkpoint, "save", save_in_place)


def old_one_deleted_first(monkeypatch):
    """To keep one state on the disk: Lightning's issue 1150."""
    real = checkpoint.save

    def save(path, state):
        for old in (path, checkpoint.previous(path)):
            old.unlink(missing_ok=True)
        real(path, state)

    monkeypatch.setattr(checkpoint, "save", save)


def one_file_renamed_over(monkeypatch):
    """Whole, although no state before the newest is kept."""
    monkeypatch.setattr(checkpoint, "previous", lambda path: path)


def two_files_in_turn(monkeypatch):
    """Written in place, but over the older of two: the newer one stays."""

    def step_in(path):
        try:
            return checkpoint.load(path)["step"]
        except checkpoint.Damaged:
            return -1

    def files(path):
        return sorted([path, checkpoint.previous(path)], key=step_in)

    monkeypatch.setattr(checkpoint, "save", lambda path, state: save_in_place(files(path)[0], state))
    monkeypatch.setattr(checkpoint, "newest", lambda path: (checkpoint.load(files(path)[1]), None))


PROOFS = [
    Proof(
        check,
        plant={
            written_over_the_old_one: "neither the old state nor the new one is there",
            old_one_deleted_first: "neither the old state nor the new one is there",
        },
        innocent=[one_file_renamed_over, two_files_in_turn],
    )
]


def test_proof(case):
    case()


def test_the_symptom_is_what_torch_says_of_a_file_that_was_cut_short(tmp_path):
    path = tmp_path / "last.pt"
    torch.save(state_of(1), path)
    inode = path.stat().st_ino
    torch.save(state_of(2), path)
    assert path.stat().st_ino == inode  # in place
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(RuntimeError, match="^PytorchStreamReader failed reading zip archive: failed finding central"):
        torch.load(path)
