"""m50: a damaged newest checkpoint rotated over the last sound one.

After a resume from the older of two states a sound one is always left: also when the next save is cut off, or damaged as the last one was.
"""

import os
import shutil
from functools import partial

import pytest
from proof import Proof
from tiny_phase import SAVED_EVERY, Killed, TinyPhase, train

from repro import checkpoint, loop
from repro.errors import BadInput
from repro.loop import RUNNING

KILLED_AT = 2 * SAVED_EVERY + 1


def damage(path):
    """Flips one bit in the last tensor."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def killed_before_the_new_state_gets_its_name(folder):
    real = os.replace

    def replace(source, target):
        if target == folder / RUNNING and str(source).endswith(".partial"):
            raise Killed
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        train(TinyPhase(), folder)


def damaged_again(folder):
    train(TinyPhase(KILLED_AT), folder)
    damage(folder / RUNNING)


def check(accident, tmp_path):
    train(TinyPhase(KILLED_AT), tmp_path)  # leaves the states of steps 4 and 2
    damage(tmp_path / RUNNING)
    try:
        accident(tmp_path)
        resumed = train(TinyPhase(), tmp_path)
    except BadInput as error:
        raise AssertionError(f"no sound state is left: {error}") from error
    assert resumed.done[0] == SAVED_EVERY, f"the run begins again at step {resumed.done[0]}"


def newest_state(look):
    """In the place of the real one: reads the newest sound state, and does with the files what `look` does."""

    def newest(running, identity, world):
        look(running)
        found = checkpoint.newest(running)
        return found and found[0]

    return newest


def left_in_its_place(monkeypatch):
    """The resume passes over the damaged file; the next save makes it the one before the newest."""
    monkeypatch.setattr(loop, "_newest_state", newest_state(lambda running: None))


def backed_up_before_it_is_read(monkeypatch):
    """`cp last.pt last.backup.pt` at each start."""

    def copy(running):
        if running.exists():
            shutil.copy(running, checkpoint.previous(running))

    monkeypatch.setattr(loop, "_newest_state", newest_state(copy))


def deleted(monkeypatch):
    def delete(running):
        if running.exists() and checkpoint.newest(running)[1]:
            running.unlink()

    monkeypatch.setattr(loop, "_newest_state", newest_state(delete))


def the_sound_one_in_its_place(monkeypatch):
    def promote(running):
        if running.exists() and checkpoint.newest(running)[1]:
            checkpoint.previous(running).replace(running)

    monkeypatch.setattr(loop, "_newest_state", newest_state(promote))


def left_there_but_only_sound_ones_rotated(monkeypatch):
    left_in_its_place(monkeypatch)
    real = checkpoint.save

    def save(path, state):
        if path.exists():
            try:
                checkpoint.load(path)
            except checkpoint.Damaged:
                path.unlink()
        real(path, state)

    monkeypatch.setattr(checkpoint, "save", save)


LOST = "no sound state is left: "
INNOCENT = [deleted, the_sound_one_in_its_place, left_there_but_only_sound_ones_rotated]
PROOFS = [
    Proof(partial(check, accident), {left_in_its_place: LOST, backed_up_before_it_is_read: LOST}, INNOCENT)
    for accident in (damaged_again, killed_before_the_new_state_gets_its_name)
]


def test_proof(case):
    case()
