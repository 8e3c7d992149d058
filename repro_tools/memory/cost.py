"""What a step costs, whatever the device: for every operation its arithmetic and the bytes that it reads and writes.

Recorded from one call on fake tensors, which have shapes and types but no values: nothing is computed, and a step of CIFAR-10 takes
a second. `repro_tools.memory.roofline` turns the cost into time.

    with fake_tensors():
        ...  # make the model, the optimiser and a minibatch here, do one step
        cost = step_cost(step)

Operations of a product count 2 for a multiplication and its addition, as data sheets do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

PRODUCTS = ("product", "convolution", "convolution backward", "attention", "attention backward", "recurrent")
"""Kinds of operation that a device does with its units for matrix products; the others are limited by the memory."""

NARROW = 64
"""A product is narrow when a side of its matrices is shorter: then tiles of the usual 64 to 128 are filled badly."""


@dataclass(frozen=True)
class Op:
    """One operation on the device.

    kind: one of PRODUCTS, or elementwise, transcendental, normalisation, copy, random, gather, or view (which moves nothing).
    dtype: of its factors or its first tensor, as 'float32'. flops: of the products in it, 0 for other kinds.
    read, written: bytes, each tensor once. elements: of its largest tensor. narrow: see NARROW.
    kernels: how many programs a GPU starts for it, 0 for what the host does alone.
    """

    name: str
    kind: str
    dtype: str
    flops: int
    read: int
    written: int
    elements: int
    narrow: bool
    kernels: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Cost:
    """What a call does: every distinct operation with how often it occurs.

    unknown: names of operations that do arithmetic which nobody counted here: the time is a lower bound then.
    """

    ops: Mapping[Op, int]
    unknown: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Operations of the products."""
        return sum(op.flops * times for op, times in self.ops.items())

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(op.bytes * times for op, times in self.ops.items())

    @property
    def kernels(self) -> int:
        """Programs that a GPU starts."""
        return sum(op.kernels * times for op, times in self.ops.items())

    @property
    def calls(self) -> int:
        """Operations that the host hands out, views among them."""
        return sum(self.ops.values())

    @property
    def has_half_products(self) -> bool:
        """Whether any product is of 16-bit numbers, as under autocast."""
        return any(op.flops and op.dtype in ("bfloat16", "float16") for op in self.ops)

    def __add__(self, other: Cost) -> Cost:
        return Cost(Counter(self.ops) + Counter(other.ops), tuple(sorted({*self.unknown, *other.unknown})))

    def __mul__(self, times: int) -> Cost:
        return Cost({op: count * times for op, count in self.ops.items()}, self.unknown)


def step_cost(step: Callable[[], object]) -> Cost:
    """The cost of one call of `step`. Call it once before where a first call does more, as Adam's does.

    Enter `repro_tools.memory.fake.fake_tensors` first, and make all tensors there; on real tensors it costs a real step and gives the same.
    """
    with Recorder() as recorder:
        step()
    return recorder.cost


