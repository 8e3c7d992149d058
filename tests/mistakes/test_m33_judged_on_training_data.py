"""m33: judged on the data that was trained on.

No image that a phase draws is in the test split. Networks that know the training images by heart and nothing else get the accuracy and the distance to
the test split that follow from that. In two dimensions no point of the evaluation, source or target, was trained on.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from pools import pool_of
from proof import Proof
from tiny_project import POINTS, merged, write_project
from torch import nn

from nsgf import evaluate_images, evaluate_points, images, phases
from nsgf.images import ImageSet, to_images
from repro import randomness, run
from repro.config import load
from repro.method import find_project
from repro.runtime import Runtime
from repro_tools.minibatch import draw

CPU = torch.device("cpu")
SEED = 0
PROTOCOL = {"samples": 12, "batch_size": 12, "euler_steps": [1], "handover_times": [], "nearest": 4, "pictures": 1, "inception": "false"}  # fmt: skip


class ByHeart(nn.Module):
    """Knows the training images and nothing else: each sample is one of them."""

    def __init__(self, known: ImageSet):
        super().__init__()
        self.known = known.images()
        self.classes = {image.numpy().tobytes(): int(label) for image, label in zip(self.known, known.labels, strict=True)}  # fmt: skip

    def features(self, x):
        return x.flatten(1)[:, ::16]

    def scores(self, features):
        return self.answers

    def forward(self, x, t):
        """The velocity that leads from x at time t to the training images, one for each sample."""
        return (self.known[: len(x)] - x) / (1 - t).view(-1, 1, 1, 1)


class Classifier(ByHeart):
    """An image that it does not know is of class 0."""

    def features(self, x):
        found = [self.classes.get(image.numpy().tobytes(), 0) for image in x]
        self.answers = 10.0 * nn.functional.one_hot(torch.tensor(found), 10)
        return super().features(x)


class AtOnce(nn.Module):
    """Hands over at time 0: the whole way is the straight flow's."""

    def forward(self, x, t=None):
        return x.new_zeros(len(x)) if t is None else torch.zeros_like(x)


