"""m35: an FID of another protocol than the one it is held against.

What is reported as FID comes from the one Inception network, which is given whole bytes at the set's own size and resizes them itself, is taken against all images of the
split that the configuration names, and stands in a record that names the library and its version. Where the network is not to be had there is no FID.
"""

import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_method
import torch
from PIL import Image
from proof import Proof
from torch import nn

from nsgf import evaluate_images, images, inception
from nsgf.images import ImageSet
from nsgf.networks import ImageClassifier
from nsgf.torchvision_cpu import import_torchvision
from repro import run
from repro.config import load
from repro.method import Evaluation
from repro.runtime import Runtime

import_torchvision()

from torch_fidelity import feature_extractor_inceptionv3 as extractor  # noqa: E402
from torch_fidelity import metric_fid  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x  # noqa: E402

CPU = torch.device("cpu")
SEED, WHITE, SIZE = 0, 16, 8
COUNTS = {"train": 60, "test": 40}


def sets():
    """Two splits of noise, one darker than the other."""
    stream = torch.Generator().manual_seed(SEED)
    made = {}
    for split, n in COUNTS.items():
        pixels = torch.randint(0, WHITE + 1, (n, 1, SIZE, SIZE), generator=stream, dtype=torch.uint8)
        made[split] = ImageSet(pixels // (2 if split == "train" else 1), torch.arange(n) % 10, WHITE)
    return made


class Network(inception.StandIn):
    """In the place of torch-fidelity's network: remembers how it was made and what it was given."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        self.made, self.given = (name, features, feature_extractor_weights_path.read()), []
        made.append(self)

    def forward(self, pixels):
        self.given.append(pixels)
        return super().forward(pixels)


made: list[Network] = []


class Copies(nn.Module):
    """A straight flow that ends in the given images, each once."""

    def __init__(self, known):
        super().__init__()
        self.known = known.images()

    def forward(self, x, t):
        return (self.known[: len(x)] - x) / (1 - t).view(-1, 1, 1, 1)


class AtOnce(nn.Module):
    def forward(self, x, t=None):
        return x.new_zeros(len(x)) if t is None else torch.zeros_like(x)


def measured(project, folder, reference, weights=b"the weights"):
    """The metrics of samples that are the reference split, and the network that looked at them."""
    protocol = {"samples": COUNTS[reference], "batch_size": COUNTS[reference], "reference": reference, "inception": "true", "euler_steps": [1], "handover_times": [], "nearest": 2, "pictures": 1}  # fmt: skip
    settings = [f"evaluation.{key}={value}" for key, value in protocol.items()]
    plus_plus = ["nsgf_plus_plus.straight_flow_step=1", "nsgf_plus_plus.sinkhorn_steps=1"]
    config, _ = load(project.config_class("digits"), project.experiments()["digits"], [*settings, *plus_plus])
    networks = {"velocity_field": AtOnce(), "time_predictor": AtOnce(), "straight_flow": Copies(sets()[reference])}
    networks["feature_classifier"] = ImageClassifier(image_size=SIZE, image_channels=1, channels=[2], classes=10)
    folder.mkdir(exist_ok=True)
    if weights:
        (folder / inception.WEIGHTS).write_bytes(weights)
    made.clear()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.hub, "get_dir", lambda: str(folder / "none"))
        patch.setattr(inception, "SHA256", hashlib.sha256(weights).hexdigest())
        patch.setattr(images, "load", lambda name, split, root, *, stand_in: sets()[split])
        patch.setattr(extractor, "FeatureExtractorInceptionV3", Network)
        found = evaluate_images.evaluate(config, networks, SEED, Runtime(CPU, folder)).metrics
    return found, made


def check_distance(project, tmp_path):
    """Samples that are the reference, pixel for pixel, have no distance to it; the floor has one."""
    for reference in COUNTS:
        found, _ = measured(project, tmp_path, reference)
        for name in ("nsgf_plus_plus", "fm.1"):
            distance = abs(found[f"{name}.fid"])
            assert distance < 0.01, (
                f"{name}: samples that are the {reference} split have an FID of {distance:.3g} to it"
            )
        assert found["floor.fid"] > 100, f"the two splits have an FID of {found['floor.fid']:.3g}"


def check_network(project, tmp_path):
    """It is the one of the published numbers, and is given bytes as they are in the set."""
    _, (network,) = measured(project, tmp_path, "test")
    name, features, weights = network.made
    assert (name, features) == ("inception-v3-compat", ["2048", "logits_unbiased"]), (
        f"network: found {name}, {features}"
    )
    assert weights == b"the weights", f"network: found {len(weights)} bytes of weights"
    for pixels in network.given:
        found = f"given {pixels.dtype} {tuple(pixels.shape[1:])}, expected bytes {(3, SIZE, SIZE)}"
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, SIZE, SIZE), f"the network is {found}"
        assert bool((pixels == pixels[:, :1]).all()), "the network is given colours of a grey image"
    expected = (sets()["test"].pixels.double() * 255 / WHITE).round()
    assert torch.equal(network.given[0][:, :1].double(), expected), "the network is given other bytes than the images'"


def check_name(project, tmp_path):
    """Without the weights nothing is called FID, whatever else is measured."""
    found, networks = measured(project, tmp_path, "test", weights=b"")
    named = sorted(name for name in found if name.endswith((".fid", ".inception_score")))
    assert not named and not networks, f"without the weights: found {', '.join(named)}"


def check_record(tmp_path):
    """The library that computed it is imported only then, when the run began long ago."""

    def evaluate(config, models, seed, runtime):
        judged = {"x": torch.arange(12 * 64, dtype=torch.float64).remainder(251).to(torch.uint8).view(12, 1, 8, 8)}
        return Evaluation({"weight": 0.0, **inception.scores(judged, judged["x"], None, runtime.device)})

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            patch.delitem(sys.modules, name)
        project = tiny_method.write_project(tmp_path)
        project = replace(project, method=replace(project.method, evaluate=evaluate))
        record = json.loads((tiny_method.train(project, SEED) / run.RECORD).read_text())
    names = {name.replace("-", "_") for name in record["versions"]}  # packages write it either way
    assert "x.fid" in record["metrics"] and "torch_fidelity" in names, (
        f"record: found an FID and versions of {', '.join(record['versions']) or 'nothing'}"
    )


def judging(monkeypatch, change):
    """`change` makes what is handed to the scores of (the judged sets, the reference)."""
    real = inception.scores
    monkeypatch.setattr(inception, "scores", lambda judged, reference, *rest: real(*change(judged, reference), *rest))


def the_other_split(monkeypatch):
    """Statistics of the test split, which the paper uses for one set, for all of them."""
    other = (sets()["test"].pixels.double() * 255 / WHITE).round().byte()
    judging(monkeypatch, lambda judged, reference: (judged, other))


def part_of_the_reference(monkeypatch):
    """Statistics of as many images as seemed enough."""
    judging(monkeypatch, lambda judged, reference: (judged, reference[:30]))


def samples_as_jpeg(monkeypatch):
    """Samples are saved as JPEG and read again; the reference is not."""

    def saved(image):
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "JPEG")
        return torch.from_numpy(np.asarray(Image.open(file)).copy())[None]

    def change(judged, reference):
        return {name: torch.stack([saved(image) for image in x]) for name, x in judged.items()}, reference

    judging(monkeypatch, change)


def truncated(monkeypatch):
    """(x + 1) * 255 / 2 as an integer: every value that is not quite whole goes down."""

    def to_pixels(x, white=255):
        return ((x.clamp(-1, 1) + 1) * (white / 2)).to(torch.uint8)

    monkeypatch.setattr(evaluate_images, "to_pixels", to_pixels)


def resized_before(monkeypatch, **how):
    """All images, on both sides, by another resize than that of the network."""

    def resized(x):
        return nn.functional.interpolate(x.float(), (32, 32), **how).round().clamp(0, 255).byte()

    judging(monkeypatch, lambda judged, x: ({name: resized(pixels) for name, pixels in judged.items()}, resized(x)))


def by_torchvision(monkeypatch):
    """`Resize` of torchvision."""
    resized_before(monkeypatch, mode="bilinear", antialias=True)


def as_floats(monkeypatch):
    """In [0, 1], as of `ToTensor`. A network that takes bytes sees black."""
    judging(monkeypatch, lambda judged, x: ({name: pixels / 255 for name, pixels in judged.items()}, x / 255))


def other_features(monkeypatch):
    """Those of a pooling further ahead: fewer, so fewer images will do."""
    monkeypatch.setattr(inception, "FEATURES", "64")


def other_features_by_the_same_name(monkeypatch):
    """Without the weights another network takes its place."""
    monkeypatch.setattr(inception, "find_weights", lambda root: None)
    monkeypatch.setattr(inception, "missing", lambda root: "")
    real = evaluate_images._in_inception
    monkeypatch.setattr(
        evaluate_images,
        "_in_inception",
        lambda config, judged, reference, runtime: real(
            config, judged, reference, replace(runtime, stand_in_data=True)
        ),
    )


def versions_of_the_beginning(monkeypatch):
    """The record says what was imported when the run began."""
    describe, versions, kept = run.describe, run.versions, {}

    def described(*given):
        kept.update(versions())
        return describe(*given)

    monkeypatch.setattr(run, "describe", described)
    monkeypatch.setattr(run, "versions", lambda: dict(kept))


def statistics_kept(monkeypatch):
    """Of the reference, under its very bytes: computed once."""
    real, kept = metric_fid.fid_features_to_statistics, {}

    def statistics(features):
        return kept.setdefault(features.numpy().tobytes(), real(features))

    monkeypatch.setattr(metric_fid, "fid_features_to_statistics", statistics)


def in_another_order(monkeypatch):
    """The samples are shuffled, the reference turned round."""

    def change(judged, reference):
        order = torch.Generator().manual_seed(1)
        return {name: x[torch.randperm(len(x), generator=order)] for name, x in judged.items()}, reference

    judging(monkeypatch, change)


def rounded_half_up(monkeypatch):
    """As torchcfm does: half a level is added before the fraction is cut off."""

    def to_pixels(x, white=255):
        return ((x + 1) * (white / 2) + 0.5).clamp(0, white).to(torch.uint8)

    monkeypatch.setattr(evaluate_images, "to_pixels", to_pixels)


def saved_without_loss(monkeypatch):
    """Samples go through PNG files."""

    def saved(image):
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "PNG")
        return torch.from_numpy(np.asarray(Image.open(file)).copy())[None]

    judging(monkeypatch, lambda judged, x: ({name: torch.stack([*map(saved, y)]) for name, y in judged.items()}, x))


def versions_asked_at_the_beginning_too(monkeypatch):
    describe, versions = run.describe, run.versions
    monkeypatch.setattr(run, "describe", lambda *given: describe(*given) | {"versions": versions()})


FAR = "nsgf_plus_plus: samples that are the {} split have an FID of"
PROOFS = [
    Proof(
        check_distance,
        plant={
            the_other_split: FAR.format("train"),
            part_of_the_reference: "samples that are the train split have an FID of 560 to it",
            samples_as_jpeg: FAR.format("train"),
            truncated: FAR.format("train"),
        },
        innocent=[statistics_kept, in_another_order, rounded_half_up, saved_without_loss],
    ),
    Proof(
        check_network,
        plant={
            by_torchvision: "the network is given torch.uint8 (3, 32, 32), expected bytes (3, 8, 8)",
            as_floats: "the network is given torch.float32 (3, 8, 8), expected bytes (3, 8, 8)",
            other_features: "network: found inception-v3-compat, ['64', 'logits_unbiased']",
        },
        innocent=[statistics_kept, saved_without_loss],
    ),
    Proof(
        check_name,
        plant={other_features_by_the_same_name: "without the weights: found floor.fid"},
        innocent=[in_another_order],
    ),
    Proof(
        check_record,
        plant={versions_of_the_beginning: "record: found an FID and versions of nothing"},
        innocent=[versions_asked_at_the_beginning_too],
    ),
]


def test_proof(case):
    case()


def test_the_resize_of_tensorflow_1_differs_from_pytorchs_where_images_are_enlarged():
    """By 34 of 255 levels in the mean, on digits: it takes the corner of a pixel for its place. Smoothing makes no difference there."""
    real = images.load("digits", "test", Path()).pixels[:50].float() * 255 / WHITE
    size = (299, 299)
    of_fid = interpolate_bilinear_2d_like_tensorflow1x(real, size, align_corners=False)
    plain, smoothed = (
        nn.functional.interpolate(real, size, mode="bilinear", antialias=antialias) for antialias in (False, True)
    )
    assert float((of_fid - plain).abs().mean()) == pytest.approx(34.3, abs=0.1)
    assert torch.allclose(plain, smoothed, atol=1e-3)
