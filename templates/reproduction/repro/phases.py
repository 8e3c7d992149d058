"""What a method says of a training phase: what it changes, what it draws, what a step does, what comes out.

`Phase` is the paper's own loop: any number of networks and optimisers, and `train_step` is the paper's
algorithm box, line by line. `SingleLossPhase` is the shorthand for one network, one optimiser and one mean
loss. `repro.loop` runs either.

What a step draws is a function of (seed, phase, step), and what training changes is in the state. So state
and step number are all that a resumed phase needs, and it ends in the same bits as one that was never
stopped.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import cos, inf, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repro.config import Section
from repro.errors import BadInput, RunFailed
from repro.randomness import Draw as Draw
from repro.randomness import derive_seed

if TYPE_CHECKING:
    from repro.update import Update

Batch = Mapping[str, Tensor]
"""Named tensors with one row per example."""

State = TypeVar("State")
Precision = Literal["float32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class Work:
    """What is done on the device beside the optimiser steps: calling `run` does it once, a run does it
    `times` times.

    `run` makes all its tensors itself, on the CPU, with any values: it is called on fake tensors too, where
    no value can be read.
    """

    name: str
    run: Callable[[], object]
    times: int


class Networks(nn.ModuleDict):
    """The networks that a phase hands on, by name. Where there is one only, the whole can be used as it."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if len(self) != 1:
            found = f"found a call of {len(self)} networks ({', '.join(self)})"
            raise TypeError(f"{found}, expected one of them by name")
        return next(iter(self.values()))(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            networks = self.__dict__.get("_modules", {})
            if len(networks) != 1:
                raise
            return getattr(next(iter(networks.values())), name)


class Phase(ABC, Generic[State]):
    """One training phase with the paper's own loop. A method subclasses it.

    `name` is its key under `phases` in the configuration, `steps` the number of steps of its loop.
    """

    name: str
    steps: int
    counts: Mapping[str, Fraction | int] = {}
    """The paper's units in one step, as {"generator iterations": 1} or {"epochs": Fraction(128, 50_000)}."""
    collect_every: int = 0
    """Steps of a round, at whose beginning `collect` makes the data of its minibatches; 0: no rounds."""
    collects_from_seed: bool = False
    """Whether `collect` reads nothing of the state: then the data of a round that are lost are made again."""
    precision: Precision = "float32"
    """Of the products within `update.autocast()`; weights and optimisers stay float32. bf16 and fp16 go by
    autocast, fp16 scales the loss. tf32 rounds factors to 10 bits on GPUs that can."""
    shared_parameters: tuple[str, ...] = ()
    """Optimisers of the state, by name, that may hold the same parameter: elsewhere taken for a mistake."""
    parts_define: str = ""
    """What the paper takes within each part of a minibatch, not of the whole: "the statistics of batch norm".
    Then the number of parts belongs to the run's identity, and buffers are those of the first process."""
    minibatch_defines: str = ""
    """What another batch size would change besides the gradient's noise: "which pairs are matched"."""
    draws_as: str = ""
    """The name of a phase whose draws this one has as well: an equal network begins with the same weights,
    and an equal `minibatch` gives the same minibatches. Methods are then compared in pairs. Empty for draws
    of its own."""

    @property
    def stream(self) -> str:
        """What the phase's draws are a function of, besides the seed and the step."""
        return self.draws_as or self.name

    @abstractmethod
    def setup(self, earlier: Mapping[str, Networks]) -> State:
        """The state before the first step: a dataclass of all that training changes.

        Networks, optimisers, torch's schedulers and averages, replay memories, environments: whatever has
        `state_dict` and `load_state_dict`; tensors, generators and plain numbers; lists, tuples and dicts of
        these. Made on the CPU; networks and tensors are then moved to the device. `earlier` holds the
        networks of the phases before this one, by phase and name: on the device, in eval mode, frozen. It is
        cheap: finished networks are rebuilt through it.
        """

    @abstractmethod
    def minibatch(self, step: int, draw: Draw) -> Batch:
        """The named tensors of one minibatch, on the CPU, one row per example.

        Every draw comes from `draw`, a torch.Generator of this step, never from a global one, and nothing of
        the state is read: any step's minibatch can be drawn at any time, by any process.
        """

    @abstractmethod
    def train_step(self, state: State, batch: Batch, update: Update) -> None:
        """What one step does: the paper's algorithm box. See `repro.update` for what `update` can do."""

    @abstractmethod
    def networks(self, state: State) -> Mapping[str, nn.Module]:
        """The networks that the phase hands on, by name."""

    def collect(self, state: State, update: Update) -> Batch:
        """The data of a round, on the CPU, one row per example: rollouts, a bank, pseudo-labels. May change
        the state.

        Draws come from `update.generator("a name")`. The minibatches of the round find the data in
        `draw.collected`.
        """
        raise BadInput(
            f"phase {self.name}: found collect_every {self.collect_every} and no `collect`, expected both"
        )

    def rebuilt(self, earlier: Mapping[str, Networks]) -> Mapping[str, nn.Module]:
        """Networks as `networks` names them, with any weights: a finished phase's are loaded into them."""
        return self.networks(self.setup(earlier))

    def check(self, folder: Path) -> list[str]:
        """What the phase needs of the machine and of `folder`, where it will lie. Called for all phases
        before any work.

        Returns what is worth saying, a line each. Raises BadInput for what the machine does not have.
        """
        return []

    def watch(self, networks: Networks) -> Mapping[str, float]:
        """Numbers beside the loss at every logged step, such as an error on validation images. They decide
        nothing.

        `networks` are what the phase would hand on if it ended here, in eval mode, without gradients. The
        record keeps the numbers under `watched`. What this costs is in no estimate.
        """
        return {}

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, Networks]) -> None:
        """Reads or builds what the phase trains on and never changes, after `setup` and before the first
        step.

        Every process of a run calls it. Files in `scratch` survive a kill and are deleted when the phase
        ends.
        """

    def release(self) -> None:
        """Drops what `prepare` built, so that the next phase starts with the memory free."""

    def rehearse(self, earlier: Mapping[str, Networks]) -> Batch:
        """Brings the phase as far as a step needs it and returns a minibatch of the right shapes, with any
        values.

        `repro memory` calls it on fake tensors, where no value can be read. A phase that needs data, or
        builds for more than a second, overrides it; `repro preflight` holds the shapes against a real
        minibatch. What `prepare` makes here counts as kept on the host.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self.prepare(0, Path(scratch), earlier)
            return self.minibatch(0, Draw(0, self.name, "rehearsal"))

    def work(self) -> Sequence[Work]:
        """What is done on the device outside the steps, such as building a pool. Called before `prepare`."""
        return []

    def storage(self) -> Mapping[str, int]:
        """Bytes of its rounds that lie on the disk at a time, by name; asked for before the run."""
        return {}

    def expected_initial_loss(self) -> float | None:
        """What theory says of the loss before the first step, as ln k for k classes: for `repro diagnose`."""
        return None


class StepOptions(Section):
    """The configuration of a step of one loss. A phase's own section inherits it, or the phase goes without:
    `PLAIN`.

    Papers use these and do not always say so; a reproduction says what it uses.
    """

    precision: Precision
    """See `Phase.precision`."""
    warmup_steps: NonNegativeInt
    """The learning rate grows linearly over so many steps; step 1 already moves the weights."""
    clip_norm: PositiveFloat | None
    """The largest norm of the whole gradient."""
    ema_decay: float | None = Field(gt=0, lt=1)
    """Of the exponential moving average of the weights, which then is the network that the phase hands on."""


PLAIN = StepOptions(precision="float32", warmup_steps=0, clip_norm=None, ema_decay=None)


@dataclass
class SingleLossState:
    """The state of a phase with one loss."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    average: AveragedModel | None
    rates: list[float]
    """The learning rates that `make_optimiser` set, one per group."""


