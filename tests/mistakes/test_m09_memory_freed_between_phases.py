"""m09: memory kept across phases.

When a phase has ended, its pool, images, optimiser, averaged weights, graph and training network are gone at once, without waiting for the
garbage collector (which does not know how full a GPU is), while the phase itself is still there. What the next phase finds is one network, in
eval mode, without gradients.
"""

import weakref

import pytest
import torch

from nsgf.laws import ImageLaws
from nsgf.phases import NSGFPhase, VelocityField, make_phases
from repro import phases
from repro.config import Pace
from repro.phases import Stepper, run_phase
from repro.run import plan
from repro.runtime import Runtime

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
    spy(Stepper, "__init__", {"averaged weights": lambda given: given[0].result} if phase.options.ema_decay else {})
    if isinstance(phase, VelocityField):
        spy(phase, "prepare", {"pool": lambda _: phase.pool._rows})
    if isinstance(phase.laws, ImageLaws):
        spy(phase, "minibatch", {"images": lambda _: phase.laws._stored.pixels})
    return made


def check(project, folder, experiment="2d-moons"):
    for number, phase in enumerate(make_phases(plan(project, experiment, TINY[experiment]).config, CPU)):
        with pytest.MonkeyPatch.context() as patch:
            made = spied(phase, patch)
            result = run_phase(
                phase,
                folder=folder / experiment / str(number),
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
    real, losses = Stepper.step, []
    monkeypatch.setattr(Stepper, "step", lambda self, loss, number: real(self, losses.append(loss) or loss, number))


def plant_images_kept(monkeypatch):
    monkeypatch.setattr(ImageLaws, "release", lambda self: None)


def plant_average_kept(monkeypatch):
    """The averaged weights are kept for a figure."""
    real, kept = Stepper.state_dict, []
    monkeypatch.setattr(Stepper, "state_dict", lambda self: kept.append(self.result) or real(self))


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


@pytest.mark.parametrize("experiment", TINY)
def test_holds(project, tmp_path, experiment):
    check(project, tmp_path, experiment)


@pytest.mark.parametrize("variant", innocent)
def test_silent_on(proof, project, tmp_path, variant):
    proof.silent(lambda: check(project, tmp_path), variant)


@pytest.mark.parametrize(
    ("plant", "experiment", "reason"),
    [
        (plant_pool_kept, "2d-moons", "velocity_field has ended, but still alive: pool"),
        (plant_optimiser_kept, "2d-moons", "velocity_field has ended, but still alive: optimiser"),
        (plant_losses_kept, "2d-moons", "velocity_field has ended, but still alive: graph"),
        (plant_images_kept, "digits", "velocity_field has ended, but still alive: images"),
        (plant_average_kept, "digits", "velocity_field has ended, but still alive: averaged weights"),
        (plant_training_mode, "2d-moons", "velocity_field: its network is handed on in training mode"),
        (plant_gradients, "2d-moons", "velocity_field: its network is handed on with gradients"),
    ],
)
def test_catches(proof, project, tmp_path, plant, experiment, reason):
    proof.caught(lambda: check(project, tmp_path, experiment), plant, reason)
