"""The speed of the machine at hand, measured in some seconds: a few small probes for each kind of operation.

The same roofline then predicts this machine (`repro memory --on this`). Every probe counts its own work with `repro_tools.memory.cost`, as a step's is
counted, and the fastest of its repeats counts: other programs make a probe slower, never faster. Each repeat goes through several sets of
tensors: a step comes back to a tensor when the caches have lost it.
"""

from __future__ import annotations

import math
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from repro_tools.memory.cost import Op, step_cost
from repro_tools.memory.roofline import Rates, Share, Speeds

IN_A_STEP = Share(1.3, 0.85, 0.50)
"""Which part of a probe's speed is reached within a step, where weights and activations come from farther away and no operation is
repeated: in the three cases. The middle one was fitted to the models that `benchmarks/step_time.py` names as DEVELOPED_ON; the others cover a
factor of 1.5 down and 1.7 up, which is how far held-out models were off (measured here)."""

SIZES, LARGE = (2**16, 2**20, 2**23), 2**26
"""Bytes that a probe of traffic moves in one call. At the large size the system hands out and takes back the memory of every result,
page by page: that time for each byte is measured once, and added to all kinds."""

CACHE = 2**24
"""Bytes over which the calls of such a probe are spread: more than the caches of one core hold."""

Call = Callable[[], object]
Key = tuple[str, bool, bool]
"""A kind of product: its name, whether it is narrow (`repro_tools.memory.cost.NARROW`), whether its factors have 16 bits."""
Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True)
class Curve:
    """A speed by the size of a call, on straight lines in logarithms between the probes, constant beyond them."""

    sizes: Sequence[float]
    speeds: Sequence[float]

    def __call__(self, size: float) -> float:
        if size <= self.sizes[0] or size >= self.sizes[-1]:
            return self.speeds[0 if size <= self.sizes[0] else -1]
        right = bisect(self.sizes, size)
        before, after = self.sizes[right - 1], self.sizes[right]
        weight = math.log(size / before) / math.log(after / before)
        return self.speeds[right - 1] ** (1 - weight) * self.speeds[right] ** weight


