"""The evaluation of a run on images: samples against real images in the features of two networks, network evaluations
as counted, nearest training images, predicted hand-over times.

Samples are rounded to the pixels of the set before anything looks at them, because the real images are whole pixels.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsgf import images, inception, sample
from nsgf.config import ImageConfig
from nsgf.images import ImageSet, to_images, to_pixels
from nsgf.metrics import frechet_distance
from nsgf.networks import ImageClassifier
from repro.errors import RunFailed
from repro.method import Evaluation
from repro.randomness import generator
from repro.runtime import Runtime, progress

NEAREST_CHUNK = 2_000


@dataclass(frozen=True)
class Samples:
    """Pixels (n, c, s, s) uint8 on the CPU, and the network evaluations that one sample took, on average and as counted."""

    pixels: Tensor
    nfe: float


def evaluate(config: ImageConfig, models: Mapping[str, nn.Module], seed: int, runtime: Runtime) -> Evaluation:
    """Metrics `<method>.<metric>`, `floor.<metric>`, `test.<metric>`, and the tensors of the figures.

    Methods: see `generate`. The floor are real images of the split that is not the reference, as many as there are samples
    or all of them; where they are fewer than the samples, their Fréchet distances come out larger for that alone.
    `nearest_train` is the median distance to the nearest training image, `nearest_train_min` the smallest; both are to be
    read beside those of the test images. Raises RunFailed when a sample is not finite.
    """
    protocol, device = config.evaluation, runtime.device
    sets = {
        split: images.load(config.data.set, split, runtime.data_root, stand_in=runtime.stand_in_data)
        for split in ("train", "test")
    }
    train, test, white = sets["train"], sets["test"], sets["test"].white
    x_0 = torch.randn(protocol.samples, *test.pixels.shape[1:], generator=generator(seed, "evaluate", "source"))
    methods, t_handover = generate(config, models, x_0, white, device)

    other = train if protocol.reference == "test" else test
    chosen = torch.randperm(len(other), generator=generator(seed, "evaluate", "floor"))[: protocol.samples]
    judged = {name: samples.pixels for name, samples in methods.items()} | {"floor": other.pixels[chosen]}

    metrics = {f"{name}.nfe": samples.nfe for name, samples in methods.items()}
    metrics |= _in_classifier(config, models["feature_classifier"], judged, sets, device)
    if protocol.inception:
        metrics |= _in_inception(config, judged, sets[protocol.reference], runtime)

    few = {
        "nsgf_plus_plus": methods["nsgf_plus_plus"].pixels[: protocol.nearest],
        "test": test.some(protocol.nearest),
    }
    nearest = {name: nearest_images(pixels, train, device, mirrored=config.data.flip) for name, pixels in few.items()}
    for name, (distance, _) in nearest.items():
        metrics |= {
            f"{name}.nearest_train": float(distance.median()),
            f"{name}.nearest_train_min": float(distance.min()),
        }
    metrics |= {
        "nsgf_plus_plus.handover_time.mean": float(t_handover.mean()),
        "nsgf_plus_plus.handover_time.std": float(t_handover.std()),
        "nsgf_plus_plus.handover_time.expected": expected_handover(
            config.nsgf_plus_plus.sinkhorn_steps, config.phases.velocity_field.flow.step_size
        ),
    }

    shown = {name: methods[name].pixels for name in ("nsgf", "nsgf_plus_plus")}
    shown |= {"fm": methods[f"fm.{max(protocol.euler_steps)}"].pixels, "real": test.some(protocol.pictures)}
    shown |= {"nearest": train.pixels[nearest["nsgf_plus_plus"][1]]}
    pictures = {"noise": x_0[: protocol.pictures]}
    pictures |= {name: to_images(pixels[: protocol.pictures], white) for name, pixels in shown.items()}
    tensors = {f"pictures.{name}": to_pixels(x) for name, x in pictures.items()}
    tensors |= {"handover.t": t_handover}
    tensors |= {f"nearest.{name}": distance for name, (distance, _) in nearest.items()}
    return Evaluation(metrics, tensors)


def generate(
    config: ImageConfig, models: Mapping[str, nn.Module], x_0: Tensor, white: int, device: torch.device
) -> tuple[dict[str, Samples], Tensor]:
    """What every method makes of the noise x_0 (n, c, s, s), and the predicted hand-over times (n,).

    Methods: nsgf_plus_plus (Algorithm 4), nsgf (its particles at the hand-over), handover_<percent> (the same particles,
    handed over at one time instead of the predicted ones), fm.<steps> (the straight flow alone, from noise). Each chunk goes
    through all of them, so nothing but x_0 is held in floats for all n.
    """
    protocol, settings, flow = config.evaluation, config.nsgf_plus_plus, config.phases.velocity_field.flow
    networks = [models[name] for name in ("velocity_field", "straight_flow", "time_predictor")]
    velocity_field, straight_flow, _ = networks
    handovers = {f"handover_{100 * time:.0f}": time for time in protocol.handover_times}
    pixels, evaluations, times = defaultdict(list), Counter(), []

    def keep(name: str, x: Tensor, count: int) -> None:
        if not x.isfinite().all():
            raise RunFailed(f"evaluation: found samples of {name} that are not finite")
        pixels[name].append(to_pixels(x, white).cpu())
        evaluations[name] += count

    for chunk in progress(x_0.split(protocol.batch_size), "samples"):
        noise = chunk.to(device)
        with counted(*networks) as whole, counted(velocity_field) as flowed:
            made = sample.nsgf_plus_plus(
                *networks,
                noise,
                flow_steps=flow.steps,
                sinkhorn_steps=settings.sinkhorn_steps,
                step_size=flow.step_size,
                straight_flow_step=settings.straight_flow_step,
            )
        keep("nsgf_plus_plus", made.x, whole())
        keep("nsgf", made.x_handover, flowed())
        times.append(made.t_handover.cpu())
        for name, time in handovers.items():
            at = torch.full_like(made.t_handover, time)
            with counted(straight_flow) as refined:
                x, _ = sample.refine(straight_flow, made.x_handover, at, step_size=settings.straight_flow_step)
            keep(name, x, flowed() + refined())
        for steps in sorted(set(protocol.euler_steps)):
            with counted(straight_flow) as straight:
                x = sample.end_of_straight_flow(straight_flow, noise, steps=steps)
            keep(f"fm.{steps}", x, straight())
    made_by = {name: Samples(torch.cat(parts), evaluations[name] / len(x_0)) for name, parts in pixels.items()}
    return made_by, torch.cat(times)


def expected_handover(steps: int, step_size: float) -> float:
    """1 - (1 - eta)^k: the time of the straight line at which a particle is after k steps, if each step covers the share
    eta of the way that is left, as it does where the transport plan is one-to-one and does not change."""
    return 1 - (1 - step_size) ** steps


@contextmanager
def counted(*models: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the samples that the models evaluate within the block: the number so far, by calling what is yielded."""
    total = 0

    def count(model: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += len(inputs[0])

    handles = [model.register_forward_hook(count) for model in models]
    try:
        yield lambda: total
    finally:
        for handle in handles:
            handle.remove()


def nearest_images(pixels: Tensor, stored: ImageSet, device: torch.device, *, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Euclidean distance of images in [-1, 1], (n,), from each of pixels (n, c, s, s) to the nearest stored image, and the
    index of that, (n,); the first of several that are as near. With `mirrored`, also to the stored images' mirror images.

    Exact: squared distances of whole pixels are whole numbers, far below 2^53 in float64. In float32 a copy would not
    have distance 0.
    """
    queries = [pixels, pixels.flip(3)] if mirrored else [pixels]  # |x - mirror(y)| = |mirror(x) - y|
    queries = [query.flatten(1).double().to(device) for query in queries]
    best, index = torch.full((len(pixels),), torch.inf, dtype=torch.float64), torch.zeros(len(pixels), dtype=torch.long)
    for start in range(0, len(stored), NEAREST_CHUNK):
        y = stored.pixels[start : start + NEAREST_CHUNK].flatten(1).double().to(device)
        length = y.square().sum(1)
        squared = [x.square().sum(1, keepdim=True) + length - 2 * (x @ y.T) for x in queries]
        found = torch.stack(squared).amin(0).min(1)
        nearer = found.values.cpu() < best
        best = torch.where(nearer, found.values.cpu(), best)
        index = torch.where(nearer, found.indices.cpu() + start, index)
    return (best.sqrt() * (2 / stored.white)).float(), index


def _in_classifier(
    config: ImageConfig,
    model: ImageClassifier,
    judged: Mapping[str, Tensor],
    sets: Mapping[str, ImageSet],
    device: torch.device,
) -> dict[str, float]:
    """Fréchet distances in the classifier's features, how sure it is of the class of an image, and how often it is right
    on the test split."""
    protocol, test = config.evaluation, sets["test"]

    def look(pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for chunk in pixels.split(protocol.batch_size):
            features = model.features(to_images(chunk.to(device), test.white))
            parts.append((features.double().cpu(), model.scores(features).softmax(1).cpu()))
        features, shares = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, shares

    real = {split: look(sets[split].pixels) for split in {"test", protocol.reference}}
    reference, shares = real[protocol.reference]
    metrics = {
        f"{protocol.reference}.confidence": float(shares.max(1).values.mean()),
        "classifier.accuracy": float((real["test"][1].argmax(1) == test.labels).double().mean()),
    }
    for name, pixels in judged.items():
        features, shares = look(pixels)
        metrics[f"{name}.classifier_frechet"] = frechet_distance(features, reference)
        metrics[f"{name}.confidence"] = float(shares.max(1).values.mean())
    return metrics


def _in_inception(
    config: ImageConfig, judged: Mapping[str, Tensor], reference: ImageSet, runtime: Runtime
) -> dict[str, float]:
    """FID and Inception score by torch-fidelity; nothing, and a line that says why, where its weights are not to be had."""
    weights = None if runtime.stand_in_data else inception.find_weights(runtime.data_root)
    if weights is None and not runtime.stand_in_data:
        print(f"FID and IS are not measured: {inception.missing(runtime.data_root)}", file=sys.stderr)
        return {}

    def in_bytes(pixels: Tensor) -> Tensor:
        return pixels if reference.white == 255 else to_pixels(to_images(pixels, reference.white))

    names = ("nsgf_plus_plus", f"fm.{max(config.evaluation.euler_steps)}", "floor")
    chosen = {name: in_bytes(judged[name]) for name in names}
    return inception.scores(chosen, in_bytes(reference.pixels), weights, runtime.device)
