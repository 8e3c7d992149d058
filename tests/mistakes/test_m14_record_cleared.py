"""m14: a trajectory record that is never cleared.

Every minibatch of the pool has states of its own, which start at that minibatch's draws and have the velocities towards its targets, however
the pool is kept: in memory, on the disk, or a part at a time.
"""

from functools import partial

import pytest
import torch
from pools import pool_of
from proof import Proof

from nsgf import phases, sample
from nsgf.laws import Laws
from nsgf.metrics import w2_squared
from nsgf.phases import VelocityField, make_phases
from repro.config import load
from repro.loop import Loop
from repro.randomness import generator
from repro.runtime import Runtime
from repro_tools.minibatch import draw

SEED, BATCHES, N, STEPS = 5, 4, 8, 3
WAYS = {
    "in memory": ("2d-moons", False, []),
    "on the disk": ("2d-moons", True, []),
    "a part at a time": ("mnist", True, ["phases.*.pool.resident_batches=2"]),
}
SETTINGS = [
    f"phases.*.pool.batches={BATCHES}", f"phases.*.pool.batch_size={N}", f"phases.velocity_field.flow.steps={STEPS}",
    "phases.velocity_field.iterations=3", "phases.*.batch_size=4", "sinkhorn.scaling=0.5",
]  # fmt: skip


class Noting(Laws):
    """The same points, and a note of what was drawn."""

    def __init__(self, laws):
        self.laws, self.shape, self.drawn = laws, laws.shape, []

    def draw(self, n, generator):
        self.drawn.append(self.laws.draw(n, generator))
        return self.drawn[-1]


def phase_1(project, way):
    experiment, _, more = WAYS[way]
    config = load(project.config_class(experiment), project.experiments()[experiment], [*SETTINGS, *more])[0]
    phase = make_phases(config, Runtime(torch.device("cpu"), stand_in_data=True))[0]
    phase.laws = Noting(phase.laws)
    return phase


def starts_of(phase, folder):
    """Points at time 0 and their velocities, (n, d) each, of every minibatch that the pool ever holds."""
    phase.prepare(SEED, folder, {})
    loop = Loop(phase, seed=SEED, runtime=phase.runtime, earlier={}, folder=folder)
    for loop.step in range(phase.iterations):
        loop.collect_if_due()
        columns = [loop.round.rows[name].split(phase.entries_of_batch) for name in ("x_t", "v_t", "t")]
        for x, v, t in zip(*columns, strict=True):
            yield x[t == 0].flatten(1).clone(), v[t == 0].flatten(1).clone()


def points(x):
    return frozenset(map(tuple, x.flatten(1).tolist()))


def check(project, tmp_path, way):
    phase = phase_1(project, way)
    starts = {points(x): (x, v) for x, v in starts_of(phase, tmp_path if WAYS[way][1] else None)}
    assert len(starts) == BATCHES, f"pool kept {way}: found {len(starts)} different minibatches, expected {BATCHES}"
    targets = {points(x_0): y.flatten(1) for x_0, y in phase.laws.drawn}
    for start, (x, v) in starts.items():
        assert start in targets, f"pool kept {way}: a minibatch starts where none was drawn"
        off = float((v - phase.velocity(x, targets[start])).abs().max())
        assert off < 1e-4, f"pool kept {way}: a minibatch has velocities of another one, off by {off:.2g}"


def recording(monkeypatch, chosen):
    """Trajectories go into a list, as they pass; `chosen` says which rows of it the pool is given. Its arguments: all, new."""
    real, record = VelocityField.trajectory, []

    def trajectory(self, batch):
        new = list(real(self, batch))
        record.extend(new)
        return iter(chosen(record, new))

    monkeypatch.setattr(VelocityField, "trajectory", trajectory)


def never_cleared(monkeypatch):
    """As in the authors' 2-D code: entries 0 to T - 1 of the list are always the first minibatch's."""
    recording(monkeypatch, lambda record, new: record[:STEPS])


def velocities_never_cleared(monkeypatch):
    """One list of two."""
    first = lambda record, new: [own | {"v_t": old["v_t"]} for own, old in zip(new, record, strict=False)]  # noqa: E731
    recording(monkeypatch, first)


def seeded_in_the_loop(monkeypatch):
    """The same from another cause: each minibatch draws from a generator that knows nothing of its number."""
    monkeypatch.setattr(phases, "generator", lambda *parts: generator(*parts[:-1]))


def cleared_for_each_minibatch(monkeypatch):
    def chosen(record, new):
        record[:] = new
        return list(record)

    recording(monkeypatch, chosen)


def the_last_of_a_growing_list(monkeypatch):
    """Never cleared either, but read from its end."""
    recording(monkeypatch, lambda record, new: record[-STEPS:])


def in_another_order(monkeypatch):
    real = VelocityField.trajectory
    monkeypatch.setattr(VelocityField, "trajectory", lambda self, batch: real(self, BATCHES - 1 - batch))


def seeded_otherwise(monkeypatch):
    monkeypatch.setattr(phases, "generator", lambda *parts: generator("other", *parts))


PROOFS = [
    Proof(
        partial(check, way=way),
        plant={
            never_cleared: f"pool kept {way}: found 1 different minibatches, expected 4",
            velocities_never_cleared: f"pool kept {way}: a minibatch has velocities of another one",
            seeded_in_the_loop: f"pool kept {way}: found 1 different minibatches, expected 4",
        },
        innocent=[cleared_for_each_minibatch, the_last_of_a_growing_list, in_another_order, seeded_otherwise],
    )
    for way in WAYS
]


def test_proof(case):
    case()


def trained(phase, seed, steps=400, last=50):
    """The mean of the last training losses, and W2 from the samples to new points of the target."""
    torch.manual_seed(seed)
    model, pool, losses = phase.make_model(), pool_of(phase, seed), []
    weights = list(model.parameters())
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        loss = phase.loss(model, draw(phase, step, seed, pool))
        for weight, momentum, gradient in zip(weights, momenta, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.02 * momentum.mul_(0.9).add_(gradient)
        losses.append(loss.item())
    x_0, y = phase.laws.draw(256, generator(seed, "test"))
    setting = phase.config.flow
    with torch.no_grad():
        end = sample.sinkhorn_flow(model, x_0, steps=setting.steps, horizon=setting.steps * setting.step_size)[-1]
    return sum(losses[-last:]) / last, w2_squared(end, y) ** 0.5


def test_the_training_loss_is_better_for_it(project, monkeypatch):
    """One minibatch is learned more easily than twenty, and the samples are further from the target."""
    sizes = {"pool.batches": 20, "pool.batch_size": 32, "batch_size": 64, "network.width": 64}
    settings = [*(f"phases.*.{name}={value}" for name, value in sizes.items()), "sinkhorn.scaling=0.5"]
    config = load(project.config_class("2d-8gaussians"), project.experiments()["2d-8gaussians"], settings)[0]
    phase = make_phases(config, Runtime(torch.device("cpu")))[0]
    loss, distance = trained(phase, seed=0)
    recording(monkeypatch, lambda record, new: record[: len(new)])
    planted_loss, planted_distance = trained(phase, seed=0)
    assert planted_loss < loss / 3 and planted_distance > 1.3 * distance


def test_a_pool_refuses_the_whole_list(project, monkeypatch):
    """The other half of the mistake has a message: a list handed over whole is longer at every minibatch."""
    recording(monkeypatch, lambda record, new: record)
    with pytest.raises(ValueError, match=r"^rows: found 104, expected at most 96$"):
        pool_of(phase_1(project, "in memory"), SEED)
