"""The table of devices, and how a name finds one."""

import pytest

from repro.errors import BadInput
from repro_tools.memory.devices import DEVICES, GIB, PRECISIONS, find


@pytest.mark.parametrize(
    "name, found",
    [
        ("T4", "T4"),
        ("tesla t4", "T4"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx-3060", "RTX 3060 12GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("a100 - 40", "A100-SXM-40GB"),
    ],
)
def test_a_device_is_found_however_its_name_is_written(name, found):
    assert find(name).name == found


@pytest.mark.parametrize(
    "name, close",
    [
        ("A100", "A100-PCIe-40GB, A100-SXM-40GB, A100-PCIe-80GB, A100-SXM-80GB"),
        ("h100", "H100-PCIe, H100-SXM"),
        ("RTX 3061", "RTX 3060 12GB, RTX 3090"),
    ],
)
def test_another_name_is_refused_with_those_that_come_close(name, close):
    with pytest.raises(BadInput) as refusal:
        find(name)
    assert str(refusal.value) == f"device: found '{name}', expected one of {close}"


def test_a_name_like_no_other_is_refused_with_all():
    with pytest.raises(BadInput, match="T4, P100, .*RTX 5090"):
        find("abacus")


def test_names_are_told_apart():
    names = [name for device in DEVICES for name in (device.name, *device.aliases)]
    assert all(find(name).name == device.name for device in DEVICES for name in (device.name, *device.aliases))
    assert len(names) == len(set(names))


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_figure_has_a_source_and_a_plausible_size(device):
    assert device.source.startswith("cited: NVIDIA")
    assert set(device.peak_flops) == set(PRECISIONS)
    assert 0.9 * device.memory_bytes < device.room_bytes <= device.memory_bytes
    peaks = [device.peak_flops[name] for name in PRECISIONS if device.peak_flops[name] is not None]
    assert peaks == sorted(peaks)  # float32 <= tf32 <= bf16 = fp16
    assert device.memory_bytes % GIB == 0


@pytest.mark.parametrize("name", ["T4", "P100", "V100-SXM2-16GB"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_precision_without_hardware_is_refused_in_one_line(name, precision):
    with pytest.raises(BadInput) as refusal:
        find(name).peak(precision)
    assert str(refusal.value) == f"precision: found {precision}, expected float32 or fp16 on {name}"


DENSE = {"A100-SXM-80GB": 312, "H100-SXM": 989.5, "H100-PCIe": 756.5, "L4": 121, "RTX 3090": 71, "RTX 4090": 165.2}


@pytest.mark.parametrize("name, tflops", DENSE.items())
def test_peaks_are_dense(name, tflops):
    """The sheets print twice that, with sparsity; for GeForce four times, with sums in fp16."""
    assert find(name).peak("bf16") == pytest.approx(tflops * 1e12)


def test_tensor_cores_of_a_generation_keep_their_ratios():
    """Planted: one figure with sparsity. On Ampere and later bf16 is twice tf32, in a dense row as in a sparse one."""
    for device in DEVICES:
        if device.peak_flops["tf32"] is not None:
            assert device.peak("bf16") / device.peak("tf32") == pytest.approx(2, rel=0.02), device.name