@dataclass(frozen=True)
class Measured:
    """What the probes found.

    flops_s: operations a second of each kind of product by its operations. bytes_s: bytes a second of each kind of traffic by its bytes.
    call_s, view_s: seconds to hand out an operation, and a view. took_s: seconds that measuring took.
    """

    threads: int
    flops_s: Mapping[Key, Curve]
    bytes_s: Mapping[str, Curve]
    call_s: float
    view_s: float
    took_s: float

    @property
    def speeds(self) -> Speeds:
        """The same for `repro_tools.memory.roofline.predict`."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        low, likely, high = (self._rates(part) for part in (IN_A_STEP.low, IN_A_STEP.likely, IN_A_STEP.high))
        return Speeds(f"this machine, {threads}", low, likely, high, f"measured on this machine, {threads}")

    def _rates(self, part: float) -> Rates:
        def flops_s(op: Op, precision: str) -> float:
            half = op.dtype in ("bfloat16", "float16") or precision in ("bf16", "fp16")
            key = (op.kind, op.narrow, half)
            curve = self.flops_s[key if key in self.flops_s else (op.kind, False, half)]
            return part * curve(op.flops) * (0.5 if op.dtype == "float64" else 1.0)

        def bytes_s(op: Op) -> float:
            kind = op.kind.removesuffix(" backward")
            return part * self.bytes_s[kind if kind in self.bytes_s else "elementwise"](op.bytes)

        return Rates(flops_s, bytes_s, self.call_s / part, self.view_s / part, 0.0, overlaps=False)


def measure(rounds: int = 2) -> Measured:
    """Runs the probes on the CPU, with as many threads as PyTorch now uses. A program beside it may disturb one round, not all."""
    return combine([probe() for _ in range(rounds)])


def combine(rounds: Sequence[Measured]) -> Measured:
    """Of each probe the fastest round."""
    return Measured(
        rounds[0].threads,
        _best([one.flops_s for one in rounds]),
        _best([one.bytes_s for one in rounds]),
        min(one.call_s for one in rounds),
        min(one.view_s for one in rounds),
        sum(one.took_s for one in rounds),
    )


def _best(rounds: Sequence[Mapping[Kind, Curve]]) -> dict[Kind, Curve]:
    """Of each point of each curve the fastest."""
    return {
        key: Curve(curve.sizes, [max(speeds) for speeds in zip(*(one[key].speeds for one in rounds), strict=True)])
        for key, curve in rounds[0].items()
    }


def probe() -> Measured:
    """One round of all probes."""
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        view_s, bare_s = _view_s(), _bare_s()
        flops_s = _products(torch.float32, bare_s) | _products(torch.bfloat16, bare_s)
        bytes_s = _all_traffic(bare_s)
        call_s = _call_s(view_s)
    return Measured(torch.get_num_threads(), flops_s, bytes_s, call_s, view_s, time.perf_counter() - began)


def _all_traffic(bare_s: float) -> dict[str, Curve]:
    points = {kind: [_traffic(make, size, bare_s) for size in SIZES] for kind, make in TRAFFIC.items()}
    large, speed = _traffic(_elementwise, LARGE, bare_s)
    pages_s = max(0.0, 1 / speed - 1 / points["elementwise"][-1][1])
    return {kind: _curve([*found, (large, 1 / (1 / found[-1][1] + pages_s))]) for kind, found in points.items()}


def _traffic(make: Callable[[int], Call], size: int, bare_s: float) -> tuple[float, float]:
    return _rate([make(size) for _ in range(max(1, min(CACHE // size, 32)))], "bytes", bare_s)


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    sizes, speeds = zip(*sorted(points), strict=True)
    return Curve(sizes, speeds)


def _products(dtype: torch.dtype, bare_s: float) -> dict[Key, Curve]:
    half = dtype is not torch.float32
    found: dict[Key, Curve] = {}
    for narrow, sizes in MATRICES.items():
        calls = [[_product(*size, dtype) for _ in range(6)] for size in sizes]
        found["product", narrow, half] = _curve([_rate(one, "flops", bare_s) for one in calls])
    for narrow, sizes in IMAGES.items():
        pairs = [[_convolution(*size, dtype) for _ in range(4)] for size in sizes]
        found |= _both("convolution", narrow, half, pairs, bare_s)
    found |= _both("attention", False, half, [[_attention(*size, dtype)] for size in SEQUENCES], bare_s)
    found |= _both("recurrent", False, half, [[_recurrent(*RECURRENT, dtype)]], bare_s)
    return found


MATRICES = {False: ((128,) * 3, (256,) * 3, (512,) * 3), True: ((128, 128, 32), (256, 256, 32), (1024, 512, 32))}
"""m, k, n of the products, not narrow and narrow."""

IMAGES = {False: ((16, 64, 4), (16, 64, 8), (16, 64, 16)), True: ((16, 32, 8), (16, 32, 16), (16, 32, 32))}
"""Examples, channels and side of the 3x3 convolutions."""

SEQUENCES = ((8, 4, 64, 32), (4, 4, 256, 64))
"""Examples, heads, positions and width of a head."""

RECURRENT = (16, 32, 128)
"""Steps, examples and width."""

ForwardAndBackward = tuple[Call, Call]


def _both(
    kind: str, narrow: bool, half: bool, sizes: Sequence[Sequence[ForwardAndBackward]], bare_s: float
) -> dict[Key, Curve]:
    """The curves of an operation and of its gradient. Those of a recurrent one are not told apart."""
    forward, backward = (
        _curve([_rate([pair[index] for pair in pairs], "flops", bare_s) for pairs in sizes]) for index in (0, 1)
    )
    if kind == "recurrent":
        return {(kind, narrow, half): min(forward, backward, key=lambda curve: curve.speeds[0])}
    return {(kind, narrow, half): forward, (f"{kind} backward", narrow, half): backward}


def _product(m: int, k: int, n: int, dtype: torch.dtype) -> Call:
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    return lambda: a @ b


def _with_gradient(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> ForwardAndBackward:
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    out = call(*inputs)
    gradient = torch.randn_like(out)
    return lambda: call(*inputs), lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


def _convolution(examples: int, channels: int, side: int, dtype: torch.dtype) -> ForwardAndBackward:
    x, weight = torch.randn(examples, channels, side, side), torch.randn(channels, channels, 3, 3)
    return _with_gradient(lambda x, weight: functional.conv2d(x, weight, padding=1), (x.to(dtype), weight.to(dtype)))


def _attention(examples: int, heads: int, positions: int, width: int, dtype: torch.dtype) -> ForwardAndBackward:
    tensors = [torch.randn(examples, heads, positions, width).to(dtype) for _ in range(3)]
    return _with_gradient(functional.scaled_dot_product_attention, tensors)


def _recurrent(steps: int, examples: int, width: int, dtype: torch.dtype) -> ForwardAndBackward:
    layer = nn.LSTM(width, width).to(dtype)
    return _with_gradient(lambda x: layer(x)[0], [torch.randn(steps, examples, width).to(dtype)])


def _rate(calls: Sequence[Call], what: str, bare_s: float) -> tuple[float, float]:
    """Flops or bytes of an operation in one of the equal `calls`, and how many are done in a second."""

    def all_of_them() -> None:
        for call in calls:
            call()

    cost = step_cost(calls[0])
    parts = sum(times for op, times in cost.ops.items() if getattr(op, what))
    seconds = _fastest(all_of_them) / len(calls)
    total = getattr(cost, what)
    return total / parts, total / max(seconds - parts * bare_s, seconds / 10)


def _fastest(call: Call, seconds: float = 0.01, repeats: int = 3) -> float:
    """Seconds of the fastest call of at least `repeats`, and of as many as go into `seconds`."""
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while repeats > 0 or time.perf_counter() < end:
        start = clock()
        call()
        best, repeats = min(best, clock() - start), repeats - 1
    return best


def clock() -> float:
    """Seconds. With one thread those that it computed for, so that waiting for other programs is not counted."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _view_s() -> float:
    x = torch.zeros(4, 4)

    def chain() -> None:
        for _ in range(50):
            x.view(16)

    return _fastest(chain) / 50


