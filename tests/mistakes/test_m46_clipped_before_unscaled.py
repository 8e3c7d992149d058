"""m46: gradients clipped while they still carry the scale of the loss.

In fp16 as in float32, a gradient longer than the limit is cut to the limit and a shorter one is left as it is.
"""

from functools import partial

import pytest
import torch
from proof import Proof
from torch import nn

from repro import update
from repro.config import Pace
from repro.loop import run_phase
from repro.phases import PLAIN, SingleLossPhase
from repro.runtime import Runtime

LENGTH = 0.5
LIMITS = {"longer than the limit": 0.1, "shorter than the limit": 1.0}


class Slope(SingleLossPhase):
    """One step from the zero vector along a gradient of LENGTH, with a rate of 1."""

    name, iterations = "slope", 1

    def __init__(self, precision, limit, kind=torch.optim.SGD, weights=4):
        self.options = PLAIN.model_copy(update={"precision": precision, "clip_norm": limit})
        self.kind, self.weights = kind, weights

    def make_model(self):
        model = nn.Linear(self.weights, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def make_optimiser(self, model):
        return self.kind(model.parameters(), lr=1.0)

    def minibatch(self, step, generator):
        # Times 65,536, the scale that the loss begins with, the gradient is still a number of fp16.
        return {"x": torch.full((2, self.weights), LENGTH / self.weights**0.5)}

    def loss(self, model, batch):
        return model(batch["x"]).float().mean()


def moved(phase, folder):
    """The length of the way that the weights went."""
    result = run_phase(
        phase,
        folder=folder,
        identity={},
        seed=0,
        runtime=Runtime(torch.device("cpu")),
        pace=Pace(log_every=1, checkpoint_every=1),
        earlier={},
    )
    return result.networks["model"].weight.norm().item()


def check(gradient, tmp_path):
    limit = LIMITS[gradient]
    for precision in ("float32", "fp16"):
        length, expected = moved(Slope(precision, limit), tmp_path / precision), min(LENGTH, limit)
        assert abs(length / expected - 1) < 1e-2, (
            f"{precision}: a gradient of length {LENGTH} clipped at {limit} moved the weights by {length:.1e}, expected {expected}"
        )


class ClippedBeforeUnscaled(torch.amp.GradScaler):
    """The call before the clipping is missing. The scaler's own step makes up for it, too late."""

    def unscale_(self, optimiser):
        pass

    def step(self, optimiser):
        super().unscale_(optimiser)
        return super().step(optimiser)


def clipped_before_unscaled(monkeypatch):
    monkeypatch.setattr(update.torch.amp, "GradScaler", ClippedBeforeUnscaled)


def unscaled_by_hand(monkeypatch):
    """Divided by the scale before the clipping, and again in the scaler's step, which cannot know."""

    class ByHand(ClippedBeforeUnscaled):
        def unscale_(self, optimiser):
            for group in optimiser.param_groups:
                for weight in group["params"]:
                    weight.grad /= self.get_scale()

    monkeypatch.setattr(update.torch.amp, "GradScaler", ByHand)


def limit_times_the_scale(monkeypatch):
    """Clipped while it is scaled, and rightly so."""
    real_clip, scalers = nn.utils.clip_grad_norm_, []

    class Noted(ClippedBeforeUnscaled):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            scalers.append(self)

    monkeypatch.setattr(update.torch.amp, "GradScaler", Noted)
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda weights, limit: real_clip(weights, limit * scalers[-1].get_scale())
    )


def another_scale(monkeypatch):
    monkeypatch.setattr(update.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**10))


def by_the_length_of_each_weight(monkeypatch):
    """The same for one weight, by another function."""

    def clip(weights, limit):
        for weight in weights:
            weight.grad *= min(1.0, limit / weight.grad.norm().item())

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)


PROOFS = [
    Proof(
        partial(check, "longer than the limit"),
        dict.fromkeys(
            [clipped_before_unscaled, unscaled_by_hand],
            "fp16: a gradient of length 0.5 clipped at 0.1 moved the weights by 1.5e-06",
        ),
        [limit_times_the_scale, another_scale, by_the_length_of_each_weight],
    ),
    Proof(
        partial(check, "shorter than the limit"),
        {
            clipped_before_unscaled: "fp16: a gradient of length 0.5 clipped at 1.0 moved the weights by 1.5e-05",
            unscaled_by_hand: "fp16: a gradient of length 0.5 clipped at 1.0 moved the weights by 7.6e-06",
        },
        [limit_times_the_scale, another_scale, by_the_length_of_each_weight],
    ),
]


def test_proof(case):
    case()


@pytest.mark.parametrize(("weights", "share"), [(4, 1.0), (10**6, 0.6)])
def test_adam_hides_it_where_weights_are_few(monkeypatch, tmp_path, weights, share):
    """It divides by the gradient's own size, to which it adds 1e-8: what is left of the clipped one is 1.5e-8 for a million weights."""
    phase = partial(Slope, "fp16", 1.0, torch.optim.Adam, weights)
    right = moved(phase(), tmp_path / "right")
    clipped_before_unscaled(monkeypatch)
    assert moved(phase(), tmp_path / "planted") / right == pytest.approx(share, abs=0.01)


def test_the_norm_that_clipping_returns_tells(monkeypatch, tmp_path):
    """What the entry says to print."""
    real, norms = nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda weights, limit: norms.append(real(list(weights), limit).item())
    )
    moved(Slope("fp16", 1.0), tmp_path / "right")
    clipped_before_unscaled(monkeypatch)
    moved(Slope("fp16", 1.0), tmp_path / "planted")
    assert norms == pytest.approx([LENGTH, 65_536 * LENGTH], rel=1e-2)
