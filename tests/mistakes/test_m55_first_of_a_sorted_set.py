"""m55: the first n of a set that is sorted by class.

Images in folders of their class, as an archive of CIFAR-10 holds them, each in the grey of its class. Wherever the evaluation takes a part of the test
split, that part has images of most classes.
"""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from proof import Proof

from nsgf import evaluate_images, images
from nsgf.images import ImageSet
from repro import randomness
from repro.config import load
from repro.runtime import Runtime

CPU = torch.device("cpu")
CLASSES, OF_EACH, STEP = 10, 20, 25  # greys 0, 25, ..., far enough apart for JPEG
TAKEN = 20
SEEDS = (0, 1)
PROTOCOL = {"samples": TAKEN, "batch_size": TAKEN, "euler_steps": [1], "handover_times": [], "nearest": TAKEN, "pictures": TAKEN, "inception": "false"}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 2), ("test", OF_EACH)):
        for grey in range(0, CLASSES * STEP, STEP):
            folder = root / "cifar10-jpeg" / split / f"{grey:03}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (grey,) * 3).save(folder / f"{index:04}.jpg")
    return root


def classes(pixels):
    """Told by the images themselves."""
    return sorted({round(grey / STEP) for grey in pixels.float().mean((1, 2, 3)).tolist()})


def parts(project, data_root, seed):
    """What the evaluation takes of the real images, by name."""
    settings = [f"evaluation.{key}={value}" for key, value in PROTOCOL.items()]
    config, _ = load(
        project.config_class("cifar10"),
        project.experiments()["cifar10"],
        ["data.set=cifar10_jpeg", *settings, "nsgf_plus_plus.straight_flow_step=1", "nsgf_plus_plus.sinkhorn_steps=1"],
    )
    networks = dict.fromkeys(("velocity_field", "straight_flow"), Still()) | {"time_predictor": AtOnce()}
    with (
        patch.object(evaluate_images, "_in_classifier", return_value={}) as judge,
        patch.object(evaluate_images, "nearest_images", wraps=evaluate_images.nearest_images) as near,
        torch.no_grad(),
    ):
        kept = evaluate_images.evaluate(
            config, networks | {"feature_classifier": None}, seed, Runtime(CPU, data_root)
        ).tensors
    _, _, judged, _, _ = judge.call_args.args
    return {
        "the floor": judged["floor"],
        "held against training images": near.call_args_list[1].args[0],
        "shown as real": kept["pictures.real"],
    }


class Still(torch.nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


class AtOnce(torch.nn.Module):
    """Hands over at time 0."""

    def forward(self, x):
        return x.new_zeros(len(x))


def check(project, folders):
    for seed in SEEDS:
        for name, pixels in parts(project, folders, seed).items():
            found = classes(pixels)
            assert len(pixels) == TAKEN and len(found) > CLASSES // 2, (
                f"{name}: {len(pixels)} images of {CLASSES} classes are of {found}"
            )


def drawn_as(monkeypatch, order):
    """`order` in the place of a random permutation of n."""
    monkeypatch.setattr(torch, "randperm", lambda n, generator: order(n, generator))


def the_first_n(monkeypatch):
    drawn_as(monkeypatch, lambda n, generator: torch.arange(n))


def the_last_n(monkeypatch):
    drawn_as(monkeypatch, lambda n, generator: torch.arange(n).flip(0))


def shuffled_after_the_cut(monkeypatch):
    real = torch.randperm
    drawn_as(monkeypatch, lambda n, generator: real(TAKEN, generator=generator))


def a_block_from_a_random_place(monkeypatch):
    """A generator is asked, and two classes at most are found."""
    drawn_as(monkeypatch, lambda n, generator: torch.arange(n).roll(-int(torch.randint(n, (), generator=generator))))


def the_first_test_images(monkeypatch):
    """The floor alone is drawn: how this repository was."""
    monkeypatch.setattr(ImageSet, "some", lambda self, n: self.pixels[:n])


def another_seed(monkeypatch):
    for module in (evaluate_images, images):
        monkeypatch.setattr(module, "generator", lambda *parts: randomness.generator("another", *parts))


def the_same_for_every_seed(monkeypatch):
    monkeypatch.setattr(evaluate_images, "generator", lambda seed, *parts: randomness.generator(*parts))


def as_many_of_each_class(monkeypatch):
    """No draw at all: the first of each class, the second of each, and so on."""
    drawn_as(monkeypatch, lambda n, generator: torch.arange(n).view(CLASSES, -1).T.flatten())


def a_permutation_and_then_the_first_n(monkeypatch):
    """The set is put in a random order when it is read."""
    real = images.load

    def shuffled(*arguments, **options):
        stored = real(*arguments, **options)
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))
        return ImageSet(stored.pixels[order], stored.labels[order], stored.white)

    monkeypatch.setattr(images, "load", shuffled)
    the_first_test_images(monkeypatch)


PROOFS = [
    Proof(
        check,
        plant={
            the_first_n: "the floor: 20 images of 10 classes are of [0]",
            the_last_n: "the floor: 20 images of 10 classes are of [9]",
            shuffled_after_the_cut: "the floor: 20 images of 10 classes are of [0]",
            a_block_from_a_random_place: "the floor: 20 images of 10 classes are of ",
            the_first_test_images: "held against training images: 20 images of 10 classes are of [0]",
        },
        innocent=[another_seed, the_same_for_every_seed, as_many_of_each_class, a_permutation_and_then_the_first_n],
    )
]


def test_proof(case):
    case()


def test_a_set_in_mixed_order_gives_its_first_images():
    """Those of the records: a draw would change what they hold."""
    mixed = images.load("digits", "test", Path())
    assert torch.equal(mixed.some(8), mixed.pixels[:8])
