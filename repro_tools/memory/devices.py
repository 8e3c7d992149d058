"""What the makers say of devices that one may not have at hand: memory, bandwidth, arithmetic.

Dense figures: the sheets of Ampere and later GPUs print twice that, for matrices of which half the numbers are zero, and no network
is. Tensor cores with sums in float32, as PyTorch uses them. A peak is what no program reaches; `repro_tools.memory.cost` says which share of it one may expect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from repro.errors import BadInput

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
GIB, GB, TERA = 2**30, 10**9, 10**12

HERE = "this"
"""What a spec and --on call the machine at hand, with or without a GPU."""


@dataclass(frozen=True)
class Device:
    """A device by its data sheet.

    memory_bytes: of the whole device. usable_bytes: what PyTorch reports as its capacity (the driver, and error correction on GDDR
    memory, keep the rest), None where that is not known. bandwidth_bytes_s: between the device's memory and its processors.
    peak_flops: of matrix products, operations a second by precision, dense; None where the device has no hardware for it.
    source: whose figures these are. unsure: what to know before trusting them; empty when there is nothing.
    """

    name: str
    memory_bytes: int
    usable_bytes: int | None
    bandwidth_bytes_s: float
    peak_flops: Mapping[str, float | None]
    source: str
    unsure: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def room_bytes(self) -> int:
        """What a process can use at most: `usable_bytes` where it is known, else `memory_bytes`."""
        return self.memory_bytes if self.usable_bytes is None else self.usable_bytes

    def peak(self, precision: str) -> float:
        """Operations a second of matrix products in `precision`. Raises BadInput where there is no hardware for it."""
        found = self.peak_flops.get(precision)
        if found is None:
            able = [name for name in PRECISIONS if self.peak_flops.get(name) is not None]
            raise BadInput(f"precision: found {precision}, expected {' or '.join(able)} on {self.name}")
        return found


def find(name: str) -> Device:
    """The device of that name, whatever its case, spaces and hyphens; also by the name that the driver gives it.

    Raises BadInput with the names that come close, and for a name that several devices share (A100, H100).
    """
    asked = _key(name)
    for device in DEVICES:
        if asked in {_key(one) for one in (device.name, *device.aliases)}:
            return device
    known = {device.name: _key(device.name) for device in DEVICES}
    inside = [one for one, key in known.items() if len(asked) > 1 and asked in key]
    near = get_close_matches(asked, known.values(), n=3, cutoff=0.5)
    close = inside or [one for one, key in known.items() if key in near]
    raise BadInput(
        f"device: found '{name}', expected {'one of ' if len(close or known) > 1 else ''}{', '.join(close or known)}"
    )


def called(name: str) -> str:
    """A device's name as a sentence has it."""
    return "the machine at hand" if name == HERE else name


