"""What can only be seen on a CUDA device. `make test-gpu`."""

import json
from pathlib import Path

import pytest
import torch

from nsgf import geomloss_velocity, sinkhorn
from nsgf.phases import StraightFlow
from repro.method import find_project
from repro.run import execute, plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TINY = [
    "phases.*.iterations=6",
    "phases.*.pool.batches=1",
    "phases.*.pool.batch_size=16",
    "pace.checkpoint_every=2",
    "evaluation.test_points=32",
    "evaluation.floor_draws=1",
]


@pytest.fixture(scope="module")
def tiny():
    return plan(find_project(Path(__file__).parent), "2d-moons", TINY)


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


def test_a_run_on_the_device_is_resumed_to_the_same_bits(tiny, tmp_path):
    device = torch.device("cuda")
    whole = execute(tiny, 0, tmp_path / "whole", device, resume=False, resume_phase=None)
    calls = []
    original = StraightFlow.loss

    def killed(self, model, generator):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, model, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StraightFlow, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(tiny, 0, tmp_path / "killed", device, resume=False, resume_phase=None)
    resumed = execute(tiny, 0, tmp_path / "killed", device, resume=True, resume_phase=None)
    one, other = (json.loads((folder / "record.json").read_text()) for folder in (whole, resumed))
    assert one["metrics"] == other["metrics"] and one["curves"] == other["curves"]
    assert one["machine"]["device"] == torch.cuda.get_device_name()


def test_the_peak_of_a_phase_is_recorded(tiny, tmp_path):
    folder = execute(tiny, 0, tmp_path, torch.device("cuda"), resume=False, resume_phase=None)
    peaks = json.loads((folder / "record.json").read_text())["peak_device_mib"]
    assert set(peaks) == set(json.loads((folder / "record.json").read_text())["curves"]) and min(peaks.values()) > 0
