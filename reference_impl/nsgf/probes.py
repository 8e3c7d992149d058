"""The library calls of an experiment, each with its shapes and an answer that was constructed (`repro probe`).

The answers: a cloud and its translation (the Sinkhorn velocity is the translation, W2^2 its squared length), a permutation
(the assignment is its inverse), a file written byte by byte, features shifted by a vector (FID is its squared length).
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nsgf import geomloss_velocity, images, inception, sinkhorn
from nsgf.config import ImageConfig, PointConfig
from nsgf.laws import ImageLaws
from nsgf.metrics import sinkhorn_divergence, transport_distances, w2_squared
from nsgf.phases import make_phases, make_velocity, optimal_assignment
from nsgf.torchvision_cpu import import_torchvision
from nsgf.unet import UNet
from repro.method import Probe
from repro.runtime import Runtime

SHIFT = 3.0
"""Length of the translations."""
NARROW = 0.01
"""Width of a cloud whose points share their targets at any blur of the paper. Points of width 1 in many dimensions do not: there a self
term that is wrong, or missing, changes nothing."""
FEATURES = 256
"""Width of the features whose FID is known. The square root of the matrix of all 2,048 takes three seconds, for the same formula."""


def probes(config: PointConfig | ImageConfig, runtime: Runtime) -> list[Probe]:
    """Every library call of an experiment."""
    kind = _of_points if isinstance(config, PointConfig) else _of_images
    return [*_velocities(config, runtime), *kind(config, runtime)]


def _velocities(config: PointConfig | ImageConfig, runtime: Runtime) -> Iterator[Probe]:
    """The velocity as configured, and GeomLoss' one, which a closed form must equal, at the shape of every pool."""
    settings = config.sinkhorn
    values = f"blur {settings.blur}, scaling {settings.scaling}"
    for phase in make_phases(config, runtime):
        if not hasattr(phase, "velocity"):
            continue
        image = phase.laws.shape if isinstance(phase.laws, ImageLaws) else None
        shape = (phase.config.pool.batch_size, int(np.prod(phase.laws.shape)))
        words = f"{shape} to {shape}, {values}"
        library = "torch" if settings.implementation == "closed_form" else "geomloss"
        call = partial(check_velocity, make_velocity(settings), shape, image, runtime.device)
        yield Probe(f"Sinkhorn velocity, {settings.implementation}", library, words, call)
        if settings.implementation == "closed_form":
            keywords = {"blur": settings.blur, "scaling": settings.scaling}
            reference = partial(geomloss_velocity.velocity, **keywords, backend="tensorized")
            call = partial(check_agreement, partial(sinkhorn.velocity, **keywords), reference, shape, runtime.device)
            yield Probe("Sinkhorn velocity, closed form = GeomLoss", "geomloss", words, call)


def _of_points(config: PointConfig, runtime: Runtime) -> Iterator[Probe]:
    protocol, coupled = config.evaluation, config.phases.ot_cfm
    shape = (protocol.test_points, 2)
    yield Probe("exact W2 squared, ot.emd2", "POT", f"{shape} to {shape}", partial(check_emd2, shape))
    settings = {"blur": protocol.sinkhorn_blur, "scaling": protocol.sinkhorn_scaling}
    words = f"{shape} to {shape}, blur {protocol.sinkhorn_blur}, scaling {protocol.sinkhorn_scaling}"
    yield Probe("Sinkhorn divergence", "geomloss", words, partial(check_divergence, shape, settings))
    if coupled is not None and coupled.coupling == "optimal_transport":
        yield _assignment((coupled.batch_size, 2))


def _of_images(config: ImageConfig, runtime: Runtime) -> Iterator[Probe]:
    shape = images.SOURCES[config.data.set].shape
    straight = config.phases.straight_flow
    if straight.coupling == "optimal_transport":
        yield _assignment((straight.batch_size, *shape))
    for network in (config.phases.velocity_field.network, straight.network):
        sizes = f"{network.channels} channels x {network.multipliers}, attention at {network.attention_resolutions}"
        make = partial(UNet, image_size=shape[1], image_channels=shape[0], **network.model_dump())
        yield Probe("UNet", "torch", f"(2, {', '.join(map(str, shape))}), {sizes}", partial(check_unet, make, shape))
    if config.data.set == "mnist":
        yield Probe("reader of MNIST", "torchvision", "two images of 28 x 28 in its files", check_mnist_reader)
    elif config.data.set == "digits":
        yield Probe("reader of digits", "scikit-learn", "1,797 images of 8 x 8", check_digits_reader)
    if config.evaluation.inception:
        sizes = f"(2, {', '.join(map(str, shape))}) uint8 to (2, 2048) and (2, 1008)"
        yield Probe("Inception network, weights at random", "torch-fidelity", sizes, partial(check_inception, shape))
        yield Probe("FID and IS of features", "torch-fidelity", f"(600, {FEATURES}) and (600, 1008)", check_scores)


