"""m09: memory kept across phases.

When a phase has ended, its pool, optimiser, graph and training network are gone at once, without waiting for the garbage collector (which does
not know how full a GPU is), while the phase itself is still there. What the next phase finds is one network, in eval mode, without gradients.
"""

import weakref

import pytest
import torch

from nsgf.config import Config
from nsgf.phases import NSGFPhase, VelocityField, make_phases
from repro import phases
from repro.config import Pace, load
from repro.phases import run_phase

TINY = [
    "phases.*.iterations=3",
    "phases.*.batch_size=8",
    "phases.*.network.width=8",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=8",
    "phases.*.flow.steps=2",
    "phases.velocity_field_100=null",
    "phases.ot_cfm=null",
]


def spied(phase):
    """Weak references to what `phase` makes, by what it is. They are filled while it runs."""
    made = {}

    def spy(name, kinds):
        real = getattr(phase, name)

        def method(*arguments):
            result = real(*arguments)
            made.update({kind: weakref.ref(find(result)) for kind, find in kinds.items() if kind not in made})
            return result

        setattr(phase, name, method)

    spy("make_model", {"training network": lambda model: model})
    spy("make_optimiser", {"optimiser": lambda optimiser: optimiser})
    spy("loss", {"graph": lambda loss: loss})
    if isinstance(phase, VelocityField):
        spy(
            "prepare",
            {"pool": lambda _: phase.pool._rows},
        )
    return made


def check(project, folder):
    config, _ = load(Config, project.experiments()["2d-moons"], TINY)
    every = make_phases(config, torch.device("cpu"))
    for number, phase in enumerate(every):
        made = spied(phase)
        result = run_phase(
            phase,
            folder=folder / str(number),
            identity={},
            seed=0,
            device=torch.device("cpu"),
            pace=Pace(log_every=1, checkpoint_every=2),
            earlier={},
        )
        expected = 4 if isinstance(phase, VelocityField) else 3
        assert len(made) == expected, f"{phase.name}: watched only {list(made)}"
        alive = [kind for kind, reference in made.items() if reference() is not None]
        assert not alive, f"{phase.name} has ended, but still alive: {', '.join(alive)}"
        assert not any(module.training for module in result.model.modules()), (
            f"{phase.name}: its network is handed on in training mode"
        )
        frozen = not any(p.requires_grad or p.grad is not None for p in result.model.parameters())
        assert frozen, f"{phase.name}: its network is handed on with gradients"


def plant_pool_kept(monkeypatch):
    monkeypatch.setattr(VelocityField, "release", lambda self: None)


def plant_optimiser_kept(monkeypatch):
    """The phase keeps its optimiser for later."""
    real = NSGFPhase.make_optimiser

    def make_optimiser(self, model):
        self.optimiser = real(self, model)
        return self.optimiser

    monkeypatch.setattr(NSGFPhase, "make_optimiser", make_optimiser)


def plant_losses_kept(monkeypatch):
    """The losses are collected as tensors, each with its graph, to be plotted at the end."""
    real = phases._finite
    losses = []
    monkeypatch.setattr(phases, "_finite", lambda loss, *rest: real(losses.append(loss) or loss, *rest))


def handed_on(monkeypatch, change):
    real = phases._load_finished

    def load_finished(*arguments):
        result = real(*arguments)
        change(result.model)
        return result

    monkeypatch.setattr(phases, "_load_finished", load_finished)


def plant_training_mode(monkeypatch):
    handed_on(monkeypatch, lambda model: model.train())


def plant_gradients(monkeypatch):
    handed_on(monkeypatch, lambda model: model.requires_grad_(True))


def _innocent_attribute_deleted(monkeypatch):
    monkeypatch.setattr(VelocityField, "release", lambda self: delattr(self, "pool"))


def _innocent_numbers_kept(monkeypatch):
    real, losses = phases._finite, []
    monkeypatch.setattr(phases, "_finite", lambda loss, *rest: losses.append(real(loss, *rest)) or losses[-1])


innocent = [_innocent_attribute_deleted, _innocent_numbers_kept]


def test_holds(project, tmp_path):
    check(project, tmp_path)


@pytest.mark.parametrize("variant", innocent)
def test_silent_on(proof, project, tmp_path, variant):
    proof.silent(lambda: check(project, tmp_path), variant)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (plant_pool_kept, "velocity_field has ended, but still alive: pool"),
        (plant_optimiser_kept, "velocity_field has ended, but still alive: optimiser"),
        (plant_losses_kept, "velocity_field has ended, but still alive: graph"),
        (plant_training_mode, "velocity_field: its network is handed on in training mode"),
        (plant_gradients, "velocity_field: its network is handed on with gradients"),
    ],
)
def test_catches(proof, project, tmp_path, plant, reason):
    proof.caught(lambda: check(project, tmp_path), plant, reason)
