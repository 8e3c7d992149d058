"""m32: an average of the weights is kept, and the last weights are used.

With `ema_decay` set, the network that a phase hands on holds the average of the weights after each of its steps, and training never sees it. Without
it the network holds the last weights.
"""

import torch
from proof import Proof
from tiny_project import DIGITS, write_project
from torch.nn.utils import parameters_to_vector

from repro import loop, phases, run
from repro.config import Pace
from repro.loop import run_phase
from repro.method import find_project
from repro.phases import SingleLossPhase
from repro.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
SEED = 0
DECAY = {"straight_flow": 0.5, "time_predictor": None}


def weights_of(network):
    return parameters_to_vector(network.parameters()).detach().clone()


def watched(phase):
    """The weights before and after each step of the optimiser. They are filled while the phase runs."""
    before, after, real = [], [], phase.make_optimiser

    def make_optimiser(model):
        optimiser = real(model)
        optimiser.register_step_pre_hook(lambda *_: before.append(weights_of(model)))
        optimiser.register_step_post_hook(lambda *_: after.append(weights_of(model)))
        return optimiser

    phase.make_optimiser = make_optimiser
    return before, after


def averaged(weights, decay):
    average = weights[0]
    for one in weights[1:]:
        average = decay * average + (1 - decay) * one
    return average


def check(tmp_path):
    settings = ["phases.*.precision=float32", *(f"phases.{name}.ema_decay={DECAY[name] or 'null'}" for name in DECAY)]
    planned = run.plan(find_project(write_project(tmp_path, "digits", DIGITS)), "digits", settings)
    for phase in planned.project.method.phases(planned.config, CPU):
        if phase.name not in DECAY:
            continue
        before, after = watched(phase)
        result = run_phase(
            phase,
            folder=tmp_path / phase.name,
            identity={},
            seed=SEED,
            runtime=CPU,
            pace=Pace(log_every=1, checkpoint_every=2),
            earlier={},
        )
        for number, (begun, ended) in enumerate(zip(before[1:], after, strict=False), start=1):
            assert torch.equal(begun, ended), (
                f"{phase.name}: step {number} does not start from the weights of step {number - 1}"
            )
        decay, found = DECAY[phase.name], weights_of(result.networks)
        known = {
            "the last weights": after[-1],
            "the first weights": before[0],
            "the average": averaged(after, DECAY["straight_flow"]),
        }
        held = [name for name, weights in known.items() if torch.allclose(found, weights, rtol=0, atol=1e-6)]
        expected = "the last weights" if decay is None else "the average"
        assert held == [expected], f"{phase.name}: handed on are {held or 'other weights'}, expected {expected}"


def the_last_weights_are_saved(monkeypatch):
    monkeypatch.setattr(SingleLossPhase, "networks", lambda self, state: {"model": state.model})


def the_last_weights_are_read(monkeypatch):
    """Both are in the state that is saved, and the evaluation reads the key `model`."""
    real_step, real_result, last = SingleLossPhase.train_step, loop._load_finished, []

    def train_step(self, state, batch, update):
        real_step(self, state, batch, update)
        last.append({name: weight.clone() for name, weight in state.model.state_dict().items()})

    def load_finished(*arguments):
        result = real_result(*arguments)
        result.networks["model"].load_state_dict(last[-1])
        return result

    monkeypatch.setattr(SingleLossPhase, "train_step", train_step)
    monkeypatch.setattr(loop, "_load_finished", load_finished)


def never_updated(monkeypatch):
    """The average is made before training, a copy of the network, and stays that."""
    monkeypatch.setattr(phases.AveragedModel, "update_parameters", lambda self, model: None)


def trained_on_from_the_average(monkeypatch):
    """The average is put into the network to look at its samples, and the weights are not put back."""
    real = SingleLossPhase.train_step

    def train_step(self, state, batch, update):
        real(self, state, batch, update)
        if state.average is not None:
            state.model.load_state_dict(state.average.module.state_dict())

    monkeypatch.setattr(SingleLossPhase, "train_step", train_step)


def put_back_after_a_look(monkeypatch):
    real = SingleLossPhase.train_step

    def train_step(self, state, batch, update):
        real(self, state, batch, update)
        if state.average is not None:
            weights = {name: weight.clone() for name, weight in state.model.state_dict().items()}
            state.model.load_state_dict(state.average.module.state_dict())
            state.model.load_state_dict(weights)

    monkeypatch.setattr(SingleLossPhase, "train_step", train_step)


def put_into_the_network_at_the_end(monkeypatch):
    """The network that was trained is handed on, with the average in it."""
    real = SingleLossPhase.networks

    def networks(self, state):
        state.model.load_state_dict(real(self, state)["model"].state_dict())
        return {"model": state.model}

    monkeypatch.setattr(SingleLossPhase, "networks", networks)


def averaged_by_hand(monkeypatch):
    def by_hand(decay):
        def update(averages, weights, count):
            for average, weight in zip(averages, weights, strict=True):
                average.add_(weight - average, alpha=1 - decay)

        return update

    monkeypatch.setattr(phases, "get_ema_multi_avg_fn", by_hand)


PROOFS = [
    Proof(
        check,
        plant={
            the_last_weights_are_saved: "straight_flow: handed on are ['the last weights'], expected the average",
            the_last_weights_are_read: "straight_flow: handed on are ['the last weights'], expected the average",
            never_updated: "straight_flow: handed on are ['the first weights'], expected the average",
            trained_on_from_the_average: "straight_flow: step 2 does not start from the weights of step 1",
        },
        innocent=[put_back_after_a_look, put_into_the_network_at_the_end, averaged_by_hand],
    )
]


def test_proof(case):
    case()
