"""m16: training and sampling on different time scales.

When samples are drawn, a network is asked only for times that it was trained at, and where its training was at that time.
"""

from functools import partial

import torch
from pools import pool_of
from proof import Proof
from torch import nn

from nsgf import evaluate_images, evaluate_points, phases, sample
from nsgf.flow import FlowState
from nsgf.laws import Laws
from repro.config import load
from repro.runtime import Runtime
from repro_tools.minibatch import draw

CPU = torch.device("cpu")
SETTINGS = ["phases.*.pool.batches=1", "phases.*.pool.batch_size=1", "phases.*.batch_size=1024", "nsgf_plus_plus.sinkhorn_steps=3"]  # fmt: skip
OF_EXPERIMENT = {
    "2d-moons": [
        "phases.velocity_field.flow.step_size=0.1",
        "phases.velocity_field_100.flow.step_size=0.01",
        "phases.ot_cfm=null",
    ],
    "digits": ["phases.velocity_field.flow.step_size=0.1", "evaluation.handover_times=[0.3]"],
}
NEAR = 0.005  # the gap between 1,024 random times is below


class FromZeroToOne(Laws):
    """All sources at 0, all targets at 1: with velocity 1 the place of a particle says how far it has come."""

    def __init__(self, shape):
        self.shape = shape

    def draw(self, n, generator):
        return torch.zeros(n, *self.shape), torch.ones(n, *self.shape)


class Field(nn.Module):
    """Moves with velocity 1, and notes the times and places that it is asked for."""

    def __init__(self):
        super().__init__()
        self.trained, self.asked = None, []

    def learn(self, phase, batch):
        phase.loss(self, batch)
        self.trained, self.asked = self.asked[0], []

    def forward(self, x, t):
        self.asked.append(torch.stack([t, x.flatten(1)[:, 0]], dim=1))
        return torch.ones_like(x)


class Predictor(nn.Module):
    """Gives the time that its training had at the nearest place."""

    def learn(self, phase, batch):
        places, times = [], torch.zeros(len(batch["t"]), requires_grad=True)
        phase.loss(lambda x: places.append(x) or times, batch).backward()
        self.places = places[0].flatten(1)[:, 0]
        self.times = -times.grad * len(times) / 2  # the gradient of the mean square at 0 is -2 target / n

    def forward(self, x):
        return self.times[(x.flatten(1)[:, :1] - self.places).abs().argmin(1)]


def check(project, experiment):
    """Each phase teaches its network with a minibatch; then the evaluation asks the networks."""
    settings = [*SETTINGS, *OF_EXPERIMENT[experiment]]
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], settings)
    networks = {}
    for phase in phases.make_phases(config, Runtime(CPU)):
        if phase.name == "feature_classifier":
            continue
        phase.laws, phase.velocity = FromZeroToOne(phase.laws.shape), lambda x, y: y
        networks[phase.name] = Predictor() if phase.name == "time_predictor" else Field()
        networks[phase.name].learn(phase, draw(phase, 0, 0, pool_of(phase, 0)))
    if experiment == "digits":
        evaluate_images.generate(config, networks, torch.zeros(2, 1, 8, 8), 16, CPU)
    else:
        evaluate_points._paths(config, networks, torch.zeros(2, 2))
        evaluate_points._plus_plus(config, networks, torch.zeros(2, 2))
    for name, network in networks.items():
        if isinstance(network, Field):
            check_asked(name, network.trained.unique(dim=0), torch.cat(network.asked).unique(dim=0))


def check_asked(name, trained, asked):
    """Rows of time and place, in the order of time."""
    first, last = trained[0, 0], trained[-1, 0]
    gaps = (asked[:, None] - trained).abs() / torch.stack([last - first, torch.tensor(1.0)])
    for (time, place), gap in zip(asked, gaps, strict=True):
        at = trained[gap[:, 0].argmin()]
        assert gap[:, 0].min() < NEAR, (
            f"{name}: asked at time {time:.3g}, trained from {first:.1g} to {last:.1g}, nearest {at[0]:.3g}"
        )
        assert gap.amax(1).min() < NEAR, (
            f"{name}: asked at place {place:.2f} at time {time:.3g}, trained at place {at[1]:.2f}"
        )


def straight_times_shifted_and_scaled(monkeypatch):
    """As in the authors' code: s + 1, and then times the step size 0.2."""
    real = phases.StraightFlow.loss
    loss = lambda self, model, batch: real(self, lambda x, t: model(x, 0.2 * (t + 1)), batch)  # noqa: E731
    monkeypatch.setattr(phases.StraightFlow, "loss", loss)


