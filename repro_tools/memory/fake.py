"""The real step of a phase on fake tensors: shapes and dtypes without numbers, so no data, no device and hardly any memory.

Fake tensors lie on the CPU here. Fake CUDA tensors need a CUDA build of PyTorch with a GPU beside it: elsewhere they raise, or abort
the process. The same functions do the same step on real CPU tensors when they are called outside `fake_tensors`; tests hold the two
against each other.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # private; the range of torch in which it was tested stands in pyproject.toml
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from repro import checkpoint
from repro.errors import BadInput
from repro.phases import Networks, Phase, SingleLossPhase
from repro.runtime import Runtime, World
from repro.update import Update, rows_of
from repro_tools.own_loop import has_own_loop

CPU = torch.device("cpu")
PARTS = 2
"""Of the micro-batches of a step, those that are computed: from the second one on they add to gradients that are there."""
FLOAT32_ON_CUDA = re.compile(
    "__pow__|__rdiv__|__rpow__|__rtruediv__|acos|asin|binary_cross_entropy_with_logits|cosh|cosine_embedding_loss|cdist|"
    "cosine_similarity|cross_entropy|cumprod|cumsum|dist|erfinv|exp|expm1|group_norm|hinge_embedding_loss|kl_div|l1_loss|layer_norm|"
    "log|log10|log_softmax|log1p|log2|margin_ranking_loss|mse_loss|multilabel_margin_loss|multi_margin_loss|nll_loss|norm|normalize|"
    "pdist|poisson_nll_loss|pow|prod|reciprocal|rsqrt|sinh|smooth_l1_loss|soft_margin_loss|softmax|softmin|softplus|sum|renorm|tan|"
    "triplet_margin_loss"
)
"""What CUDA's autocast does in float32 (cited: the page "Automatic Mixed Precision package" of PyTorch's documentation)."""


DROPOUT_ARGUMENT = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}
"""Position of dropout_p among the arguments. The second calls the first where a mode no longer sees it."""


class CannotRehearse(Exception):
    """A phase, an evaluation or a piece of work does not run on fake tensors. One line: what, where, what to do."""


def fake_tensors() -> AbstractContextManager:
    """Within such a block every tensor that is made is fake. The block of one call can be entered again, for tensors made in it before."""
    return _FakeBlock()


class _FakeBlock(AbstractContextManager):
    def __init__(self) -> None:
        # Real tensors may come in: constants that a module of the method made when it was imported.
        self._mode = _FakeTensors(allow_non_fake_inputs=True)

    def __enter__(self) -> None:
        with ExitStack() as entered:
            entered.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", message="Accessing the data pointer of FakeTensor"
            )  # a copied network does
            entered.enter_context(recurrent_layers_apart())
            entered.enter_context(self._mode)
            self._entered = entered.pop_all()

    def __exit__(self, *error) -> None:
        self._entered.__exit__(*error)


class _FakeTensors(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> _FakeTensors:
        return self  # a copied tensor (the average of the weights) belongs to the same mode


@contextmanager
def recurrent_layers_apart() -> Iterator[None]:
    """Within this block LSTM, GRU and RNN layers are done step by step in time, with all states that the backward pass needs.

    As one operation they keep these in a buffer whose size a fake tensor does not have; that of cuDNN was not compared.
    """
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property; torch tells mypy of its descriptor
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


class Rehearsal:
    """One phase with one loss: after `draw` it does steps when called with their numbers, 0, 1, ...: the engine's step without data,
    saving and logging.

    `earlier` are the networks of the phases before (see `networks`). `processes` share the rows of a minibatch; only the first share
    is computed, without exchanging gradients. Of its `micro_batches` the first PARTS are computed, which are as large as any; the rows
    of the others lie on the device. Two steps are the least that says something: Adam's state exists after the first.
    `device` is another than the CPU only for real tensors, to hold a rehearsal against a GPU.
    """

    def __init__(
        self,
        phase: Phase,
        earlier: Mapping[str, Networks],
        processes: int = 1,
        device: torch.device = CPU,
        micro_batches: int = 1,
    ):
        if not isinstance(phase, SingleLossPhase) or has_own_loop(phase):
            raise CannotRehearse(f"phase {phase.name}: not measured: own loop")
        self.phase, self._device, self._earlier, self._processes = phase, device, earlier, processes
        self._state = phase.setup(earlier)
        checkpoint.move(self._state, device)
        self.model, self.optimiser = self._state.model, as_on_a_gpu(self._state.optimiser)
        self.micro_batches = micro_batches
        self._update = Update(phase, 0, Runtime(device, micro_batches={"*": min(micro_batches, PARTS)}))
        self._update.scaler = _Scaler(device.type, enabled=self._update.scaler.is_enabled())
        self.minibatch: dict[str, Tensor] = {}
        self._norms_by_rows = list[bool]()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_noting(self._norms_by_rows))

    def draw(self) -> None:
        """Prepares the phase and draws its minibatch, on the host. Raises BadInput for fewer rows than processes."""
        rows = self.phase.rehearse(self._earlier)
        world = World(0, self._processes)
        world.require_rows(min(map(len, rows.values())), self.phase.name)
        self.minibatch = {name: column[rows_of(world.rank, world.size)] for name, column in rows.items()}
        if self.micro_batches > 1:
            self.minibatch = {name: _apart(column) for name, column in self.minibatch.items()}

    @property
    def rows_of_part(self) -> int:
        """Of the largest micro-batch."""
        return -(-max(map(len, self.minibatch.values()), default=0) // self.micro_batches)

    @property
    def couples_rows(self) -> bool:
        """Whether a step took the statistics of its rows for batch norm."""
        return any(self._norms_by_rows)

    @property
    def average(self) -> nn.Module | None:
        """The moving average of the weights, where the phase keeps one."""
        return self._state.average

    def __call__(self, number: int) -> None:
        batch, rest = self.minibatch, dict[str, Tensor]()
        if self.micro_batches > 1:  # the parts are copies already
            rows = PARTS * self.rows_of_part
            rest = {name: column[rows:].to(self._device, copy=True) for name, column in batch.items()}
            batch = {name: column[:rows] for name, column in batch.items()}
        else:
            batch = {name: column.to(self._device, copy=True) for name, column in batch.items()}
        self._update.begin(number)
        with self.differences():
            self.phase.train_step(self._state, batch, self._update)
        self._update.end([])
        del rest  # until here it lay there

    def differences(self) -> AbstractContextManager:
        """Within this context what a GPU does otherwise than this device is done."""
        return AsOnAGpu() if self._device == CPU else nullcontext()


def _noting(seen: list[bool]) -> Callable[[nn.Module, object], None]:
    def note(module: nn.Module, inputs: object) -> None:
        seen.append(module.training)

    return note


def _apart(column: Tensor) -> Tensor:
    """The same rows, of which no part is contiguous, so that each part is a copy, as on a GPU."""
    return torch.stack([column, column], -1)[..., 0]


def networks(phases: Sequence[Phase]) -> dict[str, Networks]:
    """The networks of `phases` as finished ones are handed on: in eval mode, frozen."""
    found: dict[str, Networks] = {}
    for phase in phases:
        found[phase.name] = Networks(dict(phase.rebuilt(found))).eval().requires_grad_(False)
    return found


def as_on_a_gpu(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimiser, set to update all weights at once where PyTorch would do so on a GPU: it takes another temporary copy."""
    for group in optimiser.param_groups:
        if group.get("foreach", False) is None and not group.get("fused") and not group.get("differentiable"):
            group["foreach"] = True
    return optimiser


