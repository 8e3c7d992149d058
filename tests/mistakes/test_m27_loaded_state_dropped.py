"""m27: a checkpoint loaded onto the GPU and kept.

Files are read into the memory of the host, whatever device the phase trains on. When training goes on, nothing is alive of what was read but
what the optimiser uses.
"""

import pytest
import torch
from proof import Proof
from tiny_phase import TinyPhase, train
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from repro import checkpoint, loop
from repro.phases import PLAIN

KILLED_AT, RESUMED_AT = 5, 4


class Read:
    """While it is entered: onto which device each file is read, and the storages of all that is read."""

    def __init__(self, patch):
        self.devices, self.storages = {}, {}
        load, safe_open = checkpoint.load, checkpoint.safe_open

        def noted_open(path, framework, device):
            self.devices[path.name] = device
            return safe_open(path, framework=framework, device="cpu")

        def noted_load(path):
            state = load(path)
            self.storages |= storages(state)
            return state

        patch.setattr(checkpoint, "load", noted_load)
        patch.setattr(checkpoint, "safe_open", noted_open)


class Watched(TinyPhase):
    """Counts, before each step, the bytes that are alive of what was read, those of its optimiser aside."""

    options = PLAIN.model_copy(update={"ema_decay": 0.5})

    def __init__(self, read, killed_at=None):
        super().__init__(killed_at)
        self.read, self.alive = read, {}

    def minibatch(self, step, generator):
        used = storages(self.optimiser.state_dict())
        left = {one: size for one, size in self.read.storages.items() if not one.expired() and one not in used}
        self.alive[step] = sum(left.values())
        return super().minibatch(step, generator)


def storages(tree):
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {StorageWeakRef(tensor.untyped_storage()): tensor.nbytes for tensor in tensors}


def run(tmp_path):
    """A phase that is killed and resumed, the phase after it, and what was read on the way."""
    with pytest.MonkeyPatch.context() as patch:
        read = Read(patch)
        train(Watched(read, KILLED_AT), tmp_path / "first")
        resumed = train(Watched(read), tmp_path / "first")
        del resumed.optimiser  # only this test has kept it
        return resumed, train(Watched(read), tmp_path / "second"), read


def check(tmp_path):
    resumed, second, read = run(tmp_path)
    assert resumed.done[0] == RESUMED_AT and read.storages
    for where, phase in (("a resumed phase", resumed), ("the phase after it", second)):
        step, alive = next(iter(phase.alive.items()))
        assert not alive, f"step {step} of {where}: {alive} bytes of what was read are alive, and nothing uses them"


def check_device(tmp_path):
    _, _, read = run(tmp_path)
    assert read.devices.keys() == {"running.safetensors", "model.safetensors"}
    for name, device in read.devices.items():
        assert device == "cpu", f"{name} is read onto {device}, expected cpu"


def read_onto_the_device(monkeypatch):
    """`torch.load(path, map_location=device)`, as in nanoGPT's train.py."""
    real = checkpoint.load

    def load(path):
        with pytest.MonkeyPatch.context() as patch:
            opened = checkpoint.safe_open
            patch.setattr(checkpoint, "safe_open", lambda path, framework, device: opened(path, framework, "cuda:0"))
            return real(path)

    monkeypatch.setattr(checkpoint, "load", load)


def kept_in_a_variable(monkeypatch):
    """The variable `checkpoint` of a script, which lives as long as the script."""
    real, kept = loop._newest_state, []
    monkeypatch.setattr(loop, "_newest_state", lambda *rest: kept.append(real(*rest)) or kept[-1])


def kept_by_the_optimisers_owner(monkeypatch):
    real = loop.Loop.restore

    def restore(self, before):
        self.before = before
        real(self, before)

    monkeypatch.setattr(loop.Loop, "restore", restore)


def kept_of_a_finished_phase(monkeypatch):
    """For the figures, say."""
    real, kept = loop._matching, []

    def matching(state, path, identity):
        kept.extend([state] * (path.name == "model.safetensors"))
        return real(state, path, identity)

    monkeypatch.setattr(loop, "_matching", matching)


def numbers_kept(monkeypatch):
    """All of the state that is no tensor."""
    real, kept = loop._newest_state, []

    def newest_state(*rest):
        state = real(*rest)
        kept.append(tree_map_only(torch.Tensor, lambda tensor: tensor.shape, state))
        return state

    monkeypatch.setattr(loop, "_newest_state", newest_state)


def moments_copied(monkeypatch):
    """As on a GPU: the optimiser has moments of its own, and those that were read go."""
    real = loop.Loop.restore
    copied = lambda self, before: real(self, tree_map_only(torch.Tensor, torch.clone, before))  # noqa: E731
    monkeypatch.setattr(loop.Loop, "restore", copied)


RESUMED = "step 4 of a resumed phase: "
INNOCENT = [numbers_kept, moments_copied]
PROOFS = [
    Proof(
        check,
        {
            kept_in_a_variable: RESUMED,
            kept_by_the_optimisers_owner: RESUMED,
            kept_of_a_finished_phase: "step 0 of the phase after it: ",
        },
        INNOCENT,
    ),
    Proof(check_device, {read_onto_the_device: "running.safetensors is read onto cuda:0, expected cpu"}, INNOCENT),
]


def test_proof(case):
    case()
