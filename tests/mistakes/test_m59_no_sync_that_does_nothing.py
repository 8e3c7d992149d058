"""m59: a no_sync that does nothing.

However many micro-batches a step has, its gradient goes once from process to process.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from processes import in_processes
from proof import Proof
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from repro.loop import Loop
from repro.phases import Phase
from repro.runtime import Runtime, World
from repro.update import Update

SIZE, MICRO_BATCHES, WEIGHTS = 2, 4, 50
SUMS = {"c10d::allreduce_": lambda tensors, *_: tensors, "c10d::_reduce_scatter_base_": lambda own, whole, *_: [whole]}
"""The exchanges that add up gradients, and which of their arguments are what goes in."""


class Sent(TorchDispatchMode):
    """Counts the numbers that are given to the other processes to be added up."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in SUMS:
            self.numbers += sum(tensor.numel() for tensor in SUMS[function.name()](*args))
        return function(*args, **(kwargs or {}))


@dataclass
class State:
    net: nn.Module
    sgd: torch.optim.Optimizer


class Fit(Phase[State]):
    name, steps = "fit", 1

    def setup(self, earlier):
        net = self.wrapped(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))
        assert sum(weight.numel() for weight in net.parameters()) == WEIGHTS
        return State(net, torch.optim.SGD(net.parameters(), lr=0.1))

    @staticmethod
    def wrapped(net):
        return net

    def minibatch(self, step, draw):
        return {"x": torch.randn(16, 3, generator=draw)}

    def train_step(self, state, batch, update):
        for part in update.parts(batch):
            update.backward(state.net(part["x"]).square().mean())
        update.step(state.sgd)

    def networks(self, state):
        return {"net": state.net}


def step(runtime, micro_batches):
    """How often a step adds up its gradient over the processes, and the weights after it."""
    runtime = Runtime(runtime.device, world=runtime.world, micro_batches={"fit": micro_batches})
    loop = Loop(Fit(), seed=0, runtime=runtime, earlier={})
    batch = loop.next_batch()
    with Sent() as counted:
        loop.one_step(batch)
    weights = torch.cat([whole(weight.detach()).flatten() for weight in loop.state.net.parameters()])
    return counted.numbers / WEIGHTS, weights.tolist()


def whole(weight):
    """A weight, also where it lies in shards."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def check(in_each_process, tmp_path):
    for micro_batches in (1, MICRO_BATCHES):
        for times, _ in in_processes(SIZE, in_each_process, step, micro_batches, folder=tmp_path / str(micro_batches)):
            assert times == 1, (
                f"a step in {micro_batches} micro-batches sends its gradient {times:g} times, expected once"
            )


def left_to(wrapper):
    """The sum over processes is left to a wrapper of the network; numbers are still summed up by the engine."""
    real = World.sum_gradients
    World.sum_gradients = lambda self, weights, *numbers, **place: real(self, [], *numbers, **place)
    Fit.wrapped = staticmethod(wrapper)


def around_forward_and_backward(quiet):
    """Every micro-batch but the last one is gone through in `quiet(net)`."""
    real_step, real_parts, nets = Fit.train_step, Update.parts, []

    def train_step(self, state, batch, update):
        nets[:] = [state.net]
        real_step(self, state, batch, update)

    def parts(self, batch):
        for number, part in enumerate(real_parts(self, batch)):
            with quiet(nets[0], number < self._micro_batches - 1):
                yield part

    Fit.train_step, Update.parts = train_step, parts


def around_backward(quiet):
    """The same, but the forward pass is outside of it."""
    real_step, real_backward, nets, calls = Fit.train_step, Update.backward, [], []

    def train_step(self, state, batch, update):
        nets[:] = [state.net]
        real_step(self, state, batch, update)

    def backward(self, loss, **named):
        calls.append(loss)
        with quiet(nets[0], len(calls) < self._micro_batches):
            real_backward(self, loss, **named)

    Fit.train_step, Update.backward = train_step, backward


def by_no_sync(net, quiet):
    return net.no_sync() if quiet else nullcontext()


def by_no_sync_if_there(net, quiet):
    """Asks for it by name, as accelerate 0.27.2 does."""
    return getattr(net, "no_sync", nullcontext)() if quiet else nullcontext()


@contextmanager
def by_setter(net, quiet):
    net.set_requires_gradient_sync(not quiet)
    yield


def in_shards(net):
    return fully_shard(net, mesh=init_device_mesh("cpu", (SIZE,)))


def ddp_and_no_sync_around_backward(in_each_process):
    in_each_process += [partial(left_to, DistributedDataParallel), partial(around_backward, by_no_sync)]


def ddp_without_no_sync(in_each_process):
    in_each_process += [partial(left_to, DistributedDataParallel)]


def fsdp2_and_no_sync_by_name(in_each_process):
    in_each_process += [partial(left_to, in_shards), partial(around_forward_and_backward, by_no_sync_if_there)]


def ddp_and_no_sync_around_both(in_each_process):
    in_each_process += [partial(left_to, DistributedDataParallel), partial(around_forward_and_backward, by_no_sync)]


def ddp_and_no_sync_by_name(in_each_process):
    """DistributedDataParallel has one."""
    in_each_process += [
        partial(left_to, DistributedDataParallel),
        partial(around_forward_and_backward, by_no_sync_if_there),
    ]


def fsdp2_and_its_setter(in_each_process):
    in_each_process += [partial(left_to, in_shards), partial(around_forward_and_backward, by_setter)]


FOUR = "a step in 4 micro-batches sends its gradient 4 times, expected once"
PROOFS = [
    Proof(
        check,
        plant={ddp_without_no_sync: FOUR, ddp_and_no_sync_around_backward: FOUR, fsdp2_and_no_sync_by_name: FOUR},
        innocent=[ddp_and_no_sync_around_both, ddp_and_no_sync_by_name, fsdp2_and_its_setter],
    )
]


def test_proof(case):
    case()


def test_nothing_but_traffic_is_lost(tmp_path):
    """The weights are the same, whether the gradient was sent once or four times."""
    found = []
    for plant in (ddp_and_no_sync_around_both, ddp_and_no_sync_around_backward, fsdp2_and_no_sync_by_name):
        first = []
        plant(first)
        found += in_processes(SIZE, first, step, MICRO_BATCHES, folder=tmp_path / plant.__name__)
    assert [times for times, _ in found] == [1, 1, 4, 4, 4, 4]
    for _, weights in found:
        torch.testing.assert_close(weights, found[0][1], rtol=0, atol=1e-6)