class SingleLossPhase(Phase[SingleLossState]):
    """A phase with one network, one optimiser and the mean loss of a minibatch: say these, and the loop is
    there.

    `iterations` is its number of optimiser steps, `options` how a step is done.
    """

    iterations: int
    options: StepOptions = PLAIN

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.iterations

    @property
    def precision(self) -> Precision:  # type: ignore[override]
        return self.options.precision

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A freshly initialised network, on the CPU."""

    @abstractmethod
    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The phase's own optimiser."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a minibatch, or of a share of it, that lies on the device."""

    def learning_rate_factor(self, step: int) -> float:
        """Of the optimiser's learning rates in this step, counted from 0, on top of a warm-up; see `cosine`
        and the others below.

        A function of the step alone, so that a resumed phase has the same rates. Rates are set only where
        this is overridden or there is a warm-up.
        """
        return 1.0

    def setup(self, earlier: Mapping[str, Networks]) -> SingleLossState:
        model = self.make_model()
        optimiser, average = self.make_optimiser(model), None
        if self.options.ema_decay is not None:
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.options.ema_decay))
        model.train()
        return SingleLossState(model, optimiser, average, [group["lr"] for group in optimiser.param_groups])

    def train_step(self, state: SingleLossState, batch: Batch, update: Update) -> None:
        self._set_rates(state, update.step_number)
        for part in update.parts(batch):
            with update.autocast():
                loss = self.loss(state.model, part)
            update.backward(loss)
        update.log("loss", update.step(state.optimiser, clip=self.options.clip_norm))
        if state.average is not None:
            state.average.update_parameters(state.model)

    def networks(self, state: SingleLossState) -> Mapping[str, nn.Module]:
        return {"model": state.model if state.average is None else state.average.module}

    def rebuilt(self, earlier: Mapping[str, Networks]) -> Mapping[str, nn.Module]:
        return {"model": self.make_model()}

    def _set_rates(self, state: SingleLossState, step: int) -> None:
        """Raises RunFailed where somebody else sets rates as well: one of the two would go unseen."""
        if not self._sets_rates():
            return
        factor = self._factor(step)
        before = [self._factor(step - 1) * rate for rate in state.rates] if step else state.rates
        for group, last, rate in zip(state.optimiser.param_groups, before, state.rates, strict=True):
            if group["lr"] != last:
                found = f"found the learning rate {group['lr']}, expected {last}"
                ways = "set rates there or by a scheduler in a Phase of your own"
                left = f"as learning_rate_factor and warmup_steps left it; {ways}"
                raise RunFailed(f"phase {self.name}, step {step + 1}: {found} {left}")
            group["lr"] = factor * rate

    def _sets_rates(self) -> bool:
        overridden = type(self).learning_rate_factor is not SingleLossPhase.learning_rate_factor
        return overridden or self.options.warmup_steps > 0

    def _factor(self, step: int) -> float:
        """Raises RunFailed for a factor that no learning rate can have."""
        factor = float(self.learning_rate_factor(step))
        if not 0 <= factor < inf:
            expected = "expected a finite number of at least 0"
            raise RunFailed(f"learning_rate_factor({step}): found {factor}, {expected}")
        if self.options.warmup_steps:
            factor *= min(1.0, (step + 1) / self.options.warmup_steps)
        return factor


