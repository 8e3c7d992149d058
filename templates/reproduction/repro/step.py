"""How an optimiser step is done: precision, warm-up and fall of the learning rate, clipping, average of the weights.

All of it is off in `PLAIN`. Papers use these and do not always say so; a reproduction says what it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repro.config import Section
from repro.errors import BadInput, RunFailed

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepOptions(Section):
    """The configuration of a step. A phase's own section inherits it, or the phase goes without: `PLAIN`."""

    precision: Literal["float32", "tf32", "bf16", "fp16"]
    """Of the network's products; weights and optimiser stay float32. bf16 and fp16 go by autocast, fp16 scales the loss.
    tf32 rounds the factors to 10 bits on GPUs that can; PyTorch does so in convolutions unless it is told not to."""
    warmup_steps: NonNegativeInt
    """The learning rate grows linearly over so many steps; step 1 already moves the weights."""
    clip_norm: PositiveFloat | None
    """The largest norm of the whole gradient."""
    ema_decay: float | None = Field(gt=0, lt=1)
    """Of the exponential moving average of the weights, which then is the network that the phase hands on."""


PLAIN = StepOptions(precision="float32", warmup_steps=0, clip_norm=None, ema_decay=None)


def check_precision(options: StepOptions, phase: str, device: torch.device) -> None:
    """Raises BadInput for a precision that the device has no hardware for: emulated, it is slower than float32."""
    if options.precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            raise BadInput(
                f"phases.{phase}.precision: found bf16, expected float32 or fp16 on {torch.cuda.get_device_name(device)}"
            )


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Within this block a GPU's products of float32 numbers are what `precision` says, float32 unless it says tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class Stepper:
    """Does the steps of one phase. `model` is the network itself, without a wrapper around it."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        options: StepOptions,
        device: torch.device,
        learning_rate_factor: Callable[[int], float] = lambda step: 1.0,
    ):
        self._model, self._optimiser, self._options, self._device = model, optimiser, options, device
        self._learning_rate_factor = learning_rate_factor
        self._rates = [group["lr"] for group in optimiser.param_groups]
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self._average = None
        if options.ema_decay is not None:
            self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay))

    def autocast(self) -> torch.autocast:
        """The context of the forward pass."""
        dtype = DTYPES[self._options.precision]
        return torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not torch.float32)

    def step(self, loss: Tensor, number: int) -> None:
        """One update from a loss whose graph is alive. `number` counts from 0."""
        factor = self._factor(number)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._options.clip_norm is not None:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self._model.parameters(), self._options.clip_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self._model)

    def _factor(self, number: int) -> float:
        """Of the learning rate. Raises RunFailed for one that no learning rate can have."""
        factor = float(self._learning_rate_factor(number))
        if not 0 <= factor < inf:
            raise RunFailed(f"learning_rate_factor({number}): found {factor}, expected a finite number of at least 0")
        if self._options.warmup_steps:
            factor *= min(1.0, (number + 1) / self._options.warmup_steps)
        return factor

    @property
    def scale(self) -> float:
        """By which the loss is multiplied before its gradient is taken: 1 unless the precision is fp16."""
        return self._scaler.get_scale()

    @property
    def result(self) -> nn.Module:
        """The network that the phase hands on: the average if there is one."""
        return self._model if self._average is None else self._average.module

    def state_dict(self) -> dict[str, Any]:
        """What a resumed phase needs besides the weights."""
        return {
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