class Recorder(TorchDispatchMode):
    """Counts each operation that reaches the device while it is entered. Enter it inside a fake mode, not outside."""

    def __init__(self) -> None:
        super().__init__()
        self._ops: Counter[Op] = Counter()
        self._unknown: set[str] = set()

    @property
    def cost(self) -> Cost:
        """What was recorded so far."""
        return Cost(dict(self._ops), tuple(sorted(self._unknown)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.namespace in ("aten", "mkldnn", "torchvision"):
            packet = function._overloadpacket
            if function.namespace != "aten" or _may_hide_products(packet):
                self._unknown.add(str(packet))
            self._ops[describe(function, args, kwargs, out)] += 1
        return out


def describe(function: Any, args: Sequence, kwargs: Mapping[str, Any], out: Any) -> Op:
    """One operation, from its arguments and its result, which may be fake."""
    packet = function._overloadpacket
    name = packet.__name__
    inputs = [one for one in tree_iter((args, dict(kwargs))) if isinstance(one, Tensor)]
    outputs = [one for one in tree_iter(out) if isinstance(one, Tensor)]
    largest = max([*inputs, *outputs], key=lambda one: one.numel(), default=None)
    dtype = str(largest.dtype if largest is not None else "none").removeprefix("torch.")
    elements = 0 if largest is None else largest.numel()
    if _moves_nothing(function, name, inputs, outputs):
        return Op(name, "view", dtype, 0, 0, 0, 0, False, 0)
    flops = _flops(packet, args, kwargs, out)
    if flops:
        dtype = str(inputs[0].dtype).removeprefix("torch.")
    kind = _kind(name, flops, inputs, outputs)
    read, written = _read(function, name, inputs, outputs), sum(map(_nbytes, outputs))
    if name.startswith("_foreach_") and not outputs:
        written = sum(map(_nbytes, _first_list(args)))
    narrow, kernels = bool(flops) and _is_narrow(name, inputs), _kernels(name, kind, inputs)
    if name in SEVERAL_PASSES:
        kernels, reads, writes = SEVERAL_PASSES[name]
        read, written = round(reads * read), round(writes * read)
    return Op(name, kind, dtype, flops, read, written, elements, narrow, kernels)


def _moves_nothing(function: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Views, allocations and questions about a tensor."""
    if name in _ALLOCATIONS or not (outputs or inputs):
        return True
    if name in _NO_MOVES:
        return True
    returns = function._schema.returns
    aliases = [one.alias_info for one in returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _read(function: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes read: every input once, but not a target that is only written to, and of a table only the rows that are taken."""
    if name in _GATHERS:
        return sum(map(_nbytes, outputs)) + sum(_nbytes(one) for one in inputs[1:])
    written_only = name in _WRITE_ONLY or name.endswith("_out")
    seen, total = set(), 0
    for index, tensor in enumerate(inputs):
        if id(tensor) in seen or (written_only and index == 0):
            continue
        seen.add(id(tensor))
        total += _nbytes(tensor)
    return total


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the tensor's own numbers: a dimension that is only expanded (stride 0) counts once."""
    if tensor.layout is not torch.strided:
        return 0
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0]
    return math.prod(sizes) * tensor.element_size()


def _flops(packet: Any, args: Sequence, kwargs: Mapping[str, Any], out: Any) -> int:
    formula = FLOPS.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _kind(name: str, flops: int, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    if flops:
        backward = " backward" if "backward" in name else ""
        for word, kind in (("conv", "convolution"), ("attention", "attention"), ("rnn", "recurrent")):
            if word in name:
                return kind if kind == "recurrent" else kind + backward
        return "product"
    bare = name.removeprefix("_foreach_").rstrip("_")
    if "norm" in name and name.startswith(("native_", "cudnn_", "_native", "_fused_rms")):
        return "normalisation"
    if bare in _COPIES:
        return "copy"
    if bare in _RANDOM:
        return "random"
    if bare in _GATHERS or bare in _SCATTERS:
        return "gather"
    return "transcendental" if bare in _TRANSCENDENTAL else "elementwise"


def _is_narrow(name: str, inputs: list[Tensor]) -> bool:
    """Whether a side of the product's matrices is shorter than NARROW; a convolution's are its channels."""
    sides = [tensor for tensor in inputs if tensor.ndim >= 2]
    if "conv" in name:
        sides = [tensor for tensor in sides if tensor.ndim >= 3][-1:]  # the weight: (out, in / groups, ...)
        return any(min(weight.shape[0], weight.shape[1]) < NARROW for weight in sides)
    return any(min(tensor.shape[-2:]) < NARROW for tensor in sides)


def _kernels(name: str, kind: str, inputs: list[Tensor]) -> int:
    """How many programs a GPU starts. Assumed: as PyTorch's own kernels do; an operation on a list handles some 30 tensors at a time."""
    if name in ("_local_scalar_dense", "item"):
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        return math.ceil(len(inputs) / 100)
    return {"convolution backward": 3, "attention backward": 3, "normalisation": 2}.get(kind, 1)


def _first_list(args: Sequence) -> list[Tensor]:
    return [one for one in args[0] if isinstance(one, Tensor)] if args and isinstance(args[0], (list, tuple)) else []


def _may_hide_products(packet: Any) -> bool:
    """Operations that multiply matrices inside and have no formula here."""
    name = packet.__name__
    return packet not in FLOPS and (
        name.startswith(
            ("linalg_", "_linalg_", "fft_", "_fft_", "_thnn_", "_cudnn_rnn", "cholesky", "lu_", "grid_sampler")
        )
        or name in ("_trilinear", "_ctc_loss", "_softmax_backward_data_out")
    )


def _convolution(x, weight, bias, stride, padding, dilation, transposed, *args, out_val=None, **kwargs) -> int:
    """Every weight meets each example at every position of the output, or of the input of a transposed one."""
    return 2 * len(x) * weight.numel() * math.prod((x if transposed else out_val).shape[2:])


def _convolution_backward(
    gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask, out_val=None
) -> int:
    """As much as forward for the gradient of the input, and again for that of the weights.

    PyTorch's own formula counts the latter `groups` times (torch 2.13).
    """
    forward = 2 * len(x) * weight.numel() * math.prod((x if transposed else gradient).shape[2:])
    return forward * (bool(mask[0]) + bool(mask[1]))


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _recurrent(x, w_input, w_hidden, *args, out_val=None, **kwargs) -> int:
    """One layer and direction: x (time, batch, inputs), weights (gates * hidden, inputs) and (gates * hidden, hidden)."""
    return 2 * x.shape[0] * x.shape[1] * (w_input.numel() + w_hidden.numel())


def _recurrent_backward(x, w_input, w_hidden, *args, out_val=None, **kwargs) -> int:
    return 2 * _recurrent(x, w_input, w_hidden)


def _distances(x, y, *args, out_val=None, **kwargs) -> int:
    """cdist by a matrix product, as it is done from 25 points on."""
    return 2 * out_val.numel() * x.shape[-1]


def _from_registry(formula: Callable) -> Callable:
    return lambda *args, out_val=None, **kwargs: formula(*args, **kwargs, out_val=out_val)


FLOPS: Mapping[Any, Callable[..., int]] = {
    **{packet: _from_registry(formula) for packet, formula in flop_registry.items() if hasattr(packet, "overloads")},
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    aten._cdist_forward: _distances,
    aten._euclidean_dist: _distances,
}
"""Operations of each kind of product: PyTorch's own formulas, and ours for what they leave out."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SEVERAL_PASSES: Mapping[str, tuple[int, float, float]] = {
    "logsumexp": (7, 4.0, 2.0),
    "_safe_softmax": (5, 2.75, 2.25),
}
"""Operations that PyTorch makes of others inside, where no mode sees them: kernels, and how often the input's bytes are read and written. From
their source (cited: aten/src/ATen/native/ReduceOps.cpp and SoftMax.cpp): the maximum, the difference, its exponential, the sum; the
softmax, the comparison with -inf, and the choice between the result and zero."""

_ALLOCATIONS = _names("empty empty_like empty_strided new_empty new_empty_strided empty_permuted scalar_tensor")
_NO_MOVES = _names("_unsafe_view lift_fresh alias detach is_same_size set_ resize_ record_stream")
_WRITE_ONLY = _names("copy_ fill_ zero_ normal_ uniform_ bernoulli_ random_ exponential_ ones_like zeros_like full_like rand_like randn_like")  # fmt: skip
_COPIES = _names("copy clone _to_copy cat stack constant_pad_nd roll flip repeat slice_backward select_backward")
_RANDOM = _names("normal uniform bernoulli random exponential rand randn randint randperm multinomial native_dropout rand_like randn_like")  # fmt: skip
_GATHERS = _names("index index_select gather embedding take")
_SCATTERS = _names("index_put index_add scatter scatter_add embedding_dense_backward _index_put_impl index_copy")
_TRANSCENDENTAL = _names(
    "exp exp2 expm1 log log1p log2 sigmoid silu silu_backward gelu gelu_backward tanh sin cos erf pow softplus elu elu_backward "
    "mish _softmax _safe_softmax _log_softmax logsumexp log_sigmoid_forward _softmax_backward_data _log_softmax_backward_data atan2 lgamma"
)
