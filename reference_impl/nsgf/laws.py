"""mu_0 and mu* of an experiment, as the phases draw from them: independent pairs of a source and a target point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nsgf import data, images


class Laws(ABC):
    """`shape` is that of one point: (2,) or (c, s, s)."""

    shape: tuple[int, ...]

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n independent source and n independent target points, (n, *shape) float32 on the CPU each."""

    def check(self) -> None:
        """Raises BadInput when the points are not to be had."""

    def release(self) -> None:
        """Drops what was read to draw from."""


@dataclass(frozen=True)
class PointLaws(Laws):
    """Two laws of the plane, by name."""

    source: str
    target: str
    shape: tuple[int, ...] = (2,)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return data.sample(self.source, n, generator), data.sample(self.target, n, generator)


@dataclass
class ImageLaws(Laws):
    """Standard normal noise and the training images of a set, which is read at the first draw."""

    name: str
    flip: bool
    data_root: Path
    stand_in: bool = False
    """Draw from a few images of noise instead: `images.stand_in_set`."""
    _stored: images.ImageSet | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return images.SOURCES[self.name].shape

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y, _ = self.draw_labelled(n, generator)
        return torch.randn(y.shape, generator=generator), y

    def draw_labelled(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n images and their labels."""
        if self._stored is None:
            self._stored = images.load(self.name, "train", self.data_root, stand_in=self.stand_in)
        return self._stored.draw(n, generator, self.flip)

    def check(self) -> None:
        if not self.stand_in:
            images.require(self.name, self.data_root)

    def release(self) -> None:
        self._stored = None