@contextmanager
def reported_as(what: str) -> Iterator[None]:
    """Turns whatever goes wrong within the block into one line that says what, where in the method's code, and what to do."""
    try:
        yield
    except (BadInput, CannotRehearse):
        raise
    except Exception as error:
        place = _place(error)
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            raise CannotRehearse(
                f"{what}: found code that reads the values of a tensor ({error.func}){place}, expected shapes alone to decide; "
                "override `rehearse`, or give the value as a number"
            ) from error
        reason = " ".join(str(error).split())
        hint = "; a fake network cannot be converted (.to, .half): make it in the dtype and format it shall have"
        raise CannotRehearse(
            f"{what}: found {type(error).__name__}: {reason}{place}{hint if 'swap' in reason else ''}"
        ) from error


def _place(error: Exception) -> str:
    """The innermost line that is neither PyTorch's nor the kit's."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


class AsOnAGpu(TorchFunctionMode):
    """What the CPU's kernels do otherwise than a GPU's, and memory depends on. Entered by a rehearsal on the CPU.

    Autocast for the CPU leaves in 16 bits what CUDA's does in float32, normalisations and losses among it. And the CPU has no fused
    attention with dropout: it would keep all weights of attention, where a GPU keeps the state of its random numbers.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if FLOAT32_ON_CUDA.fullmatch(name) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_float32, (args, kwargs))
        elif name in DROPOUT_ARGUMENT:
            index = DROPOUT_ARGUMENT[name]
            args = (*args[:index], *(0.0 for _ in args[index : index + 1]), *args[index + 1 :])
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return function(*args, **kwargs)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _Scaler(torch.amp.GradScaler):
    """The loss scaling of fp16 that never skips an update: whether one is skipped is a value."""

    def _maybe_opt_step(self, optimizer, optimizer_state, *arguments, **named):
        return optimizer.step(*arguments, **named)
