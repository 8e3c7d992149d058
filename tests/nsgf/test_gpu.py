"""What can only be seen on a CUDA device. `make test-gpu`."""

import json
from pathlib import Path

import pytest
import torch

from nsgf import geomloss_velocity, sinkhorn
from nsgf.phases import StraightFlow
from repro.method import find_project
from repro.run import execute, plan
from repro.runtime import Runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = Runtime(torch.device("cuda"))
TINY = [
    "phases.*.iterations=6",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=16",
    "pace.checkpoint_every=2",
    "evaluation.test_points=32",
    "evaluation.floor_draws=1",
]


TINY_IMAGES = [
    "phases.*.iterations=6",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=16",
    "pace.checkpoint_every=2",
    "nsgf_plus_plus.straight_flow_step=0.5",
    "evaluation.samples=8",
    "evaluation.euler_steps=[2]",
    "evaluation.nearest=2",
    "evaluation.pictures=2",
]


def tiny(experiment, *overrides):
    common = TINY if experiment.startswith("2d-") else TINY_IMAGES
    return plan(find_project(Path(__file__).parent), experiment, [*common, *overrides])


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


@pytest.mark.parametrize("shape", [(256, 2), (256, 784), (128, 3072)])
def test_the_velocity_on_the_device_is_that_of_the_cpu(shape):
    """In float64 the order of summation is all that differs."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = sinkhorn.velocity(x, y, blur=0.5, scaling=0.8)
    found = sinkhorn.velocity(x.cuda(), y.cuda(), blur=0.5, scaling=0.8).cpu()
    library = geomloss_velocity.velocity(x.cuda(), y.cuda(), blur=0.5, scaling=0.8, backend="tensorized").cpu()
    for other in (found, library):
        assert (other - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("2d-moons", []),
        *(("digits", [f"phases.*.precision={precision}"]) for precision in ("float32", "tf32", "bf16", "fp16")),
    ],
)
def test_a_run_on_the_device_is_resumed_to_the_same_bits(tmp_path, experiment, overrides):
    planned = tiny(experiment, *overrides)
    whole = execute(planned, 0, tmp_path / "whole", CUDA, resume=False, resume_phase=None)
    original = StraightFlow.minibatch

    def killed(self, step, generator):
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StraightFlow, "minibatch", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(planned, 0, tmp_path / "killed", CUDA, resume=False, resume_phase=None)
    resumed = execute(planned, 0, tmp_path / "killed", CUDA, resume=True, resume_phase=None)
    one, other = record_of(whole), record_of(resumed)
    assert one["metrics"] == other["metrics"] and one["curves"] == other["curves"]
    assert one["machine"]["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("experiment", ["2d-moons", "digits"])
def test_the_peak_of_every_phase_is_recorded(tmp_path, experiment):
    record = record_of(execute(tiny(experiment), 0, tmp_path, CUDA, resume=False, resume_phase=None))
    assert record["peak_device_mib"].keys() == record["curves"].keys()
    assert min(record["peak_device_mib"].values()) > 0
