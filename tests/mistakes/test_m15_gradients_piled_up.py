"""m15: gradients accumulated over inner updates for want of zero_grad.

An update is made of its own gradient alone: that of the next step has nothing of it, nor has the next inner update of one step, under every
option of a step. A gradient that is left over at the end of a step is refused.
"""

from dataclasses import dataclass
from functools import partial

import torch
from proof import Proof
from torch import nn

from repro import update
from repro.config import Pace
from repro.errors import RunFailed
from repro.loop import run_phase
from repro.phases import PLAIN, Phase, SingleLossPhase
from repro.runtime import Runtime
from repro.update import Update

UPDATES = 4
"""The gradient of update k is 10^k and SGD subtracts it, so each digit of the weight counts how often one update was made."""


def digits_model():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


class OneUpdateAStep(SingleLossPhase):
    name, iterations = "digits", UPDATES

    def __init__(self, **options):
        self.options = PLAIN.model_copy(update=options)

    def make_model(self):
        return digits_model()

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=1.0)

    def minibatch(self, step, draw):
        return {"x": torch.full((2, 1), 10.0**step)}

    def loss(self, model, batch):
        return (model.weight * batch["x"]).mean()


@dataclass
class Digits:
    model: nn.Module
    sgd: torch.optim.SGD


class TwoUpdatesAStep(Phase[Digits]):
    """A loop of its own: an outer one draws, and two inner updates follow."""

    name, steps = "digits", UPDATES // 2

    def setup(self, earlier):
        model = digits_model()
        return Digits(model, torch.optim.SGD(model.parameters(), lr=1.0))

    def minibatch(self, step, draw):
        return {"x": torch.tensor([[10.0 ** (2 * step), 10.0 ** (2 * step + 1)]]).repeat(2, 1)}

    def train_step(self, state, batch, update):
        for inner in range(2):
            for part in update.parts(batch):
                update.backward((state.model.weight * part["x"][:, inner]).mean())
            update.step(state.sgd)

    def networks(self, state):
        return {"model": state.model}


PHASES = {
    "plain": OneUpdateAStep,
    "clipping": partial(OneUpdateAStep, clip_norm=1e6),  # far above every gradient here
    "scaled loss": partial(OneUpdateAStep, precision="fp16"),
    "two updates a step": TwoUpdatesAStep,
}


def check(tmp_path, kind):
    """After four updates of SGD the weight is minus 1 + 10 + 100 + 1000."""
    try:
        result = run_phase(
            PHASES[kind](),
            folder=tmp_path,
            identity={},
            seed=0,
            runtime=Runtime(torch.device("cpu")),
            pace=Pace(log_every=4, checkpoint_every=4),
            earlier={},
        )
    except RunFailed as refused:
        raise AssertionError(f"{kind}: {refused}") from refused
    times = f"{-round(result.networks['model'].weight.item()):04d}"[::-1]
    assert times == "1111", f"{kind}: the gradients of updates 1 to 4 were applied {', '.join(times)} times"


def never_cleared(monkeypatch):
    monkeypatch.setattr(update, "_clear", lambda weights: None)


def never_cleared_nor_looked_for(monkeypatch):
    """Nor is anybody there who looks at what is left at the end of a step, as in a loop without this engine."""
    never_cleared(monkeypatch)
    real = Update.end
    monkeypatch.setattr(Update, "end", lambda self, weights: real(self, []))


def cleared_at_the_end_of_a_step(monkeypatch):
    """Only the outer loop clears: what an inner update leaves is in the next one, and nothing is left over at the end."""
    never_cleared(monkeypatch)
    real = Update.end

    def end(self, weights):
        for _, weight in weights:
            weight.grad = None
        real(self, weights)

    monkeypatch.setattr(Update, "end", end)


def taken_off_before_the_update(monkeypatch):
    """Another order of the same: the gradient is taken off the weights, and handed to the optimiser."""
    real = Update.step

    def step(self, optimiser, **options):
        weights = [weight for group in optimiser.param_groups for weight in group["params"]]
        if self.scaler.is_enabled():
            return real(self, optimiser, **options)
        return real(self, optimiser, gradient=self.gradient(weights), **options)

    monkeypatch.setattr(Update, "step", step)


def cleared_twice(monkeypatch):
    """Before the first backward of a step as well, where one looks for it."""
    real = Update.end

    def end(self, weights):
        real(self, weights)
        for _, weight in weights:
            weight.grad = None

    monkeypatch.setattr(Update, "end", end)


def two_backward_passes_of_half_the_loss(monkeypatch):
    """Accumulated within one update, as it is done to save memory."""
    real = torch.Tensor.backward

    def backward(self, inputs=None, retain_graph=False):
        real(self / 2, inputs=inputs, retain_graph=True)
        real(self / 2, inputs=inputs, retain_graph=retain_graph)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


INNOCENT = [taken_off_before_the_update, cleared_twice, two_backward_passes_of_half_the_loss]
LEFT = ": phase digits, step 1: found a gradient left on model.weight, expected none at the end of a step"
NEVER = ": the gradients of updates 1 to 4 were applied 4, 3, 2, 1 times"
INNER = ": the gradients of updates 1 to 4 were applied 2, 1, 2, 1 times"
PROOFS = [
    *(
        Proof(
            partial(check, kind=kind),
            {never_cleared: kind + LEFT, never_cleared_nor_looked_for: kind + NEVER},
            [*INNOCENT, cleared_at_the_end_of_a_step],
        )
        for kind in ("plain", "clipping")
    ),
    Proof(
        partial(check, kind="two updates a step"),
        {
            never_cleared: "two updates a step" + LEFT,
            never_cleared_nor_looked_for: "two updates a step" + NEVER,
            cleared_at_the_end_of_a_step: "two updates a step" + INNER,
        },
        INNOCENT,
    ),
]


def test_proof(case):
    case()


def test_a_scaled_loss_hides_it(tmp_path, monkeypatch):
    """A gradient that is left over was unscaled already: among the scaled ones of the next step it is 1 / 65,536 of itself."""
    check(tmp_path / "right", "scaled loss")
    never_cleared_nor_looked_for(monkeypatch)
    check(tmp_path / "planted", "scaled loss")
