"""The image sets: digits (embedded in scikit-learn), MNIST, CIFAR-10, as tensors of whole pixels.

Pixels become floats in [-1, 1] when they are drawn, so a set takes one byte a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nsgf.torchvision_cpu import import_torchvision
from repro.errors import BadInput
from repro.randomness import generator

Split = Literal["train", "test"]
DIGITS_TEST_EVERY = 6
CLASSES = 10


@dataclass(frozen=True)
class ImageSet:
    """pixels (N, c, s, s) uint8 from 0 to `white`, labels (N,) int64 from 0."""

    pixels: Tensor
    labels: Tensor
    white: int

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The images at `index`, (n, c, s, s) float32 in [-1, 1]."""
        return to_images(self.pixels[index], self.white)

    def some(self, n: int) -> Tensor:
        """Pixels of n images, the same ones at every call: the first, or drawn where the set is sorted by class."""
        if (self.labels.diff() < 0).any():
            return self.pixels[:n]  # as in the records
        return self.pixels[torch.randperm(len(self), generator=generator("some images"))[:n]]

    def draw(self, n: int, generator: torch.Generator, flip: bool) -> tuple[Tensor, Tensor]:
        """n images, drawn with replacement, and their labels; with `flip` each is mirrored left to right with probability 1/2."""
        index = torch.randint(len(self), (n,), generator=generator)
        x = self.images(index)
        if flip:
            mirrored = torch.rand(n, generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x, self.labels[index]


def to_pixels(x: Tensor, white: int = 255) -> Tensor:
    """Images in [-1, 1], what lies outside clipped, rounded to uint8 from 0 to `white`."""
    return ((x.clamp(-1, 1) + 1) * (white / 2)).round().to(torch.uint8)


def to_images(pixels: Tensor, white: int) -> Tensor:
    """Pixels from 0 to `white` as float32 in [-1, 1]."""
    return pixels.float() * (2 / white) - 1


@dataclass(frozen=True)
class Source:
    """How an image set is read: its shape (c, s, s), what must be there below the data root, the reader."""

    shape: tuple[int, int, int]
    needs: tuple[str, ...]
    read: Callable[[Path, Split], ImageSet]


def require(name: str, data_root: Path) -> None:
    """Raises BadInput when files of the set are not there, of either split. Nothing is ever downloaded."""
    for needed in SOURCES[name].needs:
        if not (data_root / needed).exists():
            raise BadInput(f"--data-root: found no {data_root / needed}, expected the data set {name} there")


def load(name: str, split: Split, data_root: Path, *, stand_in: bool = False) -> ImageSet:
    """One split of a set. Raises BadInput when its files are missing or damaged. With `stand_in` no file is read: see `stand_in_set`."""
    if stand_in and SOURCES[name].needs:
        return stand_in_set(name, split)
    require(name, data_root)
    source = SOURCES[name]
    if source.needs:
        import_torchvision()  # here, because what fails in it is no fault of the files
    try:
        stored = source.read(data_root, split)
    except (RuntimeError, OSError, ValueError, LookupError, AssertionError) as error:  # torchvision asserts sizes
        reason = " ".join(str(error).split()).partition(". You can use download")[0] or "a size that is wrong"
        raise BadInput(
            f"--data-root: {data_root}: found {name} damaged ({reason}), expected a readable {split} split"
        ) from None
    found, expected = tuple(stored.pixels.shape[1:]), source.shape
    if found != expected or len(stored) == 0 or len(stored.labels) != len(stored):
        raise BadInput(
            f"--data-root: {data_root}: found {len(stored)} images {found} and {len(stored.labels)} labels, "
            f"expected as many of both and images {expected} in the {split} split of {name}"
        )
    return stored


def stand_in_set(name: str, split: Split) -> ImageSet:
    """A few images of noise in the set's shape and type, two of each class, for where the set is not to be had."""
    stream, count = generator("stand-in data", name, split), 2 * CLASSES
    pixels = torch.randint(0, 256, (count, *SOURCES[name].shape), generator=stream, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % CLASSES, white=255)


def _digits(data_root: Path, split: Split) -> ImageSet:
    """The 1,797 8x8 scans of scikit-learn. It has no split of its own; every sixth image is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for_test = torch.arange(len(bunch.target)) % DIGITS_TEST_EVERY == 0
    chosen = for_test if split == "test" else ~for_test
    pixels = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    return ImageSet(pixels[chosen], torch.from_numpy(bunch.target).long()[chosen], white=16)


def _mnist(data_root: Path, split: Split) -> ImageSet:
    stored = import_torchvision().datasets.MNIST(str(data_root), train=split == "train", download=False)
    return ImageSet(stored.data[:, None], stored.targets, white=255)


def _cifar10(data_root: Path, split: Split) -> ImageSet:
    stored = import_torchvision().datasets.CIFAR10(str(data_root), train=split == "train", download=False)
    pixels = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, torch.tensor(stored.targets), white=255)


def _cifar10_jpeg(data_root: Path, split: Split) -> ImageSet:
    """A lossy copy as folders split/class/*.jpg. What is measured on it is no result on CIFAR-10."""
    torchvision = import_torchvision()
    stored = torchvision.datasets.ImageFolder(
        str(data_root / "cifar10-jpeg" / split), torchvision.transforms.PILToTensor()
    )
    if len(stored.classes) != 10:
        raise ValueError(f"{len(stored.classes)} folders of classes instead of 10")
    return ImageSet(torch.stack([image for image, _ in stored]), torch.tensor(stored.targets), white=255)


MNIST_FILES = tuple(
    f"MNIST/raw/{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
CIFAR10_FILES = tuple(
    f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta")
)
SOURCES: dict[str, Source] = {
    "digits": Source((1, 8, 8), (), _digits),
    "mnist": Source((1, 28, 28), MNIST_FILES, _mnist),
    "cifar10": Source((3, 32, 32), CIFAR10_FILES, _cifar10),
    "cifar10_jpeg": Source((3, 32, 32), ("cifar10-jpeg/train", "cifar10-jpeg/test"), _cifar10_jpeg),
}
SETS = tuple(SOURCES)
