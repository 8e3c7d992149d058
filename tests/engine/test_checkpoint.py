import hashlib
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
from repro.errors import BadInput, RunFailed

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


@pytest.mark.parametrize(
    "state",
    [{"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, {0: torch.ones(1), "0": torch.zeros(1)}],
    ids=["a dot in a key", "a number as a key"],
)
def test_tensors_of_one_dotted_path_do_not_replace_each_other(tmp_path, state):
    """The names of tensors are their paths joined by dots, of which two can be the same."""
    checkpoint.save(tmp_path / "c", state)
    one, other = state.values()
    loaded_one, loaded_other = checkpoint.load(tmp_path / "c").values()
    assert torch.equal(loaded_one, one)
    assert torch.equal(*(value["b"] if isinstance(value, dict) else value for value in (loaded_other, other)))


def test_the_checkpoint_before_is_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "c.safetensors", {"step": step})
    assert checkpoint.load(tmp_path / "c.safetensors") == {"step": 3}
    assert checkpoint.load(tmp_path / "c.previous.safetensors") == {"step": 2}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", range(4), ids=["write", "flush", "keep", "rename"])
def test_a_failure_anywhere_in_a_save_leaves_the_newest_checkpoint(tmp_path, monkeypatch, number):
    for step in (1, 2):
        checkpoint.save(tmp_path / "c.safetensors", {"step": step})
    calls = []
    for owner, name in ((checkpoint, "save_file"), (checkpoint.os, "fsync"), (checkpoint.os, "replace")):
        real = getattr(owner, name)

        def fails(*given, real=real, **named):
            calls.append(1)
            if len(calls) == number + 1:
                raise OSError(28, "No space left on device")
            return real(*given, **named)

        monkeypatch.setattr(owner, name, fails)
    with pytest.raises(
        RunFailed, match=r"c.safetensors: cannot be written \(No space left on device\): found .* bytes"
    ):
        checkpoint.save(tmp_path / "c.safetensors", {"step": 3})
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / "c.safetensors") == ({"step": 2}, None)
    assert not list(tmp_path.glob("*.partial"))


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


def of_the_first_format(path):
    save_file({"a": torch.ones(1)}, path, metadata={"format": "repro-checkpoint-1", "tree": "{}"})


def another_key(path):
    sealed(path, {"dict": []}, more="x")


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def long_header(path):
    path.write_bytes(struct.pack("<Q", 90_000_000) + b"{}")


def empty(path):
    path.write_bytes(b"")


def folder(path):
    path.mkdir()


def link_to_itself(path):
    path.symlink_to(path)


def sealed(path, tree, tensors=None, **header):
    """A file by a stranger who knows the format: its checksum is right, its description need not be."""
    tree = tree if isinstance(tree, str) else json.dumps(tree)
    tensors = {} if tensors is None else tensors
    seal = {"format": checkpoint.FORMAT, "tree": tree, "sha256": checkpoint._checksum(tree, tensors, checkpoint.FORMAT)}
    save_file(tensors, path, metadata=seal | header)


def with_header(change):
    """A sound file whose header a stranger has changed."""

    def make(path):
        checkpoint.save(path, {"a": torch.ones(4)})
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return make


