"""m15: gradients accumulated over inner updates for want of zero_grad.

The update of a step is made of that step's gradient alone, in every phase and under every option of a step.
"""

from functools import partial

import torch
from proof import Proof
from torch import nn

from repro.config import Pace
from repro.loop import run_phase
from repro.phases import PLAIN, SingleLossPhase
from repro.runtime import Runtime
from repro.step import Stepper

OPTIONS = {
    "plain": PLAIN,
    "clipping": PLAIN.model_copy(update={"clip_norm": 1e6}),  # far above every gradient here
    "scaled loss": PLAIN.model_copy(update={"precision": "fp16"}),
}


class Digits(SingleLossPhase):
    """The gradient of step k is 10^k and SGD subtracts it, so each digit of the weight counts how often one step was taken."""

    name, iterations = "digits", 4

    def __init__(self, options):
        self.options = options

    def make_model(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=1.0)

    def minibatch(self, step, generator):
        return {"x": torch.full((2, 1), 10.0**step)}

    def loss(self, model, batch):
        return (model.weight * batch["x"]).mean()


def check(tmp_path, option):
    """After four steps of SGD the weight is minus 1 + 10 + 100 + 1000."""
    result = run_phase(
        Digits(OPTIONS[option]),
        folder=tmp_path,
        identity={},
        seed=0,
        runtime=Runtime(torch.device("cpu")),
        pace=Pace(log_every=4, checkpoint_every=4),
        earlier={},
    )
    times = f"{-round(result.model.weight.item()):04d}"[::-1]
    assert times == "1111", f"{option}: the gradients of steps 1 to 4 were applied {', '.join(times)} times"


def never_cleared(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self, set_to_none=True: None)


def cleared_before_two_inner_updates(monkeypatch):
    """An outer loop draws, two inner updates follow, and only the outer loop clears."""
    real = Stepper.step

    def step(self, loss, number):
        with monkeypatch.context() as inner:
            if number % 2:
                never_cleared(inner)
            real(self, loss, number)

    monkeypatch.setattr(Stepper, "step", step)


def zeros_in_place_of_none(monkeypatch):
    real = torch.optim.SGD.zero_grad
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self, set_to_none=True: real(self, set_to_none=False))


def cleared_after_the_update(monkeypatch):
    """Nothing is cleared before the backward pass, where one looks for it."""
    real, clear = Stepper.step, torch.optim.SGD.zero_grad
    never_cleared(monkeypatch)

    def step(self, loss, number):
        real(self, loss, number)
        clear(self._optimiser)

    monkeypatch.setattr(Stepper, "step", step)


def two_backward_passes_of_half_the_loss(monkeypatch):
    """Accumulated within one update, as it is done to save memory."""
    real = torch.Tensor.backward

    def backward(self):
        real(self / 2, retain_graph=True)
        real(self / 2)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


NEVER = ": the gradients of steps 1 to 4 were applied 4, 3, 2, 1 times"
INNER = ": the gradients of steps 1 to 4 were applied 2, 1, 2, 1 times"
PROOFS = [
    Proof(
        partial(check, option=option),
        plant={never_cleared: option + NEVER, cleared_before_two_inner_updates: option + INNER},
        innocent=[zeros_in_place_of_none, cleared_after_the_update, two_backward_passes_of_half_the_loss],
    )
    for option in ("plain", "clipping")
]


def test_proof(case):
    case()


def test_a_scaled_loss_hides_it(tmp_path, monkeypatch):
    """A gradient that is left over was unscaled already: among the scaled ones of the next step it is 1 / 65,536 of itself."""
    check(tmp_path / "right", "scaled loss")
    never_cleared(monkeypatch)
    check(tmp_path / "planted", "scaled loss")
