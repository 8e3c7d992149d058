"""m31: eval() or no_grad forgotten where a network is only used.

While samples are drawn, and where a later phase asks a network of an earlier one, the network gives one answer to one question and keeps nothing
of how it came to it. While a network is trained, its dropout is on.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from patches import change_finished_networks
from proof import Proof
from tiny_project import DIGITS, write_project
from torch import nn

from nsgf import evaluate_images, sample
from nsgf.phases import StraightFlow
from nsgf.unet import UNet
from repro import run
from repro.config import Pace
from repro.loop import run_phase
from repro.method import find_project
from repro.phases import SingleLossPhase
from repro.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
SEED = 0
SAMPLES, LATER = "while samples are drawn", "in a later phase"


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory):
    """A finished run, made before anything is planted. Its UNets have dropout, and the classifier that judges is asked in parts."""
    root = write_project(tmp_path_factory.mktemp("trained"), "digits", DIGITS)
    planned = run.plan(find_project(root), "digits", ["phases.*.iterations=2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "describe", lambda *_: {})  # asks git and every package
        folder = run.execute(planned, SEED, root / "runs", CPU, False, None)
    return planned, folder


def handed_on(trained):
    planned, folder = trained
    return {name: phase.networks for name, phase in run.networks(planned, SEED, folder, CPU).items()}


@contextmanager
def asked_twice(networks, where):
    """Within this block a network that answers is asked the same again. Collects the names of those that were asked."""
    asked, handles = set(), []

    def watch(name, part):
        def look(part, inputs, output):
            asked.add(name)
            assert torch.equal(part.forward(*inputs), output), f"{where}: {name} gives two answers to one question"
            assert not output.requires_grad, f"{where}: {name} keeps the graph of its answer"

        handles.append(part.register_forward_hook(look))

    for name, handed in networks.items():
        for network in handed.values():
            for part in (network, *network.children()):
                watch(name, part)
    try:
        yield asked
    finally:
        for handle in handles:
            handle.remove()


def check_sampling(trained):
    """Of all networks, while the run is evaluated."""
    models = handed_on(trained)
    with asked_twice(models, SAMPLES) as asked:
        run.measure(trained[0], SEED, models, CPU)
    assert asked == set(models), f"asked were {sorted(asked)}, expected {sorted(models)}"


class Student(SingleLossPhase):
    """Learns what the straight flow of an earlier phase answers."""

    name, iterations = "student", 1

    def make_model(self):
        return nn.Linear(64, 64)

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def prepare(self, seed, scratch, earlier):
        self.x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.y = earlier["straight_flow"](self.x, torch.full((4,), 0.5))

    def minibatch(self, step, generator):
        return {"x": self.x, "y": self.y}

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"].flatten(1)), batch["y"].flatten(1))


def trains(phase, folder, earlier):
    run_phase(phase, folder=folder, identity={}, seed=SEED, runtime=CPU, pace=Pace(log_every=1, checkpoint_every=9), earlier=earlier)  # fmt: skip


def check_later_phase(trained, tmp_path):
    """Of a network that a later phase learns from."""
    models = handed_on(trained)
    with asked_twice(models, LATER) as asked:
        trains(Student(), tmp_path, models)
    assert asked == {"straight_flow"}, f"asked were {sorted(asked)}, expected the straight flow"


def check_training(trained, tmp_path):
    """The other way round: every step is trained with dropout."""
    phase = next(one for one in trained[0].project.method.phases(trained[0].config, CPU) if one.name == "straight_flow")
    real, steps = phase.loss, []

    def loss(model, batch):
        steps.append(all(part.training for part in model.modules()))
        return real(model, batch)

    phase.loss = loss
    trains(phase, tmp_path, {})
    assert all(steps), f"straight_flow: step {steps.index(False)} is trained with dropout off"


def eval_forgotten(monkeypatch):
    """A network that was made and filled is in training mode until somebody says eval()."""
    change_finished_networks(monkeypatch, lambda model: model.train())


def functional_dropout(monkeypatch):
    """Its `training` is true unless it is told otherwise, so eval() does not reach it. Every flag is right."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: nn.functional.dropout(x, self.p))


