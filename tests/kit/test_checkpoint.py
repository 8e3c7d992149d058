import json
import os
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from repro import checkpoint
from repro.errors import BadInput

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_plain_values_come_back_with_their_types(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("plain") / "c.safetensors"
    checkpoint.save(path, {"value": value})
    assert repr(checkpoint.load(path)["value"]) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    checkpoint.save(tmp_path / "c", {"a": [tensor, {"b": tensor}]})
    loaded = checkpoint.load(tmp_path / "c")["a"]
    for found in (loaded[0], loaded[1]["b"]):
        assert found.dtype == dtype and torch.equal(found, tensor)


def test_tensors_that_share_memory_or_are_views_are_saved(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path / "c", {"a": base, "b": base.T, "c": base[0]})
    loaded = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded["b"], base.T) and torch.equal(loaded["c"], base[0])


def test_an_adam_state_resumes(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.8, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    checkpoint.save(tmp_path / "c", {"optimiser": optimiser.state_dict()})
    other = torch.optim.Adam(model.parameters(), lr=5.0)
    other.load_state_dict(checkpoint.load(tmp_path / "c")["optimiser"])
    assert other.param_groups[0]["lr"] == 1e-3 and other.param_groups[0]["betas"] == (0.8, 0.9)
    for parameter in model.parameters():
        for key, value in optimiser.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)


@pytest.mark.parametrize("value", [object(), {1, 2}, 3 + 4j, b"bytes", torch.nn.Linear(1, 1), os.curdir.__class__])
def test_anything_else_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="checkpoint state.a.b: found"):
        checkpoint.save(tmp_path / "c", {"a": {"b": value}})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", {"step": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "c", {"step": 2})
    assert checkpoint.load(tmp_path / "c") == {"step": 1}


def test_a_kill_before_the_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", {"step": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "c", {"step": 2})
    assert checkpoint.load(tmp_path / "c") == {"step": 1}


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    checkpoint.save(tmp_path / "c", {})
    assert order == ["fsync", "replace", "fsync"]


def hostile_pickle(path):
    class Boom:
        def __reduce__(self):
            return (os.mkdir, (str(path.with_name("executed")),))

    path.write_bytes(pickle.dumps(Boom()))


def truncated(path):
    checkpoint.save(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-7])


def foreign(path):
    save_file({"a": torch.ones(1)}, path)


def bad_tree(path):
    save_file(
        {"a": torch.ones(1)}, path, metadata={"format": checkpoint.FORMAT, "tree": json.dumps({"call": "os.system"})}
    )


def bad_tree_text(path):
    save_file({"a": torch.ones(1)}, path, metadata={"format": checkpoint.FORMAT, "tree": "[["})


def absent_tensor(path):
    save_file({"a": torch.ones(1)}, path, metadata={"format": checkpoint.FORMAT, "tree": json.dumps({"tensor": "b"})})


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "make",
    [hostile_pickle, truncated, foreign, bad_tree, bad_tree_text, absent_tensor, huge_header, empty, lambda path: None],
)
def test_a_damaged_foreign_or_hostile_file_is_refused_in_one_line(tmp_path, make):
    path = tmp_path / "c.safetensors"
    make(path)
    with pytest.raises(BadInput) as caught:
        checkpoint.load(path)
    (line,) = caught.value.problems
    assert line.startswith(str(path)) and "\n" not in line
    assert not (tmp_path / "executed").exists()