def by_heart(image_sets):
    """Read from the files and not by the code that is tested."""
    raw = image_sets / "MNIST/raw"
    pixels, labels = ((raw / f"train-{kind}-ubyte").read_bytes() for kind in ("images-idx3", "labels-idx1"))
    known = torch.frombuffer(bytearray(pixels[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    return ImageSet(known, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long(), 255)


def judged(project, image_sets, reference):
    settings = [f"evaluation.{key}={value}" for key, value in (PROTOCOL | {"reference": reference}).items()]
    config, _ = load(
        project.config_class("mnist"),
        project.experiments()["mnist"],
        [*settings, "nsgf_plus_plus.straight_flow_step=1", "nsgf_plus_plus.sinkhorn_steps=1"],
    )
    known = by_heart(image_sets)
    networks = {"velocity_field": AtOnce(), "time_predictor": AtOnce()}
    networks |= {"straight_flow": ByHeart(known), "feature_classifier": Classifier(known)}
    with torch.no_grad():
        return evaluate_images.evaluate(config, networks, SEED, Runtime(CPU, image_sets)).metrics


def check_judged(project, image_sets):
    found = judged(project, image_sets, "test")
    accuracy, expected = found["classifier.accuracy"], 1 / 6  # one of the six test images is of class 0
    assert accuracy == pytest.approx(expected), (
        f"who knows the training images by heart is right on {accuracy:.0%} of the test split, expected {expected:.0%}"
    )
    for name in ("nsgf_plus_plus", "fm.1"):
        distance = found[f"{name}.classifier_frechet"]
        assert distance > 1, f"{name}: copies of the training images are at {distance:.2g} from the test split"
    assert found["nsgf_plus_plus.nearest_train"] == 0 < found["test.nearest_train"], (
        "copies are not told from test images"
    )


def check_against_the_training_split(project, image_sets):
    """Where the protocol asks for that, as of CIFAR-10: copies of all training images are what it compares with."""
    found = judged(project, image_sets, "train")["nsgf_plus_plus.classifier_frechet"]
    assert abs(found) < 1e-6, f"copies of the training images are at {found:.2g} from the training split"


def check_trained_on(name, image_sets):
    """Minibatches come from the training split, and the splits are two parts of the set, the same whenever they are read."""
    laws = phases.ImageLaws(name, flip=False, data_root=image_sets)
    drawn, _ = laws.draw_labelled(400, torch.Generator().manual_seed(SEED))
    test, train = (images.load(name, split, image_sets) for split in ("test", "train"))
    unseen = {to_images(image, test.white).numpy().tobytes() for image in test.pixels}
    seen = sum(image.numpy().tobytes() in unseen for image in drawn)
    assert seen == 0, f"{name}: of 400 images to train on, {seen} are of the test split"
    shared = Counter(image.numpy().tobytes() for image in torch.cat([train.pixels, test.pixels]))
    assert max(shared.values()) == 1, f"{name}: {len(train) + len(test) - len(shared)} images are in both splits"


def check_points(tmp_path):
    """Of a run in two dimensions, the pools of its phases included."""
    same_sizes = {"evaluation": {"test_points": 8}}
    planned = run.plan(find_project(write_project(tmp_path, "2d-moons", merged(POINTS, same_sizes))), "2d-moons", [])
    runtime = Runtime(CPU)
    trained, networks = set(), {}
    for phase in planned.project.method.phases(planned.config, runtime):
        networks[phase.name] = phase.make_model()
        pool = pool_of(phase, SEED)
        batches = [draw(phase, step, SEED, pool) for step in range(5)]
        for column in [*(column for batch in batches for column in batch.values()), *pool.values()]:
            trained |= {row.numpy().tobytes() for row in column if row.ndim == 1}
        if pool:
            for batch in range(phase.config.pool.batches):
                _, y = phase.laws.draw(phase.config.pool.batch_size, phases.generator(SEED, phase.name, "pool", batch))
                trained |= {row.numpy().tobytes() for row in y}
    with torch.no_grad():
        kept = evaluate_points.evaluate(planned.config, networks, SEED, runtime).tensors
    for name in ("test", "source"):
        known = sum(row.numpy().tobytes() in trained for row in kept[name])
        assert known == 0, f"{name}: {known} of {len(kept[name])} points were trained on"


def read_by(monkeypatch, name, read):
    real = images.SOURCES[name].read
    monkeypatch.setitem(images.SOURCES, name, replace(images.SOURCES[name], read=partial(read, real)))


def the_default_of_torchvision(monkeypatch):
    """`MNIST(root)` is the training split."""
    read_by(monkeypatch, "mnist", lambda real, root, split: real(root, "train"))


def one_set_kept_for_both(monkeypatch):
    """What was read is kept under the name of the set. Training came first."""
    real, kept = images.load, {}

    def read_once(name, split, *rest, **more):
        if name not in kept:
            kept[name] = real(name, split, *rest, **more)
        return kept[name]

    monkeypatch.setattr(images, "load", read_once)


def the_set_at_hand(monkeypatch):
    """The evaluation goes through the loader that the training made."""
    real = evaluate_images._in_classifier
    monkeypatch.setattr(
        evaluate_images,
        "_in_classifier",
        lambda config, model, pixels, sets, device: real(config, model, pixels, sets | {"test": sets["train"]}, device),
    )


def always_the_test_split(monkeypatch):
    """The other way round: the protocol names the training split, as the paper's does."""
    real = evaluate_images._in_classifier
    monkeypatch.setattr(
        evaluate_images,
        "_in_classifier",
        lambda config, model, pixels, sets, device: real(config, model, pixels, sets | {"train": sets["test"]}, device),
    )


def all_there_is(monkeypatch):
    """More images to train on: both splits."""

    def both(real, root, split):
        parts = [real(root, split), real(root, "test")] if split == "train" else [real(root, split)]
        pixels, labels = (torch.cat([getattr(part, column) for part in parts]) for column in ("pixels", "labels"))
        return ImageSet(pixels, labels, parts[0].white)

    read_by(monkeypatch, "mnist", both)


def divided_at_random(monkeypatch, stream):
    """digits, which has no split of its own. `stream` gives the generator of a reading."""

    def at_random(real, root, split):
        parts = [real(root, "train"), real(root, "test")]
        pixels, labels = (torch.cat([getattr(part, column) for part in parts]) for column in ("pixels", "labels"))
        order = torch.randperm(len(pixels), generator=stream())
        chosen = order[: len(parts[0])] if split == "train" else order[len(parts[0]) :]
        return ImageSet(pixels[chosen], labels[chosen], parts[0].white)

    read_by(monkeypatch, "digits", at_random)


def divided_anew_at_every_reading(monkeypatch):
    """The generator has gone on in between."""
    going_on = torch.Generator().manual_seed(SEED)
    divided_at_random(monkeypatch, lambda: going_on)


def one_seed_for_everything(monkeypatch):
    """Training and evaluation each begin with the seed of the run, and nothing else."""
    for module in (phases, evaluate_points):
        monkeypatch.setattr(module, "generator", lambda seed, *parts: randomness.generator(seed))


def the_points_of_the_pool(monkeypatch):
    """The evaluation draws its targets as the pool does."""
    real = evaluate_points.generator

    def drawn_alike(seed, *parts):
        if parts != ("evaluate", "test"):
            return real(seed, *parts)
        stream = real(seed, "velocity_field", "pool", 0)
        torch.randn(8, 2, generator=stream)  # the source points come first
        return stream

    monkeypatch.setattr(evaluate_points, "generator", drawn_alike)


def kept_for_each_split(monkeypatch):
    real, kept = images.load, {}

    def read_once(name, split, *rest, **more):
        if (name, split) not in kept:
            kept[name, split] = real(name, split, *rest, **more)
        return kept[name, split]

    monkeypatch.setattr(images, "load", read_once)


def the_test_split_in_another_order(monkeypatch):
    def shuffled(real, root, split):
        stored = real(root, split)
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(SEED))
        return ImageSet(stored.pixels[order], stored.labels[order], stored.white)

    read_by(monkeypatch, "mnist", shuffled)


def divided_by_a_seed_of_its_own(monkeypatch):
    divided_at_random(monkeypatch, lambda: torch.Generator().manual_seed(SEED))


def another_seed_for_the_evaluation(monkeypatch):
    """Of the same form as training's, and another number."""
    monkeypatch.setattr(evaluate_points, "generator", lambda seed, *parts: randomness.generator(seed + 1000, *parts))


PROOFS = [
    Proof(
        check_judged,
        plant={
            the_default_of_torchvision: "by heart is right on 100% of the test split, expected 17%",
            one_set_kept_for_both: "by heart is right on 100% of the test split, expected 17%",
            the_set_at_hand: "by heart is right on 100% of the test split, expected 17%",
        },
        innocent=[kept_for_each_split, the_test_split_in_another_order],
    ),
    Proof(
        check_against_the_training_split,
        plant={always_the_test_split: "copies of the training images are at "},
        innocent=[kept_for_each_split, the_test_split_in_another_order],
    ),
    Proof(
        partial(check_trained_on, "mnist"),
        plant={all_there_is: "mnist: of 400 images to train on, "},
        innocent=[kept_for_each_split, the_test_split_in_another_order],
    ),
    Proof(
        partial(check_trained_on, "digits"),
        plant={divided_anew_at_every_reading: "digits: of 400 images to train on, "},
        innocent=[divided_by_a_seed_of_its_own],
    ),
    Proof(
        partial(check_trained_on, "cifar10"),
        plant={one_set_kept_for_both: "cifar10: of 400"},
        innocent=[kept_for_each_split],
    ),
    Proof(
        check_points,
        plant={
            one_seed_for_everything: "source: 8 of 8 points were trained on",
            the_points_of_the_pool: "test: 8 of 8 points were trained on",
        },
        innocent=[another_seed_for_the_evaluation],
    ),
]


def test_proof(case):
    case()
