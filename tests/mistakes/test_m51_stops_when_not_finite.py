"""m51: training goes on after a loss or gradient that is not finite.

Such a run ends in one line that names the phase and the step, and every state on the disk is finite. A sound phase is not stopped. The velocity
of points that are not finite is refused.
"""

import warnings
from functools import partial

import numpy as np
import ot
import pytest
import torch
from proof import Proof
from tiny_phase import STEPS, TinyPhase, train

from nsgf import geomloss_velocity, sinkhorn
from nsgf.config import Sinkhorn
from nsgf.phases import make_velocity
from repro import checkpoint, loop
from repro.errors import RunFailed
from repro.phases import PLAIN, SingleLossPhase
from repro.update import Update

FP16 = PLAIN.model_copy(update={"precision": "fp16"})
SAVED = range(1, STEPS, 2)  # a state is saved after each of these steps, counted from 0; after the last one the network


class Broken(TinyPhase):
    """Its loss, or only the gradient of its loss, is not finite in the given steps."""

    def __init__(self, what, steps, options=PLAIN, iterations=STEPS):
        super().__init__()
        self.what, self.broken, self.options, self.iterations = what, steps, options, iterations

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if self.done[-1] in self.broken:
            weight = model[1].weight
            # As far from itself as nothing: the root of 0 is 0, and its slope is infinite.
            loss = loss * torch.nan if self.what == "loss" else loss + (weight - weight).square().sum().sqrt()
        return loss


def weights_on_disk(folder):
    """The weights in every state that a resume or an evaluation could read, by the file's name."""
    files = {path.name: checkpoint.load(path) for path in sorted(folder.glob("*.safetensors"))}
    models = {
        name: state["networks"]["model"] if "networks" in state else state["state"]["model"]["state_dict"]
        for name, state in files.items()
    }
    return {name: [model["1.weight"], model["1.bias"]] for name, model in models.items()}


def check_sound(tmp_path):
    for options in (PLAIN, FP16):
        try:
            phase = train(Broken("nothing", (), options), tmp_path / options.precision)
        except RunFailed as stopped:
            raise AssertionError(f"a sound phase is stopped: {stopped}") from None
        left = list(weights_on_disk(tmp_path / options.precision))
        assert phase.done == list(range(STEPS)) and left == ["model.safetensors"]


def check(tmp_path, what, step):
    """`what` is broken in one step."""
    check_broken(tmp_path, Broken(what, [step]), f"the {what} of step {step}")


def check_every_step(tmp_path):
    """In fp16 a step whose gradient overflows is passed over, and the next loss is scaled with less."""
    check_broken(tmp_path, Broken("gradient", range(60), FP16, iterations=60), "the gradient of every step")


def check_broken(folder, phase, what):
    stopped = None
    try:
        train(phase, folder)
    except RunFailed as error:
        stopped = str(error)
    for name, weights in weights_on_disk(folder).items():
        assert all(weight.isfinite().all() for weight in weights), f"{what} is not finite, nor are weights in {name}"
    assert stopped, f"{what} is not finite, and the phase went on to its end"
    assert "\n" not in stopped and stopped.startswith("phase tiny, step "), stopped


def check_velocity(implementation):
    """Of clouds with one value that is no number, or so large that squares overflow."""
    velocity = make_velocity(Sinkhorn(implementation=implementation, blur=0.5, scaling=0.8))
    cloud = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    for value in (torch.nan, torch.inf, 1e30):
        for which in ("x", "y"):
            clouds = {"x": cloud.clone(), "y": cloud + 1.0}
            clouds[which][3, 0] = value
            try:
                v = velocity(**clouds)
            except (ValueError, FloatingPointError):
                continue
            raise AssertionError(f"{which} holds {value:g}: found velocities, {int(v.isfinite().sum())} of 32 finite")


def before_a_step(monkeypatch, change):
    real = SingleLossPhase.setup

    def setup(self, earlier):
        state = real(self, earlier)
        weights = list(state.model.parameters())
        state.optimiser.register_step_pre_hook(lambda *_: change([p for p in weights if p.grad is not None]))
        return state

    monkeypatch.setattr(SingleLossPhase, "setup", setup)


def gradients_made_numbers(monkeypatch):
    """As in edm's training loop."""

    def change(parameters):
        for parameter in parameters:
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)

    before_a_step(monkeypatch, change)


def step_left_out(monkeypatch):
    def change(parameters):
        if not all(parameter.grad.isfinite().all() for parameter in parameters):
            for parameter in parameters:
                parameter.grad = None

    before_a_step(monkeypatch, change)


def loss_said_and_saved(monkeypatch):
    """It is printed, and nobody looks at the weights that are saved."""
    monkeypatch.setattr(loop.Loop, "numbers", lambda self: print(self.update.numbers()) or self.update.numbers())
    weights_saved_unseen(monkeypatch)


