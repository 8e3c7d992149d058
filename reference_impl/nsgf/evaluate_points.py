"""The evaluation of a run in two dimensions: every method's samples against one test set, each distance beside its sampling floor."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

import torch
from torch import Tensor, nn

from nsgf import data, sample
from nsgf.config import PointConfig, PointEvaluation, PointVelocityField
from nsgf.metrics import sinkhorn_divergence, transport_distances
from repro.method import Evaluation
from repro.randomness import generator
from repro.runtime import Runtime, progress

CURVE_STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Numbers of Euler steps of the figure "W2 against number of steps"."""


def evaluate(config: PointConfig, models: Mapping[str, nn.Module], seed: int, runtime: Runtime) -> Evaluation:
    """Metrics named `<method>.<steps>.<metric>` and `floor.<metric>`, and the tensors of the figures.

    Methods: nsgf (each velocity field at the number of steps of its own pool), nsgf_resampled (the finest velocity
    field at other numbers of steps), fm, ot_cfm, nsgf_plus_plus.
    """
    protocol, device = config.evaluation, runtime.device
    x_0 = data.sample(config.data.source, protocol.test_points, generator(seed, "evaluate", "source")).to(device)
    test = data.sample(config.data.target, protocol.test_points, generator(seed, "evaluate", "test")).to(device)
    paths = _paths(config, models, x_0)
    plus_plus = _plus_plus(config, models, x_0)

    metrics: dict[str, float] = {}
    for name, x in progress(
        {**{name: path[-1] for name, path in paths.items()}, "nsgf_plus_plus": plus_plus.x}.items(), "evaluate"
    ):
        table_entry = (
            name == "nsgf_plus_plus" or name.startswith("nsgf.") or int(name.split(".")[1]) in protocol.euler_steps
        )
        distances = _distances(x, test, protocol) if table_entry else transport_distances(x, test)
        metrics |= {f"{name}.{metric}": value for metric, value in distances.items()}
    metrics |= _floor(config, seed, device)
    metrics |= {
        "nsgf_plus_plus.nfe": float(plus_plus.nfe.double().mean()),
        "nsgf_plus_plus.handover_time.mean": float(plus_plus.t_handover.mean()),
        "nsgf_plus_plus.handover_time.std": float(plus_plus.t_handover.std()),
    }

    tensors = {f"samples.{name}": path[-1] for name, path in paths.items()}
    tensors |= {f"path.{name}": path[:, : protocol.path_points] for name, path in paths.items()}
    tensors |= {
        "samples.nsgf_plus_plus": plus_plus.x,
        "handover.x": plus_plus.x_handover,
        "handover.t": plus_plus.t_handover,
    }
    tensors |= {"test": test, "source": x_0}
    return Evaluation(metrics, {name: tensor.cpu() for name, tensor in tensors.items()})


def _paths(config: PointConfig, models: Mapping[str, nn.Module], x_0: Tensor) -> dict[str, Tensor]:
    """The path (steps + 1, n, d) of every method at every number of steps."""
    fields = {"velocity_field": config.phases.velocity_field, "velocity_field_100": config.phases.velocity_field_100}
    fields = {name: phase for name, phase in fields.items() if phase is not None}
    paths = {}
    for name, phase in fields.items():
        paths[f"nsgf.{phase.flow.steps}"] = sample.sinkhorn_flow(
            models[name], x_0, steps=phase.flow.steps, horizon=_horizon(phase)
        )
    finest = max(fields, key=lambda name: fields[name].flow.steps)
    for steps in CURVE_STEPS:
        paths[f"nsgf_resampled.{steps}"] = sample.sinkhorn_flow(
            models[finest], x_0, steps=steps, horizon=_horizon(fields[finest])
        )
        paths[f"fm.{steps}"] = sample.straight_flow(models["straight_flow"], x_0, steps=steps)
        if "ot_cfm" in models:
            paths[f"ot_cfm.{steps}"] = sample.straight_flow(models["ot_cfm"], x_0, steps=steps)
    return paths


def _plus_plus(config: PointConfig, models: Mapping[str, nn.Module], x_0: Tensor) -> sample.PlusPlusSamples:
    flow = config.phases.velocity_field.flow
    return sample.nsgf_plus_plus(
        models["velocity_field"],
        models["straight_flow"],
        models["time_predictor"],
        x_0,
        flow_steps=flow.steps,
        sinkhorn_steps=config.nsgf_plus_plus.sinkhorn_steps,
        step_size=flow.step_size,
        straight_flow_step=config.nsgf_plus_plus.straight_flow_step,
    )


def _horizon(phase: PointVelocityField) -> float:
    return phase.flow.steps * phase.flow.step_size


def _distances(x: Tensor, test: Tensor, protocol: PointEvaluation) -> dict[str, float]:
    divergence = sinkhorn_divergence(x, test, blur=protocol.sinkhorn_blur, scaling=protocol.sinkhorn_scaling)
    return {**transport_distances(x, test), "sinkhorn_divergence": divergence}


def _floor(config: PointConfig, seed: int, device: torch.device) -> dict[str, float]:
    """The mean of each distance between two independent samples of the target, as large as the test set."""
    protocol = config.evaluation
    draws = []
    for draw in range(protocol.floor_draws):
        stream = generator(seed, "evaluate", "floor", draw)
        one, other = (data.sample(config.data.target, protocol.test_points, stream).to(device) for _ in range(2))
        draws.append(_distances(one, other, protocol))
    return {f"floor.{metric}": mean(draw[metric] for draw in draws) for metric in draws[0]}
