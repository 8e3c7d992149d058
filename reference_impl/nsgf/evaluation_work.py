"""What the evaluation does on the device, network by network, for `repro memory`: no data set, no value is read.

Each item is one evaluation of a network on as many samples as the evaluation takes at a time, with what stands around it. In
Algorithm 4 a sample takes as many steps of the straight flow as its own predicted time leaves; here all samples move at every step,
and the number of steps is that of the expected hand-over. The exact transport distances run on the CPU. FID's Inception network is
not in it: it is not built without its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nsgf import images, sample, sinkhorn
from nsgf.config import ImageConfig, PointConfig
from nsgf.evaluate_images import NEAREST_CHUNK, expected_handover
from nsgf.evaluate_points import CURVE_STEPS
from nsgf.laws import PointLaws
from nsgf.metrics import divergence_tensor
from repro.phases import Work
from repro.randomness import generator
from repro.runtime import Runtime

TRAINING_IMAGES = {"digits": 1_497, "mnist": 60_000, "cifar10": 50_000, "cifar10_jpeg": 50_000}


def evaluation_work(config: PointConfig | ImageConfig, models: Mapping[str, nn.Module], runtime: Runtime) -> list[Work]:
    """The work of an experiment's evaluation."""
    return _points(config, models) if isinstance(config, PointConfig) else _images(config, models)


def _points(config: PointConfig, models: Mapping[str, nn.Module]) -> list[Work]:
    protocol, n = config.evaluation, config.evaluation.test_points
    fields = [name for name in ("velocity_field", "velocity_field_100") if name in models]
    own_steps = [getattr(config.phases, name).flow.steps for name in fields]
    straight = [name for name in ("straight_flow", "ot_cfm") if name in models]
    refined = _refining_steps(config)
    network_steps = {
        "velocity_field": sum(own_steps) + sum(CURVE_STEPS) + config.nsgf_plus_plus.sinkhorn_steps,
        "straight_flow": len(straight) * sum(CURVE_STEPS) + refined,
    }
    work = [
        Work(f"{name}: a step of {n} points", _euler_step(models[name], (n, 2)), steps)
        for name, steps in network_steps.items()
    ]
    work.append(Work(f"time_predictor: {n} points", _predict(models["time_predictor"], (n, 2)), 1))

    x, y = PointLaws(config.data.source, config.data.target).draw(n, generator(0, "evaluate", "rehearsal"))
    setting = {"blur": protocol.sinkhorn_blur, "scaling": protocol.sinkhorn_scaling}
    diameter = sinkhorn.bounding_diameter(x, y)

    def divergence() -> Tensor:
        return divergence_tensor(torch.zeros(n, 2), torch.zeros(n, 2), **setting, diameter=diameter)

    table = len(fields) + 1 + len(straight) * len(protocol.euler_steps) + protocol.floor_draws
    return [*work, Work(f"Sinkhorn divergence of {n} and {n} points", divergence, table)]


def _images(config: ImageConfig, models: Mapping[str, nn.Module]) -> list[Work]:
    protocol, shape = config.evaluation, images.SOURCES[config.data.set].shape
    chunks = math.ceil(protocol.samples / protocol.batch_size)
    chunk = (min(protocol.batch_size, protocol.samples), *shape)
    classifier, stored = models["feature_classifier"], TRAINING_IMAGES[config.data.set]
    refined = _refining_steps(config) + sum(
        math.ceil((1 - time) / config.nsgf_plus_plus.straight_flow_step) for time in protocol.handover_times
    )

    def features() -> Tensor:
        found = classifier.features(images.to_images(torch.zeros(chunk, dtype=torch.uint8), 255))
        return classifier.scores(found).softmax(1)

    def nearest() -> Tensor:
        size = math.prod(shape)
        queries = [torch.zeros(protocol.nearest, size, dtype=torch.float64) for _ in range(1 + config.data.flip)]
        y = torch.zeros(min(NEAREST_CHUNK, stored), size, dtype=torch.float64)
        length = y.square().sum(1)
        squared = [x.square().sum(1, keepdim=True) + length - 2 * (x @ y.T) for x in queries]
        return torch.stack(squared).amin(0).min(1).values

    n = chunk[0]
    judged = 3 + len(protocol.euler_steps) + len(protocol.handover_times)
    return [
        Work(
            f"velocity_field: a step of {n} images",
            _euler_step(models["velocity_field"], chunk),
            chunks * config.nsgf_plus_plus.sinkhorn_steps,
        ),
        Work(f"time_predictor: {n} images", _predict(models["time_predictor"], chunk), chunks),
        Work(
            f"straight_flow: a refining step of {n} images",
            _refining_step(models["straight_flow"], chunk),
            chunks * refined,
        ),
        Work(
            f"straight_flow: a step of {n} images",
            _euler_step(models["straight_flow"], chunk),
            chunks * sum(set(protocol.euler_steps)),
        ),
        Work(f"feature_classifier: {n} images", features, chunks * judged + math.ceil(stored / n)),
        Work(
            f"distances of {protocol.nearest} images to {min(NEAREST_CHUNK, stored)}",
            nearest,
            2 * math.ceil(stored / NEAREST_CHUNK),
        ),
    ]


def _refining_steps(config: PointConfig | ImageConfig) -> int:
    """Steps of the straight flow from the expected hand-over to time 1."""
    plus_plus, flow = config.nsgf_plus_plus, config.phases.velocity_field.flow
    left = 1 - expected_handover(plus_plus.sinkhorn_steps, flow.step_size)
    return math.ceil(left / plus_plus.straight_flow_step)


def _euler_step(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """One step from x_0, which the evaluation keeps, with the state before it."""

    def run() -> Tensor:
        x_0, x = torch.zeros(shape), torch.zeros(shape)
        return x + 0.01 * model(x, x_0.new_full((len(x_0),), 0.0))

    return run


def _predict(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: model(torch.zeros(shape))


def _refining_step(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    def run() -> None:
        noise, handed_over = torch.zeros(shape), torch.zeros(shape)
        x, t, size = handed_over.clone(), torch.zeros(len(noise)), torch.zeros(len(noise))
        sample.refine_step(model, x, t, size, 0, moving=torch.arange(len(x)))

    return run