def _bare_s() -> float:
    """Seconds for an operation on almost no numbers, without a gradient."""
    x = torch.zeros(4)

    def chain() -> None:
        for _ in range(50):
            x * 1.5

    return _fastest(chain) / 50


def _call_s(view_s: float) -> float:
    """Seconds for an operation on almost no numbers in a training step, with what Python, autograd and the optimiser add to it."""
    network = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.SiLU())])
    adam, x = torch.optim.Adam(network.parameters()), torch.zeros(4, 4)

    def step() -> None:
        adam.zero_grad()
        network(x).square().mean().backward()
        adam.step()

    step()
    calls: Counter[bool] = Counter()
    for op, times in step_cost(step).ops.items():
        calls[op.kind == "view"] += times
    return max(_fastest(step) - calls[True] * view_s, 0.0) / calls[False]


def _elementwise(size: int) -> Call:
    x, y = torch.full((size // 12,), 0.5), torch.full((size // 12,), 0.5)
    return lambda: x + y


def _transcendental(size: int) -> Call:
    """Of each number the sigmoid, the Gaussian and the hyperbolic tangent in turn: their speeds differ by a factor of two."""
    x = torch.full((size // 8,), 0.5)

    def call() -> None:
        functional.silu(x), functional.gelu(x), torch.tanh(x)

    return call


def _normalisation(size: int) -> Call:
    """Forward and backward of the norms of a batch, of groups and of layers."""
    x = torch.full((max(2, size // (8 * 32 * 64)), 32, 64), 0.5, requires_grad=True)
    ones, gradient = torch.ones(32), torch.ones_like(x)

    def call() -> None:
        normed = functional.batch_norm(x, None, None, ones, ones, training=True)
        torch.autograd.grad(normed, x, gradient)
        torch.autograd.grad(functional.group_norm(x, 8), x, gradient)
        torch.autograd.grad(functional.layer_norm(x, (64,)), x, gradient)

    return call


def _copy(size: int) -> Call:
    x = torch.full((max(1, size // (8 * 4096)), 64, 64), 0.5)
    return lambda: x.transpose(1, 2).contiguous()


def _random(size: int) -> Call:
    x = torch.empty(size // 4)
    return lambda: x.bernoulli_(0.9)


def _gather(size: int) -> Call:
    x = torch.full((max(1, size // (8 * 256)), 256), 0.5)
    rows = torch.randperm(len(x))
    return lambda: x.index_select(0, rows)


def _thin_product(size: int) -> Call:
    x, weight = torch.full((max(1, size // (4 * 258)), 2), 0.5), torch.randn(2, 256)
    return lambda: x @ weight


def _thin_convolution(size: int) -> Call:
    x, weight = torch.full((max(1, size // (4 * 33 * 784)), 1, 28, 28), 0.5), torch.randn(32, 1, 3, 3)
    return lambda: functional.conv2d(x, weight, padding=1)


TRAFFIC: Mapping[str, Callable[[int], Call]] = {
    "elementwise": _elementwise,
    "transcendental": _transcendental,
    "normalisation": _normalisation,
    "copy": _copy,
    "random": _random,
    "gather": _gather,
    "product": _thin_product,
    "convolution": _thin_convolution,
}
"""A call of each kind that moves about so many bytes."""