def _assignment(shape: tuple[int, ...]) -> Probe:
    call = partial(check_assignment, shape)
    return Probe("optimal assignment, linear_sum_assignment", "scipy", f"{shape} to {shape}", call)


def check_velocity(velocity, shape: tuple[int, int], image: tuple[int, ...] | None, device: torch.device) -> None:
    """Translated clouds: the velocity of every particle is the translation. Images that are not flattened are refused."""
    x, shift = _translation(shape, device)
    # Points of width 1 share some targets where blur allows it; then it shows that the loop is truncated: 1 % at the paper's settings.
    for cloud, tolerance in ((x, 0.03 * SHIFT), (NARROW * x, 1e-3 * SHIFT)):
        v = velocity(cloud, cloud + shift)
        assert v.shape == x.shape and v.dtype == x.dtype, (
            f"found {tuple(v.shape)} {v.dtype}, expected {shape} {x.dtype}"
        )
        off = float((v - shift).abs().max())
        assert off < tolerance, f"found a velocity {off:.2g} off the translation, expected less than {tolerance:.2g}"
    if image is not None:
        for wrong in (x.unflatten(1, image), x.unflatten(1, (image[0] * image[1], image[2]))):
            try:
                velocity(wrong, wrong + 1)
            except ValueError:
                continue
            raise AssertionError(f"found images {tuple(wrong.shape)} accepted, expected only (points, dimensions)")


def check_agreement(velocity, reference, shape: tuple[int, int], device: torch.device) -> None:
    """Two clouds that share nothing: both ways give one velocity, to 1 % of its length."""
    x, y = torch.randn(shape, device=device), 2 * torch.randn(shape, device=device) + 1
    ours, theirs = velocity(x, y), reference(x, y)
    off = float((ours - theirs).norm() / theirs.norm())
    assert off < 1e-2, f"found {off:.1%} of difference, expected less than 1 %"


def check_emd2(shape: tuple[int, int]) -> None:
    """A translated cloud, and two Diracs 5 apart: the squared distance, without a half; and each reading under its name."""
    x, shift = _translation(shape, torch.device("cpu"))
    found = w2_squared(x, x + shift)
    assert abs(found - SHIFT**2) < 1e-4, f"found {found}, expected {SHIFT**2}, the squared length of the translation"
    found = w2_squared(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    assert found == 25.0, f"found {found} between two points 5 apart, expected 25"
    named = transport_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    expected = {"w2": 5.0, "w2_squared": 25.0, "half_w2_squared": 12.5}
    assert named == expected, f"found {named} between two points 5 apart, expected {expected}"


def check_divergence(shape: tuple[int, int], settings: dict[str, float]) -> None:
    """A translated cloud: half the squared distance, which is GeomLoss' cost."""
    x, shift = _translation(shape, torch.device("cpu"))
    found = sinkhorn_divergence(x, x + shift, **settings)
    assert abs(found - SHIFT**2 / 2) < 1e-3, f"found {found}, expected {SHIFT**2 / 2}, half the squared translation"


def check_assignment(shape: tuple[int, ...]) -> None:
    """A permuted cloud: the pairs are the points and themselves."""
    x = torch.randn(shape)
    y = x[torch.randperm(shape[0])]
    assert torch.equal(y[optimal_assignment(x, y)], x), "found another matching than the permutation"


def check_unet(make, shape: tuple[int, int, int]) -> None:
    """Zero when new; with an output that is not, a permuted batch gives the permuted velocities."""
    network, x, t = make().eval(), torch.randn(2, *shape), torch.rand(2)
    with torch.no_grad():
        v = network(x, t)
        assert v.shape == x.shape and not v.any(), f"found {tuple(v.shape)}, expected zeros {tuple(x.shape)}"
        nn.init.normal_(network.out[-1].weight)
        straight, permuted = network(x, t), network(x.flip(0), t.flip(0)).flip(0)
    off = float((straight - permuted).abs().max() / straight.abs().max())
    assert off < 1e-4, f"found velocities that depend on the order of the batch, by {off:.2g}"


def check_mnist_reader() -> None:
    """Two images written byte by byte: pixels, labels and the axis of the one channel."""
    pixels = np.zeros((2, 28, 28), np.uint8)
    pixels[0, 2, 3], pixels[1, 27, 0] = 255, 7
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            (raw / f"{split}-images-idx3-ubyte").write_bytes(
                struct.pack(">IIII", 0x803, *pixels.shape) + pixels.tobytes()
            )
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 2) + bytes([5, 9]))
        stored = images.load("mnist", "train", Path(folder))
    assert torch.equal(stored.pixels, torch.from_numpy(pixels)[:, None]), "found other pixels than were written"
    assert stored.labels.tolist() == [5, 9], f"found labels {stored.labels.tolist()}, expected [5, 9]"


