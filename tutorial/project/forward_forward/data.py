"""The image sets: digits (embedded in scikit-learn) and MNIST, and the label that is written into an image.

Pixels stay bytes until they are drawn: all of MNIST takes 55 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from repro.errors import BadInput
from repro.randomness import generator

CLASSES = 10
SIDES = {"digits": 10, "mnist": 28}
"""Pixels along the side of an image. The top row is empty, so that a label that is written there hides nothing of a digit."""
DIGITS_TEST_EVERY = 6
STAND_IN_IMAGES = 40
NEUTRAL = 1 / CLASSES
"""What each label pixel holds when no label is given."""

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class ImageSet:
    """pixels (N, s * s) uint8 from 0 to `white`, labels (N,) int64 from 0."""

    pixels: Tensor
    labels: Tensor
    white: int

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: slice | Tensor) -> ImageSet:
        return ImageSet(self.pixels[index], self.labels[index], self.white)

    def images(self) -> Tensor:
        """(N, s * s) float32 in [0, 1]."""
        return self.pixels.float() / self.white


def with_label(images: Tensor, label: Tensor | float) -> Tensor:
    """A copy of images (n, d) whose first ten pixels hold `label`: probabilities (n, 10), or one number for all of them."""
    labelled = images.clone()
    labelled[:, :CLASSES] = label
    return labelled


def one_hot(labels: Tensor) -> Tensor:
    """Labels (n,) as (n, 10) float32."""
    return nn.functional.one_hot(labels, CLASSES).float()


def pixels_of(name: str) -> int:
    """Numbers in one image of a set."""
    return SIDES[name] ** 2


def require(name: str, data_root: Path) -> None:
    """Raises BadInput when files of the set are not there. Nothing is ever downloaded."""
    for path in _files(name, data_root):
        if not path.exists():
            raise BadInput(f"--data-root: found no {path}, expected the data set {name} there")


def load(name: str, split: Split, validation_images: int, data_root: Path, *, stand_in: bool = False) -> ImageSet:
    """One split of a set; the last `validation_images` of the training images are for validation.

    Raises BadInput when a file is missing or damaged. With `stand_in` no file is read: noise takes the place of the images.
    """
    if stand_in and _files(name, data_root):
        return _stand_in(name, split)
    require(name, data_root)
    official = _READERS[name](data_root, "test" if split == "test" else "train")
    if split == "test":
        return official
    if validation_images >= len(official):
        raise BadInput(f"data.validation_images: found {validation_images}, expected fewer than {len(official)}")
    first = len(official) - validation_images
    return official[:first] if split == "train" else official[first:]


def _files(name: str, data_root: Path) -> list[Path]:
    if name != "mnist":
        return []
    names = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return [data_root / "MNIST" / "raw" / name for name in names]


def _digits(data_root: Path, split: str) -> ImageSet:
    """The 1,797 scans of scikit-learn, 8 x 8 pixels, with the border that MNIST has and they lack: one pixel on every side.

    The set has no split of its own; every sixth image is for testing.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for_test = torch.arange(len(bunch.target)) % DIGITS_TEST_EVERY == 0
    bordered = nn.functional.pad(torch.from_numpy(bunch.images).to(torch.uint8), (1, 1, 1, 1))
    all_images = ImageSet(bordered.flatten(1), torch.from_numpy(bunch.target).long(), 16)
    return all_images[for_test if split == "test" else ~for_test]


def _mnist(data_root: Path, split: str) -> ImageSet:
    files = _files("mnist", data_root)
    images, labels = (read_idx(path) for path in (files[:2] if split == "train" else files[2:]))
    if (
        images.shape[1:] != (SIDES["mnist"], SIDES["mnist"])
        or labels.shape != images.shape[:1]
        or labels.max() >= CLASSES
    ):
        raise BadInput(
            f"--data-root: {data_root}: found images {tuple(images.shape)} and labels {tuple(labels.shape)}, expected MNIST"
        )
    return ImageSet(images.flatten(1), labels.long(), 255)


def read_idx(path: Path) -> Tensor:
    """The bytes of a file in the format of MNIST, in its shape. Raises BadInput when it is no such file.

    The header is two zeros, the type (8 for bytes), the number of dimensions, and each dimension as four bytes, the highest first.
    """
    content = path.read_bytes()
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content[4 : 4 + 4 * dimensions], ">i4").tolist()
    values = np.frombuffer(content[4 + 4 * dimensions :], np.uint8)
    if not dimensions or len(shape) != dimensions or len(values) != np.prod(shape):
        raise BadInput(f"{path}: found {len(content)} bytes, expected an idx file of bytes that is whole")
    return torch.from_numpy(values.reshape(shape).copy())


def _stand_in(name: str, split: Split) -> ImageSet:
    stream = generator("stand-in data", name, split)
    pixels = torch.randint(256, (STAND_IN_IMAGES, pixels_of(name)), generator=stream, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(STAND_IN_IMAGES) % CLASSES, 255)


_READERS = {"digits": _digits, "mnist": _mnist}
