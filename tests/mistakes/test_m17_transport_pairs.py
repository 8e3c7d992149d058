"""m17: transport pairs drawn with replacement and mispaired.

Row k of an OT-CFM minibatch is a source point and its own partner in the optimal assignment, for points and for images.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import ot
import torch
from proof import Proof

from nsgf import phases
from nsgf.laws import Laws
from nsgf.phases import StraightFlow, draw_times, make_phases
from repro.config import load
from repro.randomness import generator
from repro.runtime import Runtime

N = 50  # of the authors' minibatches
SHIFT = 2.0
COUPLED = {"2d-moons": "ot_cfm", "mnist": "straight_flow"}


@dataclass(frozen=True)
class Moved(Laws):
    """Source points, and each of them moved by SHIFT, in an order of their own: the partner of a point is its image."""

    shape: tuple[int, ...]

    def draw(self, n, generator):
        x_0 = torch.randn(n, *self.shape, generator=generator)
        return x_0, (x_0 + SHIFT)[torch.randperm(n, generator=generator)]


def coupled_phase(project, experiment):
    settings = [f"phases.*.batch_size={N}", "phases.*.coupling=optimal_transport"]
    config = load(project.config_class(experiment), project.experiments()[experiment], settings)[0]
    (phase,) = (p for p in make_phases(config, Runtime(torch.device("cpu"))) if p.name == COUPLED[experiment])
    return phase


def share_of_partners(phase, minibatches=4):
    right = []
    for step in range(minibatches):
        batch = phase.minibatch(step, generator("pairs", step))
        right.append((batch["y"] - batch["x_0"] - SHIFT).flatten(1).abs().amax(1) < 1e-3)
    return float(torch.cat(right).float().mean())


def cost(x_0, y):
    return float((y - x_0).square().sum(1).double().mean())


def check_partners(project, experiment):
    phase = coupled_phase(project, experiment)
    phase.laws = Moved(phase.laws.shape)
    found = share_of_partners(phase)
    assert found == 1.0, f"{experiment}: only {found:.0%} of the rows are a point and its partner"


def check_cost(project):
    """Of the laws of the paper, where partners are not known: the rows cost as little as the plan of another solver."""
    batch = coupled_phase(project, "2d-moons").minibatch(0, generator("cost"))
    x_0, y = batch["x_0"], batch["y"]
    times = cost(x_0, y) / ot.emd2([], [], ot.dist(x_0.double().numpy(), y.double().numpy()))
    assert times < 1.001, f"the rows of a minibatch cost {times:.1f} times as much as the best pairs"


def sample_plan(x_0, y, replace):
    """Indices of n pairs drawn from the optimal plan, in the order of their source points."""
    plan = ot.emd([], [], ot.dist(x_0.flatten(1).double().numpy(), y.flatten(1).double().numpy())).flatten()
    stream = np.random.default_rng(x_0.flatten()[:2].numpy().view(np.uint32))  # another one for each minibatch
    drawn = stream.choice(len(plan), p=plan / plan.sum(), size=len(x_0), replace=replace)
    pairs = np.divmod(np.sort(drawn), len(y))
    return tuple(map(torch.from_numpy, pairs))


def half_of_the_pairs(monkeypatch):
    """As the authors do: of the drawn pairs only the targets are kept, beside the source points as they were."""
    monkeypatch.setattr(phases, "optimal_assignment", lambda x_0, y: sample_plan(x_0, y, replace=True)[1])


def inverse_order(monkeypatch):
    """The place of each target among the source points, taken for the target of each source point."""
    real = phases.optimal_assignment
    monkeypatch.setattr(phases, "optimal_assignment", lambda x_0, y: real(x_0, y).argsort())


def shuffled_afterwards(monkeypatch):
    """A shuffle that takes one column of the pairs along."""
    real = StraightFlow.minibatch

    def minibatch(self, step, generator):
        batch = real(self, step, generator)
        return batch | {"y": batch["y"][torch.randperm(len(batch["y"]), generator=generator)]}

    monkeypatch.setattr(StraightFlow, "minibatch", minibatch)


def half_of_the_pairs_without_replacement(monkeypatch):
    """Here the order of the source points is 0, 1, ..., n - 1 again, and the targets alone are enough."""
    monkeypatch.setattr(phases, "optimal_assignment", lambda x_0, y: sample_plan(x_0, y, replace=False)[1])


def whole_pairs_with_replacement(monkeypatch):
    """As torchcfm does: some points come twice and others not at all, but those that come have their partners."""

    def minibatch(self, step, generator):
        x_0, y = self.laws.draw(self.config.batch_size, generator)
        i, j = sample_plan(x_0, y, replace=True)
        return {"x_0": x_0[i], "y": y[j], "t": draw_times(len(x_0), generator)}

    monkeypatch.setattr(StraightFlow, "minibatch", minibatch)


def shuffled_whole(monkeypatch):
    real = StraightFlow.minibatch

    def minibatch(self, step, generator):
        batch = real(self, step, generator)
        order = torch.randperm(len(batch["y"]), generator=generator)
        return batch | {"x_0": batch["x_0"][order], "y": batch["y"][order]}

    monkeypatch.setattr(StraightFlow, "minibatch", minibatch)


RIGHT = [half_of_the_pairs_without_replacement, whole_pairs_with_replacement, shuffled_whole]
PROOFS = [
    *(
        Proof(
            partial(check_partners, experiment=experiment),
            plant=dict.fromkeys([half_of_the_pairs, inverse_order, shuffled_afterwards], f"{experiment}: only "),
            innocent=RIGHT,
        )
        for experiment in COUPLED
    ),
    Proof(
        check_cost,
        plant=dict.fromkeys([half_of_the_pairs, inverse_order, shuffled_afterwards], "the rows of a minibatch cost "),
        innocent=RIGHT,
    ),
]


def test_proof(case):
    case()


def test_how_much_is_lost(project, monkeypatch):
    """At n = 50 a sixth of the rows keep their partner, and with them a sixth of what the coupling saves."""
    phase, steps = coupled_phase(project, "2d-moons"), range(20)
    rows = lambda: [(batch["x_0"], batch["y"]) for batch in (phase.minibatch(k, generator(k)) for k in steps)]  # noqa: E731
    mean_cost = lambda pairs: sum(cost(*pair) for pair in pairs) / len(steps)  # noqa: E731
    best, independent = mean_cost(rows()), mean_cost([phase.laws.draw(N, generator(k)) for k in steps])
    half_of_the_pairs(monkeypatch)
    planted = mean_cost(rows())
    assert 0.1 < (independent - planted) / (independent - best) < 0.25
    phase.laws = Moved((2,))
    assert 0.14 < share_of_partners(phase, 40) < 0.2
