"""What a step may do with its optimisers, and what is refused: nothing is left behind that no state holds."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from repro.errors import RunFailed
from repro.phases import Phase
from repro.runtime import Runtime
from repro.update import Update

CPU = Runtime(torch.device("cpu"))


@dataclass
class Networks:
    first: nn.Module
    second: nn.Module


class OfTest(Phase[Networks]):
    name, steps = "p", 1

    def setup(self, earlier: Any) -> Networks:
        return Networks(nn.Linear(1, 1), nn.Linear(1, 1))

    def minibatch(self, step: int, draw: Any) -> dict:
        return {}

    def train_step(self, state: Networks, batch: Any, update: Update) -> None: ...

    def networks(self, state: Networks) -> dict:
        return {}


def update(precision: str = "float32") -> Update:
    phase = OfTest()
    phase.precision = precision
    made = Update(phase, 0, CPU)
    made.begin(0)
    return made


def pair() -> tuple[nn.Linear, torch.optim.SGD]:
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    return network, torch.optim.SGD(network.parameters(), lr=1.0)


X = torch.full((2, 1), 3.0)


def test_a_step_moves_the_weights_clears_the_gradient_and_gives_the_loss():
    one, (network, sgd) = update(), pair()
    one.backward(network(X).mean())
    assert one.step(sgd) == 3.0
    assert network.weight == 1 - 3
    assert network.weight.grad is None
    one.end([("state.first.weight", network.weight)])


def test_several_losses_add_up():
    one, (network, sgd) = update(), pair()
    one.backward(network(X).mean())
    one.backward(2 * network(X).mean())
    assert one.step(sgd) == 9.0
    assert network.weight == 1 - 9


def test_parts_count_by_their_weight():
    one, (network, sgd) = update(), pair()
    for weight in (0.25, torch.tensor(0.75)):
        one.backward(network(X).mean(), weight=weight)
    assert one.step(sgd) == 3.0
    assert network.weight == 1 - 3


def test_two_optimisers_may_step_from_one_loss():
    one, (network, sgd), (other, second) = update(), pair(), pair()
    one.backward((network(X) + other(X)).mean())
    assert one.step(sgd) == one.step(second) == 6.0
    one.backward(network(X).mean())
    assert one.step(sgd) == -6.0


def test_the_gradient_of_one_network_alone():
    one, (network, sgd), (critic, _) = update(), pair(), pair()
    one.backward(critic(network(X)).mean(), inputs=network)
    assert critic.weight.grad is None
    one.step(sgd)
    assert network.weight == 1 - 3
    one.end([("state.second.weight", critic.weight)])


def test_a_gradient_that_is_left_is_refused():
    one, (network, sgd), (critic, _) = update(), pair(), pair()
    one.backward(critic(network(X)).mean())
    one.step(sgd)
    with pytest.raises(RunFailed, match="phase p, step 1: found a gradient left on second.weight, expected none"):
        one.end([("state.second.weight", critic.weight)])


def test_an_optimiser_that_steps_without_backward_is_refused():
    one, (network, sgd) = update(), pair()
    with pytest.raises(RunFailed, match="found no backward since the last step of this SGD"):
        one.step(sgd)
    one.backward(network(X).mean())
    one.step(sgd)
    with pytest.raises(RunFailed, match="found no backward since the last step of this SGD"):
        one.step(sgd)


def test_weights_without_gradient_rest():
    one, (network, _), (resting, _) = update(), pair(), pair()
    adam = torch.optim.Adam([*network.parameters(), *resting.parameters()], lr=0.1, weight_decay=0.5)
    one.backward(network(X).mean())
    one.step(adam)
    assert resting.weight == 1


def test_a_loss_that_is_no_number_is_refused():
    one, (network, _) = update(), pair()
    with pytest.raises(RunFailed, match=r"found a loss of shape \(2, 1\), expected a number"):
        one.backward(network(X))
    with pytest.raises(
        RunFailed, match="found a loss that does not require grad, expected a number that depends on weights"
    ):
        one.backward(X.mean())


def test_clipping_is_over_the_weights_of_the_optimiser():
    one, (network, sgd), (critic, _) = update(), pair(), pair()
    one.backward((network(X) + 100 * critic(X)).mean())
    one.step(sgd, clip=1.0)
    assert float(network.weight.detach()) == pytest.approx(0.0, abs=1e-6)
    assert one.gradient(critic)[0] == 300


def test_a_gradient_is_taken_off_and_given_back():
    one, (network, sgd) = update(), pair()
    one.backward(network(X).mean())
    (found,) = one.gradient(network)
    assert network.weight.grad is None
    one.step(sgd, gradient=[2 * found])
    assert network.weight == 1 - 6


def test_a_closure_is_called_as_often_as_the_optimiser_asks():
    one, network = update(), nn.Linear(1, 1)
    search = torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe")
    calls = []

    def closure() -> None:
        calls.append(1)
        one.backward((network(X) - 2).square().mean())

    first = one.step(search, closure=closure)
    assert len(calls) > 1
    assert first > 1e-3
    assert float((network(X) - 2).detach().square().mean()) < 1e-6
    one.end(network.named_parameters())


def test_a_closure_without_backward_is_refused():
    one, (network, _) = update(), pair()
    with pytest.raises(RunFailed, match="found a closure without backward"):
        one.step(torch.optim.LBFGS(network.parameters()), closure=lambda: network(X).mean())


@pytest.mark.parametrize("what", ["closure", "gradient"])
def test_fp16_is_refused_where_the_scale_of_the_loss_would_be_lost(what):
    one, (network, sgd) = update("fp16"), pair()
    with pytest.raises(RunFailed, match="found closure= or gradient= with fp16, expected bf16 or float32"):
        one.step(sgd, **{what: lambda: None} if what == "closure" else {what: [None]})
    with pytest.raises(RunFailed, match="update.gradient: found fp16"):
        one.gradient(network)


def test_two_optimisers_unscale_by_the_scale_of_their_loss():
    one, (network, sgd), (other, second) = update("fp16"), pair(), pair()
    one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    one.backward((network(X) + other(X)).mean())
    one.step(sgd)
    one.step(second)
    one.end([])
    assert one.scaler.get_scale() == 2048.0
    assert network.weight == other.weight == 1 - 3


def test_draws_within_a_step_are_a_function_of_its_number():
    def drawn(step: int, *names: str) -> torch.Tensor:
        one = update()
        one.begin(step)
        return torch.rand(3, generator=one.generator(*names))

    assert torch.equal(drawn(4, "rollout"), drawn(4, "rollout"))
    assert not torch.equal(drawn(4, "rollout"), drawn(5, "rollout"))
    assert not torch.equal(drawn(4, "rollout"), drawn(4, "assignment"))


def test_a_clipped_step_of_fp16_may_find_no_gradient_at_all():
    """Layers that rest: the scaler unscales an optimiser once before it steps, and here it never steps."""
    one, (network, _), (resting, other) = update("fp16"), pair(), pair()
    for step in range(2):
        one.begin(step)
        one.backward(network(X).mean())
        one.step(other, clip=1.0)
        one.end([])
    assert resting.weight == 1