def weights_saved_unseen(monkeypatch):
    """The loss is looked at before the step is made, and so is what is saved: this kit, until this entry was written."""
    monkeypatch.setattr(checkpoint, "require_finite", lambda *_: None)


def scaler_halves_for_ever(monkeypatch):
    monkeypatch.setattr(loop, "LEAST_SCALE", 0.0)


def given_up_earlier(monkeypatch):
    monkeypatch.setattr(loop, "LEAST_SCALE", 2.0**-10)


def uniform_plan_instead(monkeypatch):
    """As in torchcfm's get_map, of a plan whose sum is near 0: it is said, and every target serves every particle."""
    for module in (sinkhorn, geomloss_velocity):
        real = module.velocity

        def velocity(x, y, real=real, **settings):
            try:
                return real(x, y, **settings)
            except (ValueError, FloatingPointError):
                print("Numerical errors in OT plan, reverting to uniform plan.")
                return y.mean(0).expand_as(x) - x

        monkeypatch.setattr(module, "velocity", velocity)


def stopped_before_the_step(monkeypatch):
    """Every loss is looked at, and every gradient, at the price of waiting for the device."""
    before_a_step(monkeypatch, lambda parameters: _stop(all(p.grad.isfinite().all() for p in parameters)))


def _stop(finite):
    if not finite:
        raise RunFailed("phase tiny, step unknown: the gradient is not finite")


def masked_by_infinity(monkeypatch):
    """A buffer of the network holds an infinity, as a causal mask does."""
    real = TinyPhase.make_model

    def make_model(self):
        model = real(self)
        model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        return model

    monkeypatch.setattr(TinyPhase, "make_model", make_model)


def stopped_at_an_overflow(monkeypatch):
    """The first scale of fp16 is too large for most gradients, on purpose."""
    real = Update.end

    def end(self, weights):
        before = self.scaler.get_scale()
        real(self, weights)
        _stop(self.scaler.get_scale() >= before)

    monkeypatch.setattr(Update, "end", end)


def finite_points_only(monkeypatch):
    """What is not finite is refused before anything is computed."""
    for module in (sinkhorn, geomloss_velocity):
        real = module.velocity

        def velocity(x, y, real=real, **settings):
            if not (x.isfinite().all() and y.isfinite().all()):
                raise ValueError("points are not finite")
            return real(x, y, **settings)

        monkeypatch.setattr(module, "velocity", velocity)


ON = "and the phase went on to its end"
GRADIENT = {
    gradients_made_numbers: f"is not finite, {ON}",
    step_left_out: f"is not finite, {ON}",
    weights_saved_unseen: "is not finite, nor are weights in ",
}
PROOFS = [
    Proof(check_sound, {stopped_at_an_overflow: "a sound phase is stopped"}, [masked_by_infinity]),
    Proof(
        partial(check, what="loss", step=4),
        {loss_said_and_saved: "the loss of step 4 is not finite, nor are weights in "},
        [stopped_before_the_step, masked_by_infinity],
    ),
    *(
        Proof(partial(check, what="gradient", step=step), GRADIENT, [stopped_before_the_step, masked_by_infinity])
        for step in (SAVED[1], STEPS - 1)
    ),
    Proof(
        check_every_step,
        {scaler_halves_for_ever: f"the gradient of every step is not finite, {ON}"},
        [given_up_earlier, masked_by_infinity],
    ),
    *(
        Proof(
            partial(check_velocity, name),
            {uniform_plan_instead: "x holds nan: found velocities, "},
            [finite_points_only],
        )
        for name in ("closed_form", "geomloss_tensorized")
    ),
]


def test_proof(case):
    case()


def test_the_symptom_is_what_a_run_says(tmp_path):
    with pytest.raises(RunFailed, match="^phase tiny, step 5: the loss is nan; the last saved state is kept$"):
        train(Broken("loss", [4]), tmp_path / "loss")
    with pytest.raises(RunFailed, match="^phase tiny, step 4: the weights of model.1.weight are not finite; the last "):
        train(Broken("gradient", [3]), tmp_path / "gradient")


def test_what_libraries_make_of_it():
    """The plans that torchcfm takes from POT: one without a word, one of NaN, at which the draw from it stops, one of nothing."""
    weights, cost = np.full(4, 0.25), np.arange(16.0).reshape(4, 4)
    broken = cost.copy()
    broken[1, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ot.emd(weights, weights, broken).sum() == pytest.approx(1)
    with pytest.warns(UserWarning, match="numerical errors at iteration 0"):
        plan = ot.sinkhorn(weights, weights, broken, reg=0.05)
    assert np.isnan(plan).any()
    with pytest.raises(ValueError, match="probabilities contain NaN"):
        np.random.RandomState(0).choice(16, p=plan.flatten())
    with pytest.warns(UserWarning, match="numerical errors at iteration 0"), np.errstate(all="ignore"):
        assert ot.sinkhorn(weights, weights, 1e5 * (cost + 1), reg=0.05).sum() == 0
