"""The training phases of NSGF++ (Algorithm 3, page 13), each with its own network, optimiser and data.

Phases 2 and 3 train on independent source and target points, never on the outputs of phase 1. Points (n, 2) and images
(n, c, s, s) take the same way; only the networks differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nsgf import config as settings
from nsgf import geomloss_velocity, inception, sinkhorn
from nsgf.flow import Velocity, euler_flow
from nsgf.laws import ImageLaws, Laws, PointLaws
from nsgf.networks import ImageClassifier, TimeMLP, TimePredictorCNN, TimePredictorMLP
from nsgf.unet import UNet
from repro import rounds
from repro.errors import BadInput
from repro.loop import rounds_folder
from repro.phases import Draw, Phase, SingleLossPhase, SingleLossState, StepOptions, Work
from repro.randomness import generator
from repro.rounds import Rows
from repro.runtime import Runtime, progress
from repro.update import Update

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
ROUNDS_KEPT = 3
"""Parts of the pool that lie on the disk at a time: of the newest saved state, of the one before it, and the one that is built."""


def make_phases(config: settings.PointConfig | settings.ImageConfig, runtime: Runtime) -> list[Phase]:
    """The phases of an experiment in the order in which they run."""
    if isinstance(config, settings.ImageConfig):
        return _image_phases(config, runtime)
    laws, phases = PointLaws(config.data.source, config.data.target), config.phases
    made: list[Phase] = [
        VelocityField("velocity_field", phases.velocity_field, laws, config.sinkhorn, runtime),
        StraightFlow("straight_flow", phases.straight_flow, laws, runtime),
        TimePredictor("time_predictor", phases.time_predictor, laws, runtime),
    ]
    if phases.velocity_field_100 is not None:
        made.append(VelocityField("velocity_field_100", phases.velocity_field_100, laws, config.sinkhorn, runtime))
    if phases.ot_cfm is not None:
        made.append(StraightFlow("ot_cfm", phases.ot_cfm, laws, runtime))
    return made


def _image_phases(config: settings.ImageConfig, runtime: Runtime) -> list[Phase]:
    laws, phases = ImageLaws(config.data.set, config.data.flip, runtime.data_root, runtime.stand_in_data), config.phases
    return [
        VelocityField("velocity_field", phases.velocity_field, laws, config.sinkhorn, runtime),
        StraightFlow("straight_flow", phases.straight_flow, laws, runtime),
        TimePredictor("time_predictor", phases.time_predictor, laws, runtime),
        FeatureClassifier("feature_classifier", phases.feature_classifier, laws, runtime, config.evaluation.inception),
    ]


def make_velocity(config: settings.Sinkhorn) -> Velocity:
    """The velocity of the Sinkhorn gradient flow (eq. 13, page 4) in the implementation that `config` names."""
    values = {"blur": config.blur, "scaling": config.scaling}
    if config.implementation == "closed_form":
        return partial(sinkhorn.velocity, **values)
    backend = config.implementation.removeprefix("geomloss_")
    return partial(geomloss_velocity.velocity, backend=backend, **values)


class NSGFPhase(SingleLossPhase):
    """What the phases share: Adam without weight decay (appendix E.2, page 14), the laws, the machine."""

    def __init__(self, name: str, config: settings.Training, laws: Laws, runtime: Runtime):
        self.name = name
        self.iterations = config.iterations
        if isinstance(config, StepOptions):
            self.options = config
        self.config = config
        self.laws = laws
        self.runtime = runtime

    def make_model(self) -> nn.Module:
        return make_velocity_network(self.config.network, self.laws.shape)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)

    def check(self, folder: Path) -> list[str]:
        self.laws.check()
        self.runtime.world.require_rows(self.config.batch_size, self.name)
        return []

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        n = self.config.batch_size
        return {"x_0": torch.zeros(n, *self.laws.shape), "y": torch.zeros(n, *self.laws.shape), "t": torch.zeros(n)}

    def release(self) -> None:
        self.laws.release()


class VelocityField(NSGFPhase):
    """Phase 1: regression of v_theta on the velocities of a pool of minibatch Sinkhorn flows (Algorithm 1, page 5).

    The pool is the data of a round. It is built once, or, with resident batches, one part of it after the other, each for
    an equal number of steps.
    """

    config: settings.PointVelocityField | settings.ImageVelocityField
    collects_from_seed = True

    def __init__(
        self, name: str, config: settings.Training, laws: Laws, sinkhorn_config: settings.Sinkhorn, runtime: Runtime
    ):
        super().__init__(name, config, laws, runtime)
        self.velocity = make_velocity(sinkhorn_config)
        size = config.pool
        self.columns = {"x_t": laws.shape, "v_t": laws.shape, "t": ()}
        self.pool_precision = PRECISIONS[getattr(size, "precision", "float32")]
        self.resident = getattr(size, "resident_batches", None) or size.batches
        self.parts = math.ceil(size.batches / self.resident)
        self.collect_every = math.ceil(self.iterations / self.parts)
        self.entries_of_batch = size.batch_size * config.flow.steps
        self.seed = 0

    def check(self, folder: Path) -> list[str]:
        """Raises BadInput, with what would fit, when the disk has no room for the pool."""
        told = super().check(folder)
        needed, there, key = (
            self.storage()["pool"],
            rounds.room(rounds_folder(self, folder)),
            f"phases.{self.name}.pool",
        )
        if needed > there:
            ways = " or ".join(f"--set {key}.{way}" for way in self._ways_to_fit(needed, there))
            found = f"found a pool of {rounds.gib(needed)}, expected at most {rounds.DISK_SHARE:.0%} of the free disk"
            raise BadInput(f"{key}: {found}, {rounds.gib(there)}" + f"; {ways}" * bool(ways))
        return told

    def _ways_to_fit(self, needed: int, there: int) -> Iterator[str]:
        """Overrides, each of which makes a pool that fits, with a tenth to spare: what is free changes."""
        size, there = self.config.pool, there * 10 // 11
        can_roll = isinstance(size, settings.ImagePool)
        if can_roll and size.precision == "float32" and needed // 2 <= there:
            yield "precision=float16"
        of_batch = self.entries_of_batch * self._bytes_of_row()
        most = there // of_batch // (ROUNDS_KEPT if can_roll else 1)
        if most:
            yield f"{'resident_batches' if can_roll else 'batches'}={most}"

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, nn.Module]) -> None:
        self.seed = seed

    def collect(self, state: SingleLossState, update: Update) -> Rows:
        """The pairs (x_t, v_t) and times of every state of every minibatch of this part of the pool."""
        first = update.step_number // self.collect_every * self.resident
        batches = range(first, min(first + self.resident, self.config.pool.batches))
        pool = update.room(len(batches) * self.entries_of_batch, self.columns, self.pool_precision)
        world, n = self.runtime.world, self.config.pool.batch_size
        for batch in progress(world.share(batches), f"{self.name} pool", shown=world.first):
            for k, rows in enumerate(self.trajectory(batch)):
                pool.put((batch - first) * self.entries_of_batch + k * n, **rows)
        return pool

    def trajectory(self, batch: int) -> Iterator[dict[str, Tensor]]:
        """The rows of one minibatch of the pool, state after state."""
        size, flow = self.config.pool, self.config.flow
        x_0, y = self.laws.draw(size.batch_size, generator(self.seed, self.name, "pool", batch))
        # Optimal transport knows points, not images: (n, c, s, s) would be read as n clouds.
        x_0, y = x_0.flatten(1).to(self.runtime.device), y.flatten(1).to(self.runtime.device)
        for state in euler_flow(x_0, y, self.velocity, steps=flow.steps, step_size=flow.step_size):
            yield {
                "x_t": state.x_t.unflatten(1, self.laws.shape),
                "v_t": state.v_t.unflatten(1, self.laws.shape),
                "t": torch.full((size.batch_size,), state.t),
            }

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        minibatch = super().rehearse(earlier)
        return {"x_t": minibatch["x_0"], "v_t": minibatch["y"], "t": minibatch["t"]}

    def work(self) -> list[Work]:
        size, flow = self.config.pool, self.config.flow
        if getattr(self.velocity, "keywords", {}).get("backend") == "online":
            return []  # KeOps compiles kernels of its own, which no tracker of operations sees
        shape = (size.batch_size, math.prod(self.laws.shape))
        # The annealing starts at the diameter of the points, a value. That of noise bounds images too: they lie in [-1, 1].
        stream = generator(0, self.name, "rehearsal")
        from_data = isinstance(self.laws, ImageLaws)
        points = [torch.randn(shape, generator=stream)] * 2 if from_data else self.laws.draw(shape[0], stream)
        velocity = partial(self.velocity, diameter=sinkhorn.bounding_diameter(*points))

        def run() -> None:
            x_0, y = torch.zeros(shape), torch.zeros(shape)
            for _ in euler_flow(x_0, y, velocity, steps=1, step_size=flow.step_size):
                pass

        return [Work(f"pool: a Sinkhorn velocity of {shape[0]} particles", run, size.batches * flow.steps)]

    def storage(self) -> dict[str, int]:
        kept = 1 if self.parts == 1 else ROUNDS_KEPT
        return {"pool": kept * self.resident * self.entries_of_batch * self._bytes_of_row()}

    def _bytes_of_row(self) -> int:
        return (2 * math.prod(self.laws.shape) + 1) * self.pool_precision.itemsize

    def minibatch(self, step: int, draw: Draw) -> dict[str, Tensor]:
        return draw.collected.sample(self.config.batch_size, draw)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch["x_t"], batch["t"]).float(), batch["v_t"])


class StraightFlow(NSGFPhase):
    """Phase 2: u_delta on straight lines between independent pairs, which is flow matching (FM) with sigma = 0.

    With `coupling: optimal_transport` the pairs of a minibatch are matched first: OT-CFM.
    """

    config: settings.PointStraightFlow | settings.ImageStraightFlow

    @property
    def minibatch_defines(self) -> str:
        return "which pairs are matched" if self.config.coupling == "optimal_transport" else ""

    def minibatch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x_0, y = self.laws.draw(self.config.batch_size, generator)
        if self.config.coupling == "optimal_transport":
            y = y[optimal_assignment(x_0, y)]
        return {"x_0": x_0, "y": y, "t": draw_times(len(x_0), generator)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        x_0, y, t = batch["x_0"], batch["y"], batch["t"]
        return nn.functional.mse_loss(model(interpolate(x_0, y, t), t).float(), y - x_0)


class TimePredictor(NSGFPhase):
    """Phase 3: t_phi regresses the time of a point between independent source and target points."""

    config: settings.PointTimePredictor | settings.ImageTimePredictor

    def make_model(self) -> nn.Module:
        network, shape = self.config.network, self.laws.shape
        if isinstance(network, settings.MLP):
            return TimePredictorMLP(*shape, network.width, network.hidden_layers, network.activation)
        return TimePredictorCNN(image_size=shape[1], image_channels=shape[0], channels=network.channels)

    def minibatch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x_0, y = self.laws.draw(self.config.batch_size, generator)
        return {"x_0": x_0, "y": y, "t": draw_times(len(x_0), generator)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        x_t = interpolate(batch["x_0"], batch["y"], batch["t"])
        return nn.functional.mse_loss(model(x_t).float(), batch["t"])


class FeatureClassifier(NSGFPhase):
    """Phase 4, not of the paper: a small classifier of the training images, whose features the evaluation compares samples in."""

    config: settings.FeatureClassifier
    laws: ImageLaws

    def __init__(
        self, name: str, config: settings.FeatureClassifier, laws: ImageLaws, runtime: Runtime, inception_too: bool
    ):
        super().__init__(name, config, laws, runtime)
        self.inception_too = inception_too

    def check(self, folder: Path) -> list[str]:
        super().check(folder)
        root = self.runtime.data_root
        if not self.inception_too or inception.find_weights(root) is not None:
            return []
        return [f"FID and IS will not be measured: {inception.missing(root)}"]

    def make_model(self) -> nn.Module:
        size = self.laws.shape
        return ImageClassifier(
            image_size=size[1], image_channels=size[0], channels=self.config.network.channels, classes=10
        )

    def minibatch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, label = self.laws.draw_labelled(self.config.batch_size, generator)
        return {"x": x, "label": label}

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        n = self.config.batch_size
        return {"x": torch.zeros(n, *self.laws.shape), "label": torch.zeros(n, dtype=torch.long)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]).float(), batch["label"])

    def expected_initial_loss(self) -> float:
        return math.log(10)


def make_velocity_network(network: settings.MLP | settings.UNet, shape: tuple[int, ...]) -> nn.Module:
    """v_theta or u_delta for points or images of `shape`. Raises BadInput for sizes that do not fit together."""
    if isinstance(network, settings.MLP):
        return TimeMLP(*shape, network.width, network.hidden_layers, network.activation)
    try:
        return UNet(image_size=shape[1], image_channels=shape[0], **network.model_dump())
    except ValueError as error:
        raise BadInput(f"phases.*.network: {error}") from None


def draw_times(n: int, generator: torch.Generator) -> Tensor:
    """n times, uniform on [0, 1)."""
    return torch.rand(n, generator=generator)


def interpolate(x_0: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """X_t = t Y + (1 - t) X_0 (Algorithm 3): x_0, y (n, ...), t (n,)."""
    weight = t.view(-1, *[1] * (x_0.ndim - 1))
    return weight * y + (1 - weight) * x_0


def optimal_assignment(x_0: Tensor, y: Tensor) -> Tensor:
    """The permutation of y, (n,), that minimises the sum of squared distances to x_0: exact OT of equal uniform weights."""
    cost = torch.cdist(x_0.flatten(1), y.flatten(1)).square()
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=y.device)
