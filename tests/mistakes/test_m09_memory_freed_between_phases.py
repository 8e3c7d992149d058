"""m09: memory kept across phases.

When a phase has ended, its pool, images, optimiser, averaged weights, graph and training network are gone at once, without waiting for the
garbage collector (which does not know how full a GPU is), while the phase itself is still there. What the next phase finds is one network, in
eval mode, without gradients.
"""

import weakref
from functools import partial

import pytest
import torch
from patches import change_finished_networks
from proof import Proof

from nsgf.laws import ImageLaws
from nsgf.phases import NSGFPhase, VelocityField, make_phases
from repro.config import Pace, load
from repro.loop import Loop, run_phase
from repro.runtime import Runtime
from repro.update import Update

CPU = Runtime(torch.device("cpu"))
COMMON = [
    "phases.*.iterations=3",
    "phases.*.batch_size=8",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=8",
    "phases.*.flow.steps=2",
]
TINY = {
    "2d-moons": [*COMMON, "phases.*.network.width=8", "phases.velocity_field_100=null", "phases.ot_cfm=null"],
    "digits": [*COMMON, "phases.*.ema_decay=0.5"],
}


def spied(phase, patch):
    """Weak references to what `phase` makes, by what it is. They are filled while it runs."""
    made = {}

    def spy(on, name, kinds):
        real = getattr(on, name)

        def method(*arguments):
            result = real(*arguments)
            given = (*arguments, result)
            made.update({kind: weakref.ref(find(given)) for kind, find in kinds.items() if kind not in made})
            return result

        patch.setattr(on, name, method)

    spy(phase, "make_model", {"training network": lambda given: given[-1]})
    spy(phase, "make_optimiser", {"optimiser": lambda given: given[-1]})
    spy(phase, "loss", {"graph": lambda given: given[-1]})
    spy(phase, "setup", {"averaged weights": lambda given: given[-1].average.module} if phase.options.ema_decay else {})
    if isinstance(phase, VelocityField):
        spy(phase, "collect", {"pool": lambda given: given[-1]["x_t"].untyped_storage()})
    if isinstance(phase.laws, ImageLaws):
        spy(phase, "minibatch", {"images": lambda _: phase.laws._stored.pixels})
    return made


def check(experiment, project, tmp_path):
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], TINY[experiment])
    for number, phase in enumerate(make_phases(config, CPU)):
        with pytest.MonkeyPatch.context() as patch:
            made = spied(phase, patch)
            result = run_phase(
                phase,
                folder=tmp_path / str(number),
                identity={},
                seed=0,
                runtime=CPU,
                pace=Pace(log_every=1, checkpoint_every=2),
                earlier={},
            )
        expected = {"training network", "optimiser", "graph"}
        expected |= {"pool"} if isinstance(phase, VelocityField) else set()
        expected |= {"images", "averaged weights"} if experiment == "digits" else set()
        assert set(made) == expected, f"{phase.name}: watched {sorted(made)}, expected {sorted(expected)}"
        alive = [kind for kind, reference in made.items() if reference() is not None]
        assert not alive, f"{phase.name} has ended, but still alive: {', '.join(alive)}"
        assert not any(module.training for module in result.networks.modules()), (
            f"{phase.name}: its network is handed on in training mode"
        )
        frozen = not any(p.requires_grad or p.grad is not None for p in result.networks.parameters())
        assert frozen, f"{phase.name}: its network is handed on with gradients"


def pool_kept(monkeypatch):
    """The phase keeps what it built."""
    real = VelocityField.collect

    def collect(self, *arguments):
        self.pool = real(self, *arguments)
        return self.pool

    monkeypatch.setattr(VelocityField, "collect", collect)


def optimiser_kept(monkeypatch):
    """The phase keeps its optimiser for later."""
    real = NSGFPhase.make_optimiser

    def make_optimiser(self, model):
        self.optimiser = real(self, model)
        return self.optimiser

    monkeypatch.setattr(NSGFPhase, "make_optimiser", make_optimiser)


def losses_kept(monkeypatch):
    """The losses are collected as tensors, each with its graph, to be plotted at the end."""
    real, losses = Update.backward, []
    monkeypatch.setattr(Update, "backward", lambda self, loss: real(self, losses.append(loss) or loss))


def images_kept(monkeypatch):
    monkeypatch.setattr(ImageLaws, "release", lambda self: None)


def average_kept(monkeypatch):
    """The averaged weights are kept for a figure."""
    real, kept = NSGFPhase.networks, []
    monkeypatch.setattr(NSGFPhase, "networks", lambda self, state: kept.append(state.average) or real(self, state))


def training_mode(monkeypatch):
    change_finished_networks(monkeypatch, lambda model: model.train())


def gradients(monkeypatch):
    change_finished_networks(monkeypatch, lambda model: model.requires_grad_(True))


def pool_kept_until_the_phase_ends(monkeypatch):
    pool_kept(monkeypatch)
    monkeypatch.setattr(VelocityField, "release", lambda self: delattr(self, "pool"))


def numbers_kept(monkeypatch):
    real, numbers = Loop.numbers, []
    monkeypatch.setattr(Loop, "numbers", lambda self: numbers.append(real(self)) or numbers[-1])


PROOFS = [
    Proof(
        partial(check, "2d-moons"),
        {
            pool_kept: "velocity_field has ended, but still alive: pool",
            optimiser_kept: "velocity_field has ended, but still alive: optimiser",
            losses_kept: "velocity_field has ended, but still alive: graph",
            training_mode: "velocity_field: its network is handed on in training mode",
            gradients: "velocity_field: its network is handed on with gradients",
        },
        [pool_kept_until_the_phase_ends, numbers_kept],
    ),
    Proof(
        partial(check, "digits"),
        {
            images_kept: "velocity_field has ended, but still alive: images",
            average_kept: "velocity_field has ended, but still alive: averaged weights",
        },
        [numbers_kept],
    ),
]


def test_proof(case):
    case()