def weights_not_frozen(monkeypatch):
    """The weights of an earlier phase ask for gradients, and nobody said no_grad."""
    change_finished_networks(monkeypatch, lambda model: model.requires_grad_(True))


def gradients_while_sampling(monkeypatch):
    """The same, while samples are drawn."""
    weights_not_frozen(monkeypatch)
    no_grad_left_out(monkeypatch)


def no_train_after_a_look(monkeypatch):
    """Samples are looked at while training, in eval mode, and training goes on in it."""
    real = StraightFlow.loss

    def loss(self, model, batch):
        sample.straight_flow(model.eval(), batch["x_0"], steps=1)
        return real(self, model, batch)

    monkeypatch.setattr(StraightFlow, "loss", loss)


def train_after_a_look(monkeypatch):
    real = StraightFlow.loss

    def loss(self, model, batch):
        with torch.no_grad():
            sample.straight_flow(model.eval(), batch["x_0"], steps=1)
        return real(self, model.train(), batch)

    monkeypatch.setattr(StraightFlow, "loss", loss)


def no_grad_left_out(monkeypatch):
    """Of frozen networks nothing is kept all the same."""
    monkeypatch.setattr(evaluate_images, "evaluate", torch.enable_grad()(evaluate_images.evaluate))


def functional_dropout_that_is_told(monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: nn.functional.dropout(x, self.p, self.training))


def copies_put_into_eval_mode(monkeypatch):
    """A network in training mode is handed on, and the evaluation works with a copy in eval mode."""
    eval_forgotten(monkeypatch)
    real = evaluate_images.evaluate

    def evaluate(config, models, *rest):
        copies = {name: copy.deepcopy(model).eval() for name, model in models.items()}
        return real(config, copies, *rest)

    monkeypatch.setattr(evaluate_images, "evaluate", evaluate)


TWO, KEPT = "gives two answers to one question", "keeps the graph of its answer"
PROOFS = [
    Proof(
        check_sampling,
        plant={
            eval_forgotten: f"{SAMPLES}: velocity_field {TWO}",
            functional_dropout: f"{SAMPLES}: velocity_field {TWO}",
            gradients_while_sampling: f"{SAMPLES}: velocity_field {KEPT}",
        },
        innocent=[weights_not_frozen, no_grad_left_out, copies_put_into_eval_mode, functional_dropout_that_is_told],
    ),
    Proof(
        check_later_phase,
        plant={
            eval_forgotten: f"{LATER}: straight_flow {TWO}",
            functional_dropout: f"{LATER}: straight_flow {TWO}",
            weights_not_frozen: f"{LATER}: straight_flow {KEPT}",
        },
        innocent=[functional_dropout_that_is_told],
    ),
    Proof(
        check_training,
        plant={no_train_after_a_look: "straight_flow: step 1 is trained with dropout off"},
        innocent=[train_after_a_look],
    ),
]


def test_proof(case):
    case()


def test_a_second_evaluation_of_one_seed_does_not_show_it(trained):
    """The generator that dropout draws from is seeded before each: the numbers are equal, and wrong."""
    models = {name: model.train() for name, model in handed_on(trained).items()}
    first, second = (run.measure(trained[0], SEED, models, CPU)[0].metrics for _ in range(2))
    assert first == second


def test_a_graph_takes_half_a_mib_for_each_image_and_step_of_the_solver(storages):
    """With the UNet of digits. Without a graph the number of steps makes no difference."""
    sizes = {"channels": 32, "blocks": 1, "multipliers": [1, 2], "heads": 1, "head_channels": None, "groups": 8}
    network = UNet(image_size=8, image_channels=1, attention_resolutions=[4], dropout=0.0, **sizes)
    images = 2

    def peak(steps):
        with storages() as counted:
            sample.end_of_straight_flow(network, torch.zeros(images, 1, 8, 8), steps=steps)
        return counted.peak

    with torch.no_grad():
        assert peak(4) == peak(2)
    a_step = (peak(4) - peak(2)) / 2
    assert a_step / images / 2**20 == pytest.approx(0.49, abs=0.01)
