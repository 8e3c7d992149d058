"""How long a recorded step takes on a device: always a range, never one number.

A roofline: an operation takes as long as its arithmetic or its traffic with the memory, whichever is longer, and a device reaches only a
share of either peak. On top comes what it costs to hand out an operation. On a GPU the host runs ahead of the device, and the slower
of the two decides. A core of a CPU does one after the other: arithmetic, traffic and handing out add up.

Sizes: bytes, seconds, operations a second. The shares of the peaks are assumed, see UTILISATION; those of the machine at hand are measured
(`repro_tools.memory.this_machine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from repro_tools.memory.cost import Cost, Op
from repro_tools.memory.devices import Device

CASES = ("low", "likely", "high")


@dataclass(frozen=True)
class Range:
    """A time in seconds: what one would bet on, and what it hardly falls below or exceeds."""

    low: float
    likely: float
    high: float

    def __post_init__(self):
        if not self.low <= self.likely <= self.high:
            raise ValueError(f"found the range {self.low}, {self.likely}, {self.high}, expected it in order")

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.likely * factor, self.high * factor)


NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, in one case.

    flops_s(operation, precision): of a product, `precision` being that of float32 products (float32 or tf32). bytes_s(operation): of
    its traffic. call_s: seconds of the host for one operation, view_s for one that moves nothing. kernel_s: seconds between two
    programs on the device. overlaps: whether arithmetic, traffic and the host go on at the same time.
    """

    flops_s: Callable[[Op, str], float]
    bytes_s: Callable[[Op], float]
    call_s: float
    view_s: float
    kernel_s: float
    overlaps: bool


@dataclass(frozen=True)
class Speeds:
    """A device in the three cases, and where its figures come from."""

    name: str
    low: Rates
    likely: Rates
    high: Rates
    source: str


def predict(cost: Cost, device: Device | Speeds, precision: str = "float32") -> Range:
    """Seconds of one call whose `cost` was recorded.

    precision: of the products that were recorded in float32. float32 or tf32 are taken at their word; bf16 or fp16 mean a step that was
    recorded without autocast, and are passed over where it was recorded with it: what stayed float32 then stays so. A GPU without tf32 does
    such products in float32, as PyTorch does, without a word.
    Raises BadInput when the device has no hardware for a precision that the step needs.
    """
    if cost.has_half_products and precision in ("bf16", "fp16"):
        precision = "float32"
    if isinstance(device, Device) and precision == "tf32" and device.peak_flops["tf32"] is None:
        precision = "float32"
    speeds = device if isinstance(device, Speeds) else speeds_of(device)
    seconds = sorted(_seconds(cost, getattr(speeds, case), precision) for case in CASES)
    return Range(*seconds)


def _seconds(cost: Cost, rates: Rates, precision: str) -> float:
    host = device = 0.0
    for op, times in cost.ops.items():
        host += times * (rates.view_s if op.kind == "view" else rates.call_s)
        arithmetic = op.flops / rates.flops_s(op, precision) if op.flops else 0.0
        traffic = op.bytes / rates.bytes_s(op) if op.bytes else 0.0
        busy = max(arithmetic, traffic) if rates.overlaps else arithmetic + traffic
        device += times * (busy + op.kernels * rates.kernel_s)
    return max(host, device) if rates.overlaps else host + device


@dataclass(frozen=True)
class Share:
    """Which share of a peak is reached, in the three cases of Range: the time is low where the share is high."""

    low: float
    likely: float
    high: float


UTILISATION: Mapping[str, Share] = {
    "product float32": Share(0.90, 0.65, 0.40),
    "product tensor": Share(0.70, 0.45, 0.20),
    "convolution float32": Share(1.00, 0.60, 0.25),
    "convolution tensor": Share(0.55, 0.30, 0.12),
    "convolution backward float32": Share(0.90, 0.50, 0.20),
    "convolution backward tensor": Share(0.45, 0.25, 0.10),
    "attention float32": Share(0.50, 0.30, 0.12),
    "attention tensor": Share(0.50, 0.30, 0.10),
    "attention backward float32": Share(0.40, 0.22, 0.08),
    "attention backward tensor": Share(0.35, 0.20, 0.06),
    "recurrent float32": Share(0.60, 0.30, 0.10),
    "recurrent tensor": Share(0.30, 0.12, 0.04),
    "bandwidth": Share(0.90, 0.75, 0.50),
}
"""Shares of a GPU's peaks; `tensor` is for tf32, bf16 and fp16. Assumed: large products come near the peak, tensor cores are harder to feed than
float32 units, gradients of convolutions run below the forward pass. Written down before they were held against published times
(`benchmarks/step_time.py --published`, refs/time.md). After that one thing was changed: convolutions in float32 were put higher, for
cuDNN does 3x3 ones with fewer multiplications than are counted."""

NARROW = Share(0.70, 0.45, 0.20)
"""What is left of that for products with a side below `repro_tools.memory.cost.NARROW` (assumed)."""

CALL_S = Share(5e-6, 15e-6, 60e-6)
"""The host's time for an operation on a GPU: Python, autograd, the start of a kernel. Measured here on a CPU of about 3 GHz: 2 to 4 microseconds
without the start of a kernel. After one published time, one
image through ResNet-50, the likely case was raised from 8 and the high one from 16 (refs/time.md)."""

VIEW_S = Share(1e-6, 2e-6, 4e-6)
"""The same for a view. Measured here: 1 to 2 microseconds."""

KERNEL_S = Share(1.5e-6, 2.5e-6, 5e-6)
"""The least time of a kernel on the device, and the gap before the next (assumed)."""

DOUBLE = 1 / 32
"""Speed of float64 products as a part of float32 (assumed: that of a T4; data-centre GPUs are faster, others slower)."""


def speeds_of(device: Device) -> Speeds:
    """The device of a data sheet, at the shares of its peaks that are assumed above."""

    def rates(case: str) -> Rates:
        def flops_s(op: Op, precision: str) -> float:
            given = {"bfloat16": "bf16", "float16": "fp16", "float64": "float64"}.get(op.dtype, precision)
            if given == "float64":
                return device.peak("float32") * DOUBLE * getattr(UTILISATION["product float32"], case)
            unit = "float32" if given == "float32" else "tensor"
            share = getattr(UTILISATION[f"{op.kind} {unit}"], case)
            return device.peak(given) * share * (getattr(NARROW, case) if op.narrow else 1.0)

        def bytes_s(op: Op) -> float:
            return device.bandwidth_bytes_s * getattr(UTILISATION["bandwidth"], case)

        call_s, view_s, kernel_s = (getattr(one, case) for one in (CALL_S, VIEW_S, KERNEL_S))
        return Rates(flops_s, bytes_s, call_s, view_s, kernel_s, overlaps=True)

    low, likely, high = map(rates, CASES)
    return Speeds(device.name, low, likely, high, f"{device.source}; shares of the peaks assumed")
