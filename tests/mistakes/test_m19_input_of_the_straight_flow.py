"""m19: the straight flow trained on the wrong inputs.

At time t the network is given (1 - t) x_0 + t y of a source point x_0 and a target point y, and taught y - x_0; the time predictor is given
the same and taught t.
"""

from functools import partial

import torch
from proof import Proof

from nsgf import phases, sinkhorn
from nsgf.flow import end_of_flow
from nsgf.laws import Laws
from repro.config import load
from repro.runtime import Runtime

ROWS = 16
NEAR = 1e-4  # of points of size 1 to 6, in float32


class Watched(Laws):
    """Notes what is drawn."""

    def __init__(self, laws):
        self.laws, self.shape = laws, laws.shape

    def draw(self, n, generator):
        x_0, y = self.laws.draw(n, generator)
        self.sources, self.targets = x_0.flatten(1), y.flatten(1)
        return x_0, y


def taught(phase, batch):
    """What the loss gives the network, and what it wants of it: x (n, d), t (n,), and v (n, d) or None. One row an example."""
    given = []

    def network(x, t=None):
        out = torch.zeros_like(x if t is not None else x.flatten(1)[:, 0], requires_grad=True)
        given.extend((x, t, out))
        return out

    phase.loss(network, batch).backward()
    x, t, out = given
    target = -out.grad * out.numel() / 2  # the gradient of the mean square at 0 is -2 target / n
    return (x.flatten(1), target, None) if t is None else (x.flatten(1), t, target.flatten(1))


def check(project, experiment, name):
    settings = [f"phases.*.batch_size={ROWS}"]
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], settings)
    phase = next(
        one for one in phases.make_phases(config, Runtime(torch.device("cpu"), stand_in_data=True)) if one.name == name
    )
    phase.laws = laws = Watched(phase.laws)
    x, t, v = taught(phase, phase.minibatch(0, torch.Generator().manual_seed(0)))
    sources, targets = laws.sources[:, None], laws.targets[None]
    for row in range(ROWS):
        # All pairs, because a coupling may choose any.
        off = (x[row] - (1 - t[row]) * sources - t[row] * targets).abs().amax(2)
        assert off.min() < NEAR, (
            f"{name}: at time {t[row]:.3f} the network is given {what_it_is(x[row], laws)}, expected (1 - t) x_0 + t y"
        )
        if v is not None:
            wrong = (v[row] - targets + sources).abs().amax(2)
            assert torch.maximum(off, wrong).min() < NEAR, (
                f"{name}: at time {t[row]:.3f} the network is taught another velocity than y - x_0, off by {wrong.min():.2g}"
            )


def what_it_is(x, laws):
    for points, words in ((laws.targets, "y itself"), (laws.sources, "x_0 itself")):
        if (points - x).abs().amax(1).min() < NEAR:
            return words
    return "a point that is not there on any line from a source to a target"


def given_the_target(monkeypatch):
    """As in torchcfm #126: the network is called with x_1 where x_t was meant."""
    monkeypatch.setattr(phases, "interpolate", lambda x_0, y, t: y)


def weights_swapped(monkeypatch):
    real = phases.interpolate
    monkeypatch.setattr(phases, "interpolate", lambda x_0, y, t: real(y, x_0, t))


def begun_where_phase_1_ends(monkeypatch):
    """As in the authors' code: lines from the particles after five Sinkhorn steps of 0.2."""
    velocity = partial(sinkhorn.velocity, blur=0.5, scaling=0.5)
    for kind in (phases.StraightFlow, phases.TimePredictor):

        def minibatch(self, step, generator, real=kind.minibatch):
            batch = real(self, step, generator)
            x_0, y = batch["x_0"], batch["y"]
            moved = end_of_flow(x_0.flatten(1), y.flatten(1), velocity, steps=5, step_size=0.2)
            return batch | {"x_0": moved.view_as(x_0)}

        monkeypatch.setattr(kind, "minibatch", minibatch)


def taught_the_way_that_is_left(monkeypatch):
    """y - x_t: the same direction, and too short by 1 - t."""

    def loss(self, model, batch):
        x_t = phases.interpolate(batch["x_0"], batch["y"], batch["t"])
        return torch.nn.functional.mse_loss(model(x_t, batch["t"]), batch["y"] - x_t)

    monkeypatch.setattr(phases.StraightFlow, "loss", loss)


def told_the_time_of_another_row(monkeypatch):
    real = phases.StraightFlow.loss
    monkeypatch.setattr(
        phases.StraightFlow,
        "loss",
        lambda self, model, batch: real(self, lambda x, t: model(x, t.roll(1)), batch),
    )


def written_as_a_step_from_the_source(monkeypatch):
    """x_0 + t (y - x_0), in float64."""

    def interpolate(x_0, y, t):
        t = t.double().view(-1, *[1] * (x_0.ndim - 1))
        return (x_0 + t * (y.double() - x_0)).float()

    monkeypatch.setattr(phases, "interpolate", interpolate)


def paired_by_optimal_transport(monkeypatch):
    for kind in (phases.StraightFlow, phases.TimePredictor):

        def minibatch(self, step, generator, real=kind.minibatch):
            batch = real(self, step, generator)
            return batch | {"y": batch["y"][phases.optimal_assignment(batch["x_0"], batch["y"])]}

        monkeypatch.setattr(kind, "minibatch", minibatch)


def times_in_pairs(monkeypatch):
    """t and 1 - t, for less variance: the weights of one row are those of another one swapped."""
    real = phases.draw_times
    monkeypatch.setattr(
        phases, "draw_times", lambda n, generator: torch.cat([half := real(n // 2, generator), 1 - half])
    )


GIVEN_Y = "the network is given y itself, expected (1 - t) x_0 + t y"
NOWHERE = "the network is given a point that is not there on any line from a source to a target"
INNOCENT = [written_as_a_step_from_the_source, paired_by_optimal_transport, times_in_pairs]
PROOFS = [
    *(
        Proof(
            partial(check, experiment=experiment, name="straight_flow"),
            plant={
                given_the_target: GIVEN_Y,
                weights_swapped: NOWHERE,
                begun_where_phase_1_ends: NOWHERE,
                told_the_time_of_another_row: NOWHERE,
                taught_the_way_that_is_left: "the network is taught another velocity than y - x_0",
            },
            innocent=INNOCENT,
        )
        for experiment in ("2d-8gaussians-moons", "digits")
    ),
    Proof(
        partial(check, experiment="2d-8gaussians-moons", name="ot_cfm"),
        plant={given_the_target: GIVEN_Y, begun_where_phase_1_ends: NOWHERE},
        innocent=[written_as_a_step_from_the_source],
    ),
    Proof(
        partial(check, experiment="digits", name="time_predictor"),
        plant={given_the_target: GIVEN_Y, weights_swapped: NOWHERE, begun_where_phase_1_ends: NOWHERE},
        innocent=INNOCENT,
    ),
]


def test_proof(case):
    case()
