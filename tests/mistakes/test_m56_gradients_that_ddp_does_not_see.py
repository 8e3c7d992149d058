"""m56: gradients that DistributedDataParallel does not see.

However the loss was made, after some steps all processes have the same weights, those of one process.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from proof import Proof
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from repro.errors import RunFailed
from repro.loop import Loop
from repro.phases import Phase
from repro.runtime import CPU, World

STEPS = 2


class Net(nn.Sequential):
    def score(self, x):
        """A method other than forward."""
        return self(x)


@dataclass
class State:
    net: nn.Module
    sgd: torch.optim.Optimizer


def of(net):
    """The network, whether or not it is wrapped."""
    return getattr(net, "module", net)


WAYS = {
    "forward": lambda net, x: net(x),
    "functional_call": lambda net, x: functional_call(of(net), dict(of(net).named_parameters()), (x,)),
    "another method": lambda net, x: of(net).score(x),
}


class Fit(Phase[State]):
    name, steps = "fit", STEPS

    def __init__(self, way):
        self.way = way

    def setup(self, earlier):
        net = self.wrapped(Net(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
        return State(net, torch.optim.SGD(net.parameters(), lr=0.1))

    @staticmethod
    def wrapped(net):
        return net

    def minibatch(self, step, draw):
        return {"x": torch.randn(8, 3, generator=draw)}

    def train_step(self, state, batch, update):
        for part in update.parts(batch):
            update.backward(WAYS[self.way](state.net, part["x"]).square().mean(), inputs=state.net)
        update.log("loss", update.step(state.sgd))

    def networks(self, state):
        return {"net": state.net}


def trained(runtime, way):
    """The weights after STEPS steps, and what is said where the state is saved."""
    loop = Loop(Fit(way), seed=0, runtime=runtime, earlier={})
    for _ in range(STEPS):
        loop.one_step(loop.next_batch())
    try:
        loop.require_same_state()
        told = ""
    except RunFailed as error:
        told = str(error)
    return torch.cat([weight.detach().flatten() for weight in loop.state.net.parameters()]).tolist(), told


def check(way, in_each_process, tmp_path):
    (first, _), (second, _) = in_processes(2, in_each_process, trained, way, folder=tmp_path / way)
    apart = distance(first, second)
    assert apart == 0, f"{way}: after {STEPS} steps the weights of two processes are {apart:.2f} apart"
    off = distance(first, trained(CPU, way)[0])
    assert off < 1e-6, f"{way}: two processes end {off:.1e} from one, expected rounding"


def distance(one, other):
    return float((torch.tensor(one) - torch.tensor(other)).norm())


def ddp():
    """The sum over processes is left to DistributedDataParallel; numbers are still summed up by the engine."""
    real = World.sum_gradients
    World.sum_gradients = lambda self, weights, *numbers, **place: real(self, [], *numbers, **place)

    def wrapped(net):
        net = DistributedDataParallel(net)
        # A sum, as the engine's, where DistributedDataParallel would take the mean.
        net.register_comm_hook(
            None,
            lambda _, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0]),
        )
        return net

    Fit.wrapped = staticmethod(wrapped)


def autograd_grad():
    """`torch.autograd.grad`, and what it gives is put into `.grad`."""

    def backward(loss, inputs=None, **_):
        for weight, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    torch.Tensor.backward = backward


def weight_by_weight():
    def sum_gradients(self, weights, *numbers, place=""):
        for weight in weights:
            dist.all_reduce(weight.grad)
        return [self.total(number) for number in numbers]

    World.sum_gradients = sum_gradients


def summed_by_ddp(in_each_process):
    in_each_process.append(ddp)


def summed_by_ddp_and_put_by_hand(in_each_process):
    in_each_process += [ddp, autograd_grad]


def put_by_hand(in_each_process):
    """The engine adds up what is there when the optimiser steps, whoever put it there."""
    in_each_process.append(autograd_grad)


def summed_weight_by_weight(in_each_process):
    in_each_process.append(weight_by_weight)


APART = ": after 2 steps the weights of two processes are 0."
PROOFS = [
    Proof(
        partial(check, "forward"),
        plant={summed_by_ddp_and_put_by_hand: "forward" + APART},
        innocent=[summed_by_ddp, put_by_hand],
    ),
    *(
        Proof(partial(check, way), plant={summed_by_ddp: way + APART}, innocent=[summed_weight_by_weight])
        for way in ("functional_call", "another method")
    ),
]


def test_proof(case):
    case()


def test_what_it_leaves_is_seen_when_the_state_is_saved(tmp_path):
    found = in_processes(2, [ddp], trained, "another method", folder=tmp_path / "processes")
    assert all("state_dict.module.0.weight different in the processes" in told for _, told in found), [
        told for _, told in found
    ]


def gradients(runtime, way, by_hand):
    """How far this process' gradient is from the other's, in its own lengths: at once, and after a right pass."""
    torch.manual_seed(0)
    net = DistributedDataParallel(Net(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
    x = torch.randn(8, 3)[runtime.world.rank :: 2]
    found, backward = [], torch.Tensor.backward
    for _ in range(2):
        if by_hand:
            autograd_grad()
        WAYS[way](net, x).square().mean().backward(inputs=list(net.parameters()))
        one, other = runtime.world.gather(torch.cat([weight.grad.flatten() for weight in net.parameters()])[None])
        found.append(float((one - other).norm() / one.norm()))
        net.zero_grad()
        torch.Tensor.backward = backward
        net(x).square().mean().backward()
        net.zero_grad()
    return found


@pytest.mark.parametrize(
    ("way", "by_hand", "apart"),
    [("forward", False, 0), ("forward", True, 0.56), ("functional_call", False, 0.56), ("another method", False, 0.56)],
)
def test_what_ddp_leaves_in_each_process(tmp_path, way, by_hand, apart):
    """The figures of the entry: alike with its forward pass, and otherwise apart by half of their length."""
    found = in_processes(2, [], gradients, way, by_hand, folder=tmp_path / "processes")
    for one in found:
        assert one == pytest.approx([apart, apart], abs=0.02), found