def check_digits_reader() -> None:
    """All scans, pixels up to 16, and the first labels, which count from 0 to 9."""
    sets = [images.load("digits", split, Path()) for split in ("train", "test")]
    count, brightest = sum(map(len, sets)), max(int(stored.pixels.max()) for stored in sets)
    assert (count, brightest) == (1797, 16), f"found {count} images up to {brightest}, expected 1797 up to 16"
    found = sets[0].labels[:8].tolist()
    assert found == [1, 2, 3, 4, 5, 7, 8, 9], f"found labels {found}, expected 1 to 9 without 6, which is for testing"


def check_inception(shape: tuple[int, int, int]) -> None:
    """Two layers in the order in which they are asked for; a grey image is one of three equal channels; floats are refused."""
    import_torchvision()  # torch-fidelity imports it
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class AtRandom(FeatureExtractorInceptionV3):
        def load_state_dict(self, state, *rest, **options):
            """Keeps the weights that it was made with."""

    weights = io.BytesIO()
    torch.save({}, weights)
    weights.seek(0)
    network = AtRandom("x", [inception.FEATURES, "logits_unbiased"], feature_extractor_weights_path=weights).eval()
    pixels = torch.randint(0, 256, (2, 1, *shape[1:]), dtype=torch.uint8)
    features, logits = inception.look(network, pixels, torch.device("cpu"), batch_size=2)
    expected = ((2, int(inception.FEATURES)), (2, 1008))
    found = (tuple(features.shape), tuple(logits.shape))
    assert found == expected, f"found features and scores {found}, expected {expected}"
    again, _ = inception.look(network, pixels.repeat(1, 3, 1, 1), torch.device("cpu"), batch_size=2)
    assert torch.equal(features, again), "found other features for a grey image than for its three equal channels"
    try:
        network(pixels.repeat(1, 3, 1, 1) / 255)
    except Exception:
        return
    raise AssertionError("found images of floats accepted, expected uint8 only")


def check_scores() -> None:
    """Features shifted by a vector have its squared length as FID; equal scores have IS 1, certain ones the number of classes."""
    import_torchvision()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    x, shift = _translation((600, FEATURES), torch.device("cpu"))
    both = [fid_features_to_statistics(features) for features in (x, x + shift)]
    found = float(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])
    assert abs(found - SHIFT**2) < 1e-2, f"found FID {found}, expected {SHIFT**2}, the squared length of the shift"
    certain = 100 * nn.functional.one_hot(torch.arange(600) % 2, 1008).float()
    for name, logits, expected in (("equal", torch.zeros(600, 1008), 1.0), ("two certain", certain, 2.0)):
        score = isc_features_to_metric(logits, splits=1, shuffle=True, rng_seed=0)[KEY_METRIC_ISC_MEAN]
        assert abs(score - expected) < 1e-3, f"found IS {score} of {name} scores, expected {expected}"


def _translation(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """A cloud (n, d) and a vector (d,) of length SHIFT."""
    shift = torch.randn(shape[1])
    return torch.randn(shape, device=device), (SHIFT * shift / shift.norm()).to(device)