def index_in_the_pool(monkeypatch):
    """Training has the number of the step, sampling the fraction."""
    real = phases.euler_flow

    def euler_flow(*points, steps, **rest):
        for state in real(*points, steps=steps, **rest):
            yield FlowState(state.x_t, state.v_t, state.t * steps)

    monkeypatch.setattr(phases, "euler_flow", euler_flow)


def sampled_at_time_one(monkeypatch):
    """As in the authors' 2-D evaluators."""
    real = sample.sinkhorn_flow
    flow = lambda model, *x_0, **rest: real(lambda x, t: model(x, torch.ones_like(t)), *x_0, **rest)  # noqa: E731
    monkeypatch.setattr(sample, "sinkhorn_flow", flow)


def divided_by_the_steps_that_are_taken(monkeypatch):
    """Algorithm 4 stops after 3 of T steps, and counts its time by 3."""
    real = sample.nsgf_plus_plus
    monkeypatch.setattr(
        sample, "nsgf_plus_plus", lambda *all, **rest: real(*all, **rest | {"flow_steps": rest["sinkhorn_steps"]})
    )


def clock_starts_at_the_hand_over(monkeypatch):
    """The straight flow goes on from the predicted time, but is told the time since then."""
    real = sample.refine_step
    monkeypatch.setattr(
        sample,
        "refine_step",
        lambda model, x, t, size, k, *, moving: real(
            lambda x, s: model(x, s - t[moving]), x, t, size, k, moving=moving
        ),
    )


def time_that_is_left(monkeypatch):
    """The predictor learns 1 - t."""
    real = phases.TimePredictor.loss

    def loss(self, model, batch):
        return real(self, lambda x: 1 - model(x), batch)

    monkeypatch.setattr(phases.TimePredictor, "loss", loss)


def _told(monkeypatch, told):
    """The networks are told another time, in training and in sampling alike."""
    by = lambda model: lambda x, t: model(x, told(t))  # noqa: E731
    for kind in (phases.VelocityField, phases.StraightFlow):
        monkeypatch.setattr(kind, "loss", lambda self, model, batch, real=kind.loss: real(self, by(model), batch))
    for name in (
        "_euler_states",
        "refine_step",
        "nsgf_plus_plus",
    ):  # the last passes its straight flow on to refine_step
        real = getattr(sample, name)
        monkeypatch.setattr(sample, name, lambda model, *rest, real=real, **named: real(by(model), *rest, **named))


def thousandths_on_both_sides(monkeypatch):
    _told(monkeypatch, lambda t: 1000 * t)


def time_to_go_on_both_sides(monkeypatch):
    _told(monkeypatch, lambda t: 1 - t)


def times_of_a_grid(monkeypatch):
    """The sampler takes its times from a grid of steps + 1 points, and leaves the last one out."""

    def states(model, x_0, *, steps, step_size):
        x = x_0
        for t in torch.linspace(0, 1, steps + 1)[:-1]:
            x = x + step_size * model(x, t.expand(len(x)))
            yield x

    monkeypatch.setattr(sample, "_euler_states", states)


def one_time_in_each_of_n_parts(monkeypatch):
    monkeypatch.setattr(
        phases, "draw_times", lambda n, generator: (torch.arange(n) + torch.rand(n, generator=generator)) / n
    )


PROOFS = [
    Proof(
        partial(check, experiment="2d-moons"),
        plant={
            straight_times_shifted_and_scaled: "straight_flow: asked at time 0, trained from 0.2 to 0.4",
            index_in_the_pool: "velocity_field: asked at time 0.1, trained from 0 to 9",
            sampled_at_time_one: "velocity_field: asked at time 1, trained from 0 to 0.9",
            divided_by_the_steps_that_are_taken: "velocity_field: asked at time 0.333, trained from 0 to 0.9, nearest 0.3",
            clock_starts_at_the_hand_over: "straight_flow: asked at place 0.30 at time 0, trained at place 0.00",
            time_that_is_left: "straight_flow: asked at place 0.30 at time 0.7, trained at place 0.70",
        },
        innocent=[thousandths_on_both_sides, time_to_go_on_both_sides, times_of_a_grid, one_time_in_each_of_n_parts],
    ),
    Proof(
        partial(check, experiment="digits"),
        plant={
            straight_times_shifted_and_scaled: "straight_flow: asked at time 0, trained from 0.2 to 0.4",
            divided_by_the_steps_that_are_taken: "velocity_field: asked at time 0.333, trained from 0 to 0.8, nearest 0.4",
        },
        innocent=[thousandths_on_both_sides],
    ),
]


def test_proof(case):
    case()