def _key(name: str) -> str:
    """The name without what people write differently: case, spaces, hyphens, the maker and its brands."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla|rtx", "", name.lower()))


def _device(
    name: str,
    gib: float,
    usable_gib: float | None,
    gb_s: float,
    tflops: tuple[float, float | None, float | None, float | None],
    source: str,
    unsure: str = "",
    aliases: tuple[str, ...] = (),
) -> Device:
    """A row of the table below: memory in GiB, bandwidth in GB/s, peaks in Tflop/s in the order of PRECISIONS."""
    peaks = {
        precision: None if peak is None else peak * TERA for precision, peak in zip(PRECISIONS, tflops, strict=True)
    }
    usable = None if usable_gib is None else round(usable_gib * GIB)
    return Device(name, round(gib * GIB), usable, gb_s * GB, peaks, source, unsure, aliases)


_HALVED = "the sheet prints the figures with sparsity, twice these"
_COOL = "a card of 70 W: it lowers its clock under load and then stays well below its peak"
_DERIVED = "tensor figures derived: the sheet gives none with sums in float32; half of those with sums in fp16, as on the RTX 3090"

DEVICES: tuple[Device, ...] = (
    _device("T4", 16, 14.74, 320, (8.1, None, None, 65), "cited: NVIDIA T4 datasheet", _COOL, ("T4 16GB",)),
    _device("P100", 16, 15.89, 732, (9.3, None, None, 18.7), "cited: NVIDIA Tesla P100 datasheet (PCIe, 16 GB)",
            "no tensor cores: fp16 products that add up in float32 may run no faster than float32", ("P100-PCIE-16GB", "P100 16GB")),
    _device("V100-PCIe-16GB", 16, 15.77, 900, (14, None, None, 112), "cited: NVIDIA V100 datasheet", "", ("V100",)),
    _device("V100-SXM2-16GB", 16, 15.77, 900, (15.7, None, None, 125), "cited: NVIDIA V100 datasheet", "", ("V100-SXM2", "V100 SXM")),
    _device("V100-SXM2-32GB", 32, 31.73, 900, (15.7, None, None, 125), "cited: NVIDIA V100 datasheet", "", ("V100 32GB",)),
    _device("L4", 24, 22.15, 300, (30.3, 60, 121, 121), "cited: NVIDIA L4 datasheet", f"{_HALVED}; {_COOL}", ("L4 24GB",)),
    _device("A10", 24, None, 600, (31.2, 62.5, 125, 125), "cited: NVIDIA A10 datasheet", "", ("A10 24GB",)),
    _device("A100-PCIe-40GB", 40, 39.4, 1555, (19.5, 156, 312, 312), "cited: NVIDIA A100 datasheet", "", ("A100-40-PCIe",)),
    _device("A100-SXM-40GB", 40, 39.4, 1555, (19.5, 156, 312, 312), "cited: NVIDIA A100 datasheet", "",
            ("A100-SXM4-40GB", "A100-40", "A100 40GB", "A100-40-SXM")),
    _device("A100-PCIe-80GB", 80, 79.15, 1935, (19.5, 156, 312, 312), "cited: NVIDIA A100 datasheet", "", ("A100 80GB PCIe", "A100-80-PCIe")),
    _device("A100-SXM-80GB", 80, 79.15, 2039, (19.5, 156, 312, 312), "cited: NVIDIA A100 datasheet", "",
            ("A100-SXM4-80GB", "A100-80", "A100 80GB", "A100-80-SXM")),
    _device("H100-PCIe", 80, 79.2, 2000, (51, 378, 756.5, 756.5), "cited: NVIDIA H100 datasheet", _HALVED, ("H100 PCIe 80GB",)),
    _device("H100-SXM", 80, 79.2, 3350, (67, 494.5, 989.5, 989.5), "cited: NVIDIA H100 datasheet", _HALVED,
            ("H100-SXM5", "H100 80GB HBM3", "H100 SXM 80GB")),
    _device("H200", 141, 139.8, 4800, (67, 494.5, 989.5, 989.5), "cited: NVIDIA H200 datasheet", _HALVED, ("H200-SXM", "H200 141GB")),
    _device("RTX 3060 12GB", 12, 11.63, 360, (12.7, 12.7, 25.5, 25.5), "cited: NVIDIA GeForce RTX 3060 specification (3,584 cores at 1.78 GHz)",
            _DERIVED, ("RTX 3060",)),
    _device("RTX 3090", 24, 23.69, 936, (35.6, 35.6, 71, 71), "cited: NVIDIA Ampere GA102 whitepaper, appendix A", "", ("RTX 3090 24GB",)),
    _device("RTX 4070", 12, None, 504, (29.1, 29.1, 58.3, 58.3), "cited: NVIDIA GeForce RTX 4070 specification (5,888 cores at 2.48 GHz)",
            _DERIVED, ("RTX 4070 12GB",)),
    _device("RTX 4090", 24, 23.64, 1008, (82.6, 82.6, 165.2, 165.2), "cited: NVIDIA Ada whitepaper, appendix A", "", ("RTX 4090 24GB",)),
    _device("RTX 5090", 32, 31.36, 1792, (104.8, 104.8, 209.5, 209.5), "cited: NVIDIA RTX Blackwell whitepaper, appendix", "", ("RTX 5090 32GB",)),
)  # fmt: skip
"""What a process can use is what PyTorch prints as a GPU's total capacity when its memory runs out (cited: reports of users)."""