ONE = {"x": torch.ones(1)}
REFUSED = {
    "absent": (lambda path: None, "found no such file"),
    "a folder": (folder, "found no such file"),
    "a link to itself": (link_to_itself, "found no such file"),
    "empty": (empty, "HeaderTooSmall|header too small"),
    "a pickle": (hostile_pickle, "no sound checkpoint: "),
    "truncated": (truncated, "no sound checkpoint: "),
    "a header of exabytes": (huge_header, "(?i)header.?too.?large"),
    "a header longer than the file": (long_header, "(?i)invalid.?header.?length"),
    "weights of another program": (foreign, "found format None, expected 'repro-checkpoint-3'"),
    "the first format": (of_the_first_format, "found format 'repro-checkpoint-1', expected 'repro-checkpoint-3'"),
    "another key in the header": (another_key, "found the header format, more, sha256, tree, expected"),
    "an unknown kind": (lambda path: sealed(path, {"call": "os.system"}), "unknown kind 'call'"),
    "two kinds": (lambda path: sealed(path, {"dict": [], "list": []}), "too many values"),
    "no JSON": (lambda path: sealed(path, "[["), "Expecting value"),
    "a list": (lambda path: sealed(path, {"list": []}), "found list, expected a dict"),
    "nested 100,000 deep": (lambda path: sealed(path, '{"list": [' * 100_000 + "]}" * 100_000), "recursion"),
    "a key that is no text": (lambda path: sealed(path, {"dict": [[["k"], {"value": 1}]]}), "unhashable"),
    "a value that is a list": (lambda path: sealed(path, {"dict": [["k", {"value": [1]}]]}), "no sound checkpoint"),
    "a tensor that is not there": (lambda path: sealed(path, {"dict": [["k", {"tensor": "y"}]]}, ONE), "'y'"),
    "a tensor for two places": (
        lambda path: sealed(path, {"list": [{"tensor": "x"}, {"tensor": "x"}]}, ONE),
        "no sound checkpoint: 'x'",
    ),
    "a tensor for no place": (lambda path: sealed(path, {"dict": []}, ONE), "found 1 tensors that nothing refers to"),
    "a wrong checksum": (lambda path: sealed(path, {"dict": []}, sha256="0" * 64), "found other contents"),
    "another dtype": (with_header(lambda header: header["state.a"].update(dtype="I32")), "found other contents"),
    "an unknown dtype": (with_header(lambda header: header["state.a"].update(dtype="O8")), "no sound checkpoint"),
    "a wider dtype": (with_header(lambda header: header["state.a"].update(dtype="F64")), "no sound checkpoint"),
    "another shape": (with_header(lambda header: header["state.a"].update(shape=[2, 2])), "found other contents"),
    "a negative shape": (with_header(lambda header: header["state.a"].update(shape=[-4])), "no sound checkpoint"),
    "an offset beyond the end": (
        with_header(lambda header: header["state.a"].update(data_offsets=[0, 2**60])),
        "no sound checkpoint",
    ),
    "another name": (with_header(lambda header: header.update({"state.b": header.pop("state.a")})), "found other"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_foreign_or_hostile_file_is_refused_in_one_line(tmp_path, make, reason):
    path = tmp_path / "c.safetensors"
    make(path)
    with pytest.raises(checkpoint.Damaged, match=reason) as caught:
        checkpoint.load(path)
    (line,) = caught.value.problems
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 500
    assert not (tmp_path / "executed").exists()


def test_a_name_is_only_a_name(tmp_path):
    """No file is opened or made by the name of a tensor or a key."""
    folder = tmp_path / "folder"
    folder.mkdir()
    state = {"../../escaped": torch.ones(1), "/etc/passwd": {"..": torch.zeros(1)}, "\0": 1}
    checkpoint.save(folder / "c", state)
    assert list(checkpoint.load(folder / "c")) == list(state)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_numbers_that_are_none_come_back_as_they_were(tmp_path):
    nan = torch.tensor([float("nan"), float("inf"), -0.0])
    checkpoint.save(tmp_path / "c", {"loss": float("nan"), "weights": nan})
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded["loss"] != loaded["loss"]
    assert torch.equal(loaded["weights"].view(torch.int32), nan.view(torch.int32))


def test_every_flipped_bit_is_noticed(tmp_path):
    """In the length, the header, its padding, and the data."""
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"a": torch.tensor([1.0, 2.0]), "b": [3, "x"]})
    sound = path.read_bytes()
    unnoticed = []
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            checkpoint.load(path)
            unnoticed.append(bit)
        except checkpoint.Damaged:
            pass
    assert unnoticed == []


def test_a_file_that_is_cut_anywhere_or_longer_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"a": torch.tensor([1.0, 2.0])})
    sound = path.read_bytes()
    for damaged in [sound[:length] for length in range(len(sound))] + [sound + b"\0", sound + sound]:
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.Damaged):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("names", "step", "told"),
    [
        ({"running": 3, "running.previous": 2}, 3, False),
        ({"running": None, "running.previous": 2}, 2, True),
        ({"running.previous": 2}, 2, False),
        ({"running": 3, "running.previous": None}, 3, False),
        ({"running": 3}, 3, False),
    ],
    ids=["both sound", "newest damaged", "newest not there", "older damaged", "only one"],
)
def test_the_newest_sound_one_is_found(tmp_path, names, step, told):
    for name, saved in names.items():
        path = tmp_path / f"{name}.safetensors"
        if saved is None:
            path.write_bytes(b"damaged")
        else:
            checkpoint.save(path, {"step": saved})
    state, problem = checkpoint.newest(tmp_path / "running.safetensors")
    assert state == {"step": step} and (problem is not None) == told
    assert not told or problem.startswith(f"{tmp_path / 'running.safetensors'}: no sound checkpoint")


def test_where_none_is_sound_both_are_named(tmp_path):
    for name in ("c", "c.previous"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"damaged")
    with pytest.raises(checkpoint.Damaged, match=r"c.safetensors: no sound .*; .*c.previous.safetensors: no sound"):
        checkpoint.newest(tmp_path / "c.safetensors")


def test_where_there_is_none_there_is_no_state(tmp_path):
    assert checkpoint.newest(tmp_path / "c.safetensors") is None


def test_what_killed_saves_left_is_swept_away(tmp_path):
    """safetensors writes into a file of its own beside ours, which a kill leaves there."""
    for name in (".tmpAbC123", "running.safetensors.partial", "running.safetensors", "log.jsonl"):
        (tmp_path / name).touch()
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "running.safetensors"]


def test_weights_from_elsewhere_come_by_their_checksum(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_file({"weight": torch.arange(3.0)}, path)
    sum_of_file = hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(checkpoint.pretrained(path, sum_of_file)["weight"], torch.arange(3.0))
    with pytest.raises(BadInput, match=f"found a file of SHA-256 {sum_of_file}, expected {'0' * 64}"):
        checkpoint.pretrained(path, "0" * 64)


@pytest.mark.parametrize(("made", "words"), [(False, "cannot be read"), (True, "found no safetensors file")])
def test_what_is_no_file_of_weights_is_refused(made, words, tmp_path):
    path = tmp_path / "encoder.pth"
    if made:
        torch.save({"weight": torch.ones(1)}, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest() if made else ""
    with pytest.raises(BadInput, match=words):
        checkpoint.pretrained(path, found)