# Factors for `learning_rate_factor`. A step is counted from 0. What comes after a warm-up may count from its
# end, `cosine(step - warmup, steps - warmup)`, or from the first step: libraries do both, and papers seldom
# say which.


def cosine(step: int, steps: int, least: float = 0.0) -> float:
    """Half a cosine from 1 at step 0 to `least` at `steps`, one after the last step, and `least` from there
    on.

    Loshchilov & Hutter 2017 (arXiv 1608.03983), equation 5 without restarts; torch's CosineAnnealingLR with
    T_max = steps.
    """
    return least + (1 - least) * (1 + cos(pi * _share(step, steps))) / 2


def linear(step: int, steps: int, least: float = 0.0) -> float:
    """A straight line from 1 at step 0 to `least` at `steps`, one after the last step, and then `least`."""
    return 1 - (1 - least) * _share(step, steps)


def milestones(step: int, at: Sequence[int], factor: float) -> float:
    """`factor` once for each number of steps in `at` that is done (He et al. 2016); torch's MultiStepLR."""
    return factor ** sum(step >= one for one in at)


def _share(step: int, steps: int) -> float:
    """The share of `steps` that is done before this one, between 0 and 1."""
    return min(max(step / steps, 0.0), 1.0)


class Replayed:
    """An environment without `state_dict`, saved as its seed and the actions since its last reset.

    `make` gives a new environment with `reset(seed=...)` and `step(action)`, whose answers are a function of
    the seed and the actions. Actions are numbers, lists of numbers or tensors. A resumed phase takes the
    actions again.
    """

    def __init__(self, make: Callable[[], Any], seed: int):
        self.environment, self._seed = make(), seed
        self._episode, self._actions = 0, list[Any]()

    def reset(self) -> Any:
        """Begins a new episode and returns what the environment's own `reset` does."""
        self._episode, self._actions = self._episode + 1, []
        return self.environment.reset(seed=derive_seed(self._seed, "episode", self._episode))

    def step(self, action: Any) -> Any:
        """Takes an action and returns what the environment's own `step` does."""
        self._actions.append(action.detach().clone() if isinstance(action, Tensor) else action)
        return self.environment.step(action)

    def state_dict(self) -> dict[str, Any]:
        return {"episode": self._episode, "actions": list(self._actions)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._episode, self._actions = state_dict["episode"] - 1, []
        if state_dict["episode"]:
            self.reset()
        for action in state_dict["actions"]:
            self.step(action)
