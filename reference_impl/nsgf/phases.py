"""The training phases of NSGF++ (Algorithm 3, page 13), each with its own network, optimiser and data.

Phases 2 and 3 train on independent source and target points, never on the outputs of phase 1. Points (n, 2) and images
(n, c, s, s) take the same way; only the networks differ.
"""

from __future__ import annotations

import math
from bisect import bisect
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
from repro.errors import BadInput
from repro.phases import Phase, SingleLossPhase, StepOptions, Work
from repro.pool import DISK_SHARE, MEMORY_SHARE, Placement, Pool, free, gib, make_file, place, publish, width
from repro.randomness import generator
from repro.runtime import Runtime, progress

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


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
        self.runtime.world.require_shares(self.config.batch_size, self.name)
        return []

    def rehearse(self, earlier: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        n = self.config.batch_size
        return {"x_0": torch.zeros(n, *self.laws.shape), "y": torch.zeros(n, *self.laws.shape), "t": torch.zeros(n)}

    def release(self) -> None:
        self.laws.release()


class VelocityField(NSGFPhase):
    """Phase 1: regression of v_theta on the velocities of a pool of minibatch Sinkhorn flows (Algorithm 1, page 5)."""

    config: settings.PointVelocityField | settings.ImageVelocityField

    def __init__(
        self, name: str, config: settings.Training, laws: Laws, sinkhorn_config: settings.Sinkhorn, runtime: Runtime
    ):
        super().__init__(name, config, laws, runtime)
        self.velocity = make_velocity(sinkhorn_config)
        size = config.pool
        self.columns = {"x_t": laws.shape, "v_t": laws.shape, "t": ()}
        self.pool_precision = PRECISIONS[getattr(size, "precision", "float32")]
        self.resident = getattr(size, "resident_batches", None)  # None: the pool holds all its minibatches
        self.entries_of_batch = size.batch_size * config.flow.steps
        self.pool: Pool | None = None
        self.entered = 0
        self.seed = 0

    @property
    def capacity(self) -> int:
        """Entries that the pool holds at a time."""
        return (self.resident or self.config.pool.batches) * self.entries_of_batch

    def check(self, folder: Path) -> list[str]:
        super().check(folder)
        placement = self.placement(folder / "scratch")
        kept = "" if placement.kept else "; it is not kept on disk, a killed run builds it again"
        return [
            f"the pool is kept {'in memory' if placement.storage == 'memory' else 'on disk'}: {placement.reason}{kept}"
        ]

    def placement(self, scratch: Path) -> Placement:
        """Where the pool can be kept. Raises BadInput, with what would fit, when it can be kept nowhere."""
        nbytes = self.capacity * width(self.columns) * self.pool_precision.itemsize
        found = self._place(nbytes, scratch, rolling=self.resident is not None)
        if found is None:
            key = f"phases.{self.name}.pool"
            ways = " or ".join(f"--set {key}.{way}" for way in self._ways_to_fit(nbytes, scratch))
            raise BadInput(
                f"{key}: found a pool of {gib(nbytes)}, expected at most {self._room(scratch)}"
                + (f"; {ways}" if ways else "")
            )
        return found

    def _place(self, nbytes: int, scratch: Path, rolling: bool) -> Placement | None:
        asked, processes = self.runtime.pool_storage, self.runtime.world.size
        if not rolling:
            own = sum(path.stat().st_blocks * 512 for path in scratch.glob("pool.safetensors*"))
            return place(nbytes, scratch, asked=asked, processes=processes, own=own)
        # Never a file, and every process has one of its own.
        found = place(processes * nbytes, scratch, asked="memory" if asked == "memory" else "auto", processes=1)
        return Placement("memory", False, found.reason) if found and found.storage == "memory" else None

    def _room(self, scratch: Path) -> str:
        """What `_place` holds a pool against, in words."""
        asked, processes = self.runtime.pool_storage, self.runtime.world.size
        memory, disk = free(scratch)
        share = f"{1 if asked == 'memory' else MEMORY_SHARE:.0%} of {gib(memory)} of available memory"
        if self.resident is not None:
            return share + (f" for all of the {processes} processes" if processes > 1 else "")
        places = [share] * (asked != "disk" and processes == 1)
        places += [f"{DISK_SHARE:.0%} of {gib(disk)} of free disk"] * (asked != "memory")
        return " or ".join(places)

    def _ways_to_fit(self, nbytes: int, scratch: Path) -> Iterator[str]:
        """Overrides, each of which makes a pool that fits, with a tenth to spare: what is free changes."""

        def fits(nbytes: int, rolling: bool) -> bool:
            return self._place(11 * nbytes // 10, scratch, rolling) is not None

        size, of_batch = self.config.pool, nbytes * self.entries_of_batch // self.capacity
        can_roll = isinstance(size, settings.ImagePool)
        if can_roll and size.precision == "float32" and fits(nbytes // 2, rolling=self.resident is not None):
            yield "precision=float16"
        most = bisect(range(1, size.batches + 1), False, key=lambda n: not fits(n * of_batch, rolling=can_roll))
        if most:
            yield f"{'resident_batches' if can_roll else 'batches'}={most}"

    def prepare(self, seed: int, scratch: Path, earlier: Mapping[str, nn.Module]) -> None:
        self.seed = seed
        if self.resident is not None:
            self.pool, self.entered = Pool(self.capacity, self.columns, self.pool_precision), 0
            return
        path, placement = scratch / "pool.safetensors", self.placement(scratch)
        try:
            self.pool = Pool.load(path)
            missing = False
        except ValueError:  # none yet, or a damaged one: the same seed builds the same pool
            missing = True
        if self.runtime.world.any(missing):
            if placement.storage == "memory":
                self.pool = self.build_pool(seed)
                if placement.kept:
                    self.pool.save(path)
            else:
                self.pool = self.build_pool_in_file(seed, path)
        elif placement.storage == "memory":
            self.pool.into_memory()

    def build_pool(self, seed: int) -> Pool:
        """The pairs (x_t, v_t) and times of every state of every minibatch, in memory."""
        pool = Pool(self.capacity, self.columns, self.pool_precision)
        for batch in progress(range(self.config.pool.batches), f"{self.name} pool"):
            for rows in self.trajectory(seed, batch):
                pool.add(**rows)
        return pool

    def build_pool_in_file(self, seed: int, path: Path) -> Pool:
        """The same in a file; each process builds its share of the minibatches."""
        world, partial_file = self.runtime.world, path.with_name(path.name + ".partial")
        if world.first:
            make_file(partial_file, self.capacity, self.columns, self.pool_precision)
        world.barrier()
        pool = Pool.in_file(partial_file, self.capacity, self.columns, self.pool_precision)
        batches = world.share(range(self.config.pool.batches))
        for batch in progress(batches, f"{self.name} pool", shown=world.first):
            for k, rows in enumerate(self.trajectory(seed, batch)):
                pool.replace(batch * self.entries_of_batch + k * self.config.pool.batch_size, **rows)
        del pool
        world.barrier()
        if world.first:
            publish(partial_file, path)
        world.barrier()
        return Pool.load(path)

    def trajectory(self, seed: int, batch: int) -> Iterator[dict[str, Tensor]]:
        """The rows of one minibatch of the pool, state after state."""
        size, flow = self.config.pool, self.config.flow
        x_0, y = self.laws.draw(size.batch_size, generator(seed, self.name, "pool", batch))
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
        return {"pool": self.capacity * width(self.columns) * self.pool_precision.itemsize}

    def renew(self, step: int) -> None:
        """Brings a pool with resident batches to where it is at `step`: a function of the step alone, so that a resumed run has the same."""
        last = max(1, self.iterations - 1)  # the step at which the last minibatch enters
        entered = self.resident + step * (self.config.pool.batches - self.resident) // last
        new = range(max(self.entered, entered - self.resident), entered)
        for batch in sorted(new, key=lambda batch: batch % self.resident):
            for k, rows in enumerate(self.trajectory(self.seed, batch)):
                if self.entered == 0:
                    self.pool.add(**rows)
                else:
                    first = batch % self.resident * self.entries_of_batch
                    self.pool.replace(first + k * self.config.pool.batch_size, **rows)
        self.entered = entered

    def minibatch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.resident is not None:
            self.renew(step)
        return self.pool.sample(self.config.batch_size, generator)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch["x_t"], batch["t"]).float(), batch["v_t"])

    def release(self) -> None:
        super().release()
        self.pool = None


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
