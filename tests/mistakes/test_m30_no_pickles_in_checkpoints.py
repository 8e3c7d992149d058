"""m30: pickled objects in a checkpoint.

A state holds tensors and plain values: an object is refused when it is saved, not when it is loaded. A file that would run code is refused in
one line, and nothing runs.
"""

import argparse
import base64
import io
import json
import os
import pickle
from functools import partial

import pytest
import torch
from proof import Proof
from safetensors.torch import save_file
from tiny_phase import TinyPhase, train

from repro import checkpoint
from repro.errors import BadInput

ARGUMENTS = argparse.Namespace(learning_rate=1e-4)


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def pickled(value):
    return pickle.dumps(value, protocol=2)


def saved_by_torch(value):
    buffer = io.BytesIO()
    torch.save({"model": {}, "args": value}, buffer)
    return buffer.getvalue()


def check_load(state, disguise, tmp_path):
    """A hostile file in the place of a state."""
    path, executed = tmp_path / state, tmp_path / "executed"
    if disguise == "safetensors":
        tree = json.dumps({"object": base64.b64encode(pickled(Hostile(executed))).decode()})
        form = checkpoint.FORMAT
        seal = {"format": form, "tree": tree, "sha256": checkpoint._checksum(tree, {}, form)}
        save_file({}, path, metadata=seal)
    else:
        path.write_bytes({"pickle": pickled, "torch": saved_by_torch}[disguise](Hostile(executed)))
    told = None
    try:
        train(TinyPhase(), tmp_path)
    except Exception as error:
        told = error
    assert not executed.exists(), f"{state}: what was pickled in it has run"
    assert told is not None, f"{state}: the phase went on from it"
    assert isinstance(told, BadInput), f"{state}: not refused, but {told!r}"
    (line,) = told.problems
    assert line.startswith(str(path)) and "\n" not in line, f"{state}: refused in more than one line: {line}"


def check_save(tmp_path):
    """An object is refused, or saved as plain values."""
    path = tmp_path / "running.safetensors"
    try:
        checkpoint.save(path, {"args": ARGUMENTS})
    except TypeError as error:
        assert "state.args: found Namespace" in str(error) and not list(tmp_path.iterdir())
    else:
        found = type(checkpoint.load(path)["args"])
        assert found is dict, f"saved an object, which comes back as a {found.__name__}"


def other_files_by_torch_load(monkeypatch, weights_only):
    real = checkpoint.load

    def load(path):
        try:
            return real(path)
        except checkpoint.Damaged:
            try:
                return torch.load(io.BytesIO(path.read_bytes()), weights_only=weights_only)
            except Exception as error:
                raise checkpoint.Damaged(f"{path}: {checkpoint._line(error)}") from None

    monkeypatch.setattr(checkpoint, "load", load)


def old_checkpoints_read_too(monkeypatch):
    """`weights_only=False`, as the error message of `torch.load` offers."""
    other_files_by_torch_load(monkeypatch, weights_only=False)


def weights_of_old_checkpoints_read_too(monkeypatch):
    other_files_by_torch_load(monkeypatch, weights_only=True)


def objects_pickled_into_the_description(monkeypatch):
    """Whatever JSON cannot say is put into it as a pickle."""
    pack, unpack = checkpoint._pack, checkpoint._unpack

    def packing(value, name, tensors):
        try:
            return pack(value, name, tensors)
        except TypeError:
            return {"object": base64.b64encode(pickled(value)).decode()}

    def unpacking(node, tensors):
        return pickle.loads(base64.b64decode(node["object"])) if "object" in node else unpack(node, tensors)

    monkeypatch.setattr(checkpoint, "_pack", packing)
    monkeypatch.setattr(checkpoint, "_unpack", unpacking)


def arguments_as_a_dict(monkeypatch):
    """The values of the arguments without their class."""
    real = checkpoint._pack
    monkeypatch.setattr(
        checkpoint,
        "_pack",
        lambda value, *rest: real(vars(value) if isinstance(value, argparse.Namespace) else value, *rest),
    )


def hostile(state, disguise, plant):
    return Proof(
        partial(check_load, state, disguise),
        plant={plant: f"{state}: what was pickled in it has run"},
        innocent=[weights_of_old_checkpoints_read_too],
    )


RUNNING, FINISHED = "running.safetensors", "model.safetensors"
PROOFS = [
    hostile(RUNNING, "pickle", old_checkpoints_read_too),
    hostile(RUNNING, "torch", old_checkpoints_read_too),
    hostile(RUNNING, "safetensors", objects_pickled_into_the_description),
    hostile(FINISHED, "torch", old_checkpoints_read_too),
    Proof(
        check_save,
        plant={objects_pickled_into_the_description: "saved an object, which comes back as a Namespace"},
        innocent=[arguments_as_a_dict],
    ),
]


def test_proof(case):
    case()


def test_the_symptom_is_what_torch_says_of_saved_arguments():
    """It saves them without a word."""
    with pytest.raises(
        pickle.UnpicklingError, match="^Weights only load failed. This file can still be loaded, to do so"
    ) as caught:
        torch.load(io.BytesIO(saved_by_torch(ARGUMENTS)))
    assert "Unsupported global: GLOBAL argparse.Namespace was not an allowed global by default" in str(caught.value)
