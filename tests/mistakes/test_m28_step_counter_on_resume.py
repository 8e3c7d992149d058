"""m28: a step counter off by one after resume.

Over all processes of a run each step is done once, the optimiser has counted as many steps as the run, and the learning rate of a step is the
one that its number gives. A rate that is not the one which the step before left is refused.
"""

import pytest
import torch
from proof import Proof
from tiny_phase import SAVED_EVERY, STEPS, TinyPhase, train

from repro import checkpoint, loop
from repro.errors import RunFailed
from repro.phases import PLAIN, SingleLossPhase

KILLED_AT = 5
SAVED = KILLED_AT // SAVED_EVERY * SAVED_EVERY
WARM_UP = PLAIN.model_copy(update={"warmup_steps": STEPS})


def sessions(folder, options=PLAIN):
    """A phase that is killed, and what went on from its last saved state: the steps after that state died with the process."""
    first, second = TinyPhase(KILLED_AT), TinyPhase()
    for phase in (first, second):
        phase.options = options
        train(phase, folder)
    return (
        first.done[:SAVED] + second.done,
        first.rates[:SAVED] + second.rates[-len(second.done) :],
        second.optimiser,
    )


def check_steps(tmp_path):
    steps, _, _ = sessions(tmp_path)
    for step in range(STEPS):
        assert steps.count(step) == 1, f"step {step} is done {steps.count(step)} times"


def check_optimiser(tmp_path):
    _, _, optimiser = sessions(tmp_path)
    (counted,) = {int(state["step"]) for state in optimiser.state.values()}
    assert counted == STEPS, f"after {STEPS} steps of the run the optimiser counts {counted}"


def check_rates(tmp_path):
    try:
        steps, rates, optimiser = sessions(tmp_path, WARM_UP)
    except RunFailed as refused:
        raise AssertionError(str(refused)) from refused
    for step, rate in zip(steps, rates, strict=True):
        expected = optimiser.defaults["lr"] * (step + 1) / STEPS
        assert rate == pytest.approx(expected), f"step {step}: found a learning rate of {rate}, expected {expected}"


def change_saved(monkeypatch, by):
    real = checkpoint.save

    def save(path, state):
        real(path, state | {"steps_done": state["steps_done"] + by * path.name.startswith("running")})

    monkeypatch.setattr(checkpoint, "save", save)


def counted_on_before_saving_and_after_loading(monkeypatch):
    """k-diffusion since its commit 30405ad: the increment has moved above the save, the `+ 1` of the resume has stayed."""
    change_saved(monkeypatch, +1)


def counted_on_after_saving_only(monkeypatch):
    """As in maxdiffusion's pull request 484: the state named after step 100 holds what 101 updates made; the resume begins at 100."""
    change_saved(monkeypatch, -1)


def schedule_of_the_process(monkeypatch):
    """The warm-up counts the steps of the process, not those of the run."""
    begun = {}

    def set_rates(self, state, step):
        for group, rate in zip(state.optimiser.param_groups, state.rates, strict=True):
            group["lr"] = self._factor(step - begun.setdefault(self, step)) * rate

    monkeypatch.setattr(SingleLossPhase, "_set_rates", set_rates)


def factor_of_the_process(monkeypatch):
    """The same by a counter in the method's own function of the step."""
    real, begun = SingleLossPhase._factor, {}
    monkeypatch.setattr(
        SingleLossPhase,
        "_factor",
        lambda self, step: real(self, step - begun.setdefault(self, step)),
    )


def optimiser_left_out(monkeypatch):
    """Moments, and the count that corrects their bias, begin anew."""
    real = loop.Loop.restore

    def restore(self, before):
        without = before["state"]["optimiser"] | {"state": {}}
        real(self, before | {"state": before["state"] | {"optimiser": without}})

    monkeypatch.setattr(loop.Loop, "restore", restore)


def last_step_saved_and_the_next_resumed(monkeypatch):
    """k-diffusion before that commit: the number of the last step is saved, and the resume adds one."""
    real_save, real_steps_done = checkpoint.save, loop._steps_done

    def steps_done(state, allowed):
        return real_steps_done(state | {"steps_done": state["steps_done"] + 1}, allowed)

    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: real_save(path, state | {"steps_done": state["steps_done"] - 1})
    )
    monkeypatch.setattr(loop, "_steps_done", steps_done)


def a_step_to_make_the_moments(monkeypatch):
    """An idle step before the state is loaded, so that there are moments to load into. What is loaded replaces its count."""
    real = loop.Loop.restore

    def restore(self, before):
        for parameter in self.state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.state.optimiser.step()
        self.state.optimiser.zero_grad()
        real(self, before)

    monkeypatch.setattr(loop.Loop, "restore", restore)


INNOCENT = [last_step_saved_and_the_next_resumed, a_step_to_make_the_moments]
PROOFS = [
    Proof(
        check_steps,
        plant={
            counted_on_before_saving_and_after_loading: "step 4 is done 0 times",
            counted_on_after_saving_only: "step 3 is done 2 times",
        },
        innocent=INNOCENT,
    ),
    Proof(
        check_optimiser,
        plant={
            counted_on_before_saving_and_after_loading: "after 8 steps of the run the optimiser counts 7",
            counted_on_after_saving_only: "after 8 steps of the run the optimiser counts 9",
            optimiser_left_out: "after 8 steps of the run the optimiser counts 4",
        },
        innocent=INNOCENT,
    ),
    Proof(
        check_rates,
        plant={
            schedule_of_the_process: "step 4: found a learning rate of 0.0125, expected 0.0625",
            factor_of_the_process: "phase tiny, step 5: found the learning rate 0.05, expected ",
            counted_on_before_saving_and_after_loading: "phase tiny, step 6: found the learning rate 0.05, expected 0.0625 ",
            counted_on_after_saving_only: "phase tiny, step 4: found the learning rate 0.05, expected 0.0375",
        },
        innocent=INNOCENT,
    ),
]


def test_proof(case):
    case()
