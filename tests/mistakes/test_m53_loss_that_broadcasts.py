"""m53: a loss that broadcasts (n,) against (n, 1).

The loss compares every prediction with its own target: `repro diagnose` names no phase `broadcast`, and names one that does.
"""

import re
from functools import partial

import pytest
import torch
from proof import Proof
from torch.nn.functional import mse_loss

from nsgf import networks, phases
from repro.config import load
from repro.randomness import generator, seed_global_generators
from repro.runtime import Runtime
from repro_tools.diagnose.bench import Bench
from repro_tools.diagnose.diagnostics import row_test
from repro_tools.diagnose.explanation import Place
from repro_tools.diagnose.hypotheses import findings
from repro_tools.diagnose.measured import Measured

CPU = torch.device("cpu")
SMALL = {
    "2d-8gaussians": ["phases.*.network.width=32", "phases.*.network.hidden_layers=1", "phases.*.pool.batch_size=8"],
    "digits": ["phases.time_predictor.network.channels=[2]", "phases.feature_classifier.network.channels=[2]"],
}


def make_phase(project, experiment, name, *settings):
    settings = ["phases.*.batch_size=16", "phases.*.pool.batches=1", *SMALL[experiment], *settings]
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], settings)
    made = phases.make_phases(config, Runtime(CPU, stand_in_data=True))
    return next(phase for phase in made if phase.name == name)


def check(project, tmp_path, experiment, name):
    phase = make_phase(project, experiment, name)
    phase.prepare(0, tmp_path, {})
    bench = Bench(phase, 0, CPU)
    measured = Measured(name, 0, rows=row_test(bench, bench.model(), bench.minibatch(0, "held")))
    found = [one for one in findings(measured, Place(experiment, name, 0, 1)) if one.kind == "broadcast"]
    assert not found, f"{name}: {found[0].title}: {found[0].measured}"


def not_squeezed(monkeypatch):
    """The predictor gives (n, 1), and its target is (n,)."""
    monkeypatch.setattr(networks.TimePredictorMLP, "forward", lambda self, x: self.layers(x).sigmoid())
    cnn = lambda self, x: self.time(self.convolutions(x).flatten(1)).sigmoid()  # noqa: E731
    monkeypatch.setattr(networks.TimePredictorCNN, "forward", cnn)


def target_in_a_column(monkeypatch):
    """By operators: no warning."""

    def loss(self, model, batch):
        x_t = phases.interpolate(batch["x_0"], batch["y"], batch["t"])
        return (model(x_t) - batch["t"][:, None]).square().mean()

    monkeypatch.setattr(phases.TimePredictor, "loss", loss)


def _weighted(keep_the_axis):
    """The squared error of each row, weighted by time."""

    def loss(self, model, batch):
        t = batch["t"]
        x_t = phases.interpolate(batch["x_0"], batch["y"], t)
        squared = (model(x_t, t) - batch["y"] + batch["x_0"]).square().mean(1, keepdim=keep_the_axis)
        return (squared * (1 + t)).mean()

    return loss


def weights_against_a_column(monkeypatch):
    """The mean over a row keeps its axis: (n, 1) errors meet (n,) weights."""
    monkeypatch.setattr(phases.StraightFlow, "loss", _weighted(keep_the_axis=True))


def weights_of_rows(monkeypatch):
    monkeypatch.setattr(phases.StraightFlow, "loss", _weighted(keep_the_axis=False))


def columns_on_both_sides(monkeypatch):
    """(n, 1) against (n, 1)."""
    not_squeezed(monkeypatch)
    target_in_a_column(monkeypatch)


def diagonal_of_a_table(monkeypatch):
    """All predictions against all targets, of which only the pairs are used."""

    def loss(self, model, batch):
        x_t = phases.interpolate(batch["x_0"], batch["y"], batch["t"])
        return (model(x_t)[:, None] - batch["t"][None]).square().diagonal().mean()

    monkeypatch.setattr(phases.TimePredictor, "loss", loss)


WORDS = ": the loss compares every prediction with every target: "
PREDICTOR = {
    not_squeezed: f"time_predictor{WORDS}mse_loss of (7, 1) and (7,) on 7 rows",
    target_in_a_column: f"time_predictor{WORDS}sub of (7,) and (7, 1) on 7 rows",
}
PROOFS = [
    Proof(partial(check, experiment="2d-8gaussians", name="time_predictor"), PREDICTOR, [columns_on_both_sides, diagonal_of_a_table]),
    Proof(partial(check, experiment="digits", name="time_predictor"), PREDICTOR, [columns_on_both_sides]),
    Proof(
        partial(check, experiment="2d-8gaussians", name="straight_flow"),
        plant={weights_against_a_column: f"straight_flow{WORDS}mul of (7, 1) and (7,) on 7 rows"},
        innocent=[weights_of_rows],
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_proof(case):
    case()


def test_the_symptom_is_what_pytorch_says():
    told = (
        "Using a target size (torch.Size([16])) that is different to the input size (torch.Size([16, 1])). "
        "This will likely lead to incorrect results due to broadcasting."
    )
    with pytest.warns(UserWarning, match=re.escape(told)):
        mse_loss(torch.zeros(16, 1), torch.zeros(16))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_predictor_that_broadcasts_learns_the_mean(project, monkeypatch):
    """Its predictions have no spread, and its loss is the variance of the time, 1/12. A right one knows the time of most points."""
    right = trained_predictor(project)
    not_squeezed(monkeypatch)
    planted = trained_predictor(project)
    assert right["loss"] < 0.03 and right["spread"] > 0.2, right
    assert abs(planted["loss"] - 1 / 12) < 0.03 and planted["spread"] < 0.03, planted


def trained_predictor(project):
    phase = make_phase(
        project, "2d-8gaussians", "time_predictor", "phases.*.batch_size=128", "phases.*.learning_rate=1e-2"
    )
    seed_global_generators(0)
    model = phase.make_model()
    optimiser = phase.make_optimiser(model)
    for step in range(150):
        batch = phase.minibatch(step, generator(step))
        loss = phase.loss(model, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    predicted = model(phases.interpolate(batch["x_0"], batch["y"], batch["t"])).detach()
    return {"loss": loss.item(), "spread": float(predicted.std())}
