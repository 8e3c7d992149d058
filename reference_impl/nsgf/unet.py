"""The UNet of the image experiments, the same for the Sinkhorn field and for the straight flow (appendix E.2, page 14).

The paper names Dhariwal & Nichol 2021 ("Diffusion Models Beat GANs on Image Synthesis", arXiv 2105.05233) and a list of sizes. What the list
leaves open is read as torchcfm's `UNetModelWrapper` reads it, whose settings the list repeats:

- residual blocks add the time to their features (no scale and shift), resampling is a 3x3 convolution;
- "attention resolution 16" is the downsample factor size // 16: factor 2, that is 16x16 pixels, for CIFAR-10; factor 1, that is 28x28, for MNIST;
- the middle always attends; head channels, where given, decide the number of heads (CIFAR-10: 256 / 64 = 4, the paper's number of heads);
- time enters as it is, in [0, 1] and not times 1000, through the sinusoidal embedding with max_period 10,000.

These sizes give 1,075,361 parameters for MNIST and 35,746,307 for CIFAR-10, as torchcfm's network has.

The first group norm after the time is added removes each group's mean. With one channel a group (MNIST: the 32 channels of level 0 in 32
groups) it removes the time as well, and only the deeper levels know it. The original has this too; it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_PERIOD = 10_000.0


class UNet(nn.Module):
    """A velocity field of images: x (n, c, s, s) and times t (n,) to velocities (n, c, s, s). It is zero when new.

    The first level works at s x s pixels, each further one at half the side of the one before; level k has `channels * multipliers[k]` channels.

    image_size: s. image_channels: c. channels: also the size of the time embedding, so even.
    blocks: residual blocks of a level on the way down; on the way up there is one more.
    heads: attention heads, where head_channels is None; otherwise a level has its channels / head_channels heads.
    attention_resolutions: resolution r attends at the level whose downsample factor is image_size // r.
    groups: of every group norm (32 in the original).

    Raises ValueError, at construction, for sizes that do not fit together, and in `forward` for images or times of another shape.
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        channels: int,
        blocks: int,
        multipliers: Sequence[int],
        heads: int,
        head_channels: int | None,
        attention_resolutions: Sequence[int],
        dropout: float,
        groups: int,
    ):
        super().__init__()
        levels, widths = len(multipliers), [channels * multiplier for multiplier in multipliers]
        check_sizes(image_size, channels, blocks, widths, groups)
        self.image_size, self.image_channels, self.channels = image_size, image_channels, channels
        self.blocks, self.levels = blocks, levels
        self.attention_levels = attention_levels(image_size, levels, attention_resolutions)
        embedded = 4 * channels

        def residual(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embedded, dropout, groups)

        def attention(level: int) -> SelfAttention:
            return SelfAttention(widths[level], heads_of_level(level, widths[level], heads, head_channels), groups)

        self.time = nn.Sequential(nn.Linear(channels, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        self.stem = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        skips = SkipRecord()
        skips.push(widths[0])

        self.down, current = nn.ModuleDict(), widths[0]
        for level, width in enumerate(widths):
            for index in range(blocks):
                self.down[f"block_{level}_{index}"] = residual(current, width)
                if level in self.attention_levels:
                    self.down[f"attention_{level}_{index}"] = attention(level)
                current = width
                skips.push(current)
            if level + 1 < levels:
                self.down[f"downsample_{level}"] = Downsample(current)
                skips.push(current)

        self.middle = nn.ModuleList([residual(current, current), attention(levels - 1), residual(current, current)])

        self.up = nn.ModuleDict()
        for level in reversed(range(levels)):
            for index in range(blocks + 1):
                self.up[f"block_{level}_{index}"] = residual(current + skips.pop(), widths[level])
                if level in self.attention_levels:
                    self.up[f"attention_{level}_{index}"] = attention(level)
                current = widths[level]
            if level > 0:
                self.up[f"upsample_{level}"] = Upsample(current)
        skips.close()

        self.out = nn.Sequential(
            nn.GroupNorm(groups, current), nn.SiLU(), zeroed(nn.Conv2d(current, image_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        expected = (self.image_channels, self.image_size, self.image_size)
        if x.ndim != 4 or x.shape[1:] != expected or t.shape != x.shape[:1]:
            sizes = ", ".join(map(str, expected))
            raise ValueError(
                f"velocity field: found x {tuple(x.shape)} and t {tuple(t.shape)}, expected (n, {sizes}) and (n,)"
            )
        e = self.time(embed_time(t.to(x.dtype), self.channels))
        h = self.stem(x)
        skips = [h]

        for level in range(self.levels):
            for index in range(self.blocks):
                h = self._block(self.down, level, index, h, e)
                skips.append(h)
            if level + 1 < self.levels:
                h = self.down[f"downsample_{level}"](h)
                skips.append(h)

        before, attention, after = self.middle
        h = after(attention(before(h, e)), e)

        for level in reversed(range(self.levels)):
            for index in range(self.blocks + 1):
                h = self._block(self.up, level, index, torch.cat([h, skips.pop()], dim=1), e)
            if level > 0:
                h = self.up[f"upsample_{level}"](h)
        return self.out(h)

    def _block(self, way: nn.ModuleDict, level: int, index: int, h: Tensor, e: Tensor) -> Tensor:
        h = way[f"block_{level}_{index}"](h, e)
        return way[f"attention_{level}_{index}"](h) if level in self.attention_levels else h


class ResidualBlock(nn.Module):
    """Features h (n, inputs, s, s) and embedded times e (n, embedded) to features (n, outputs, s, s)."""

    def __init__(self, inputs: int, outputs: int, embedded: int, dropout: float, groups: int):
        super().__init__()
        self.before = nn.Sequential(nn.GroupNorm(groups, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(embedded, outputs))
        last = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.after = nn.Sequential(nn.GroupNorm(groups, outputs), nn.SiLU(), nn.Dropout(dropout), last)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return self.shortcut(h) + self.after(self.before(h) + self.time(e)[:, :, None, None])


class SelfAttention(nn.Module):
    """Each pixel attends to every pixel of the same image: (n, channels, s, s) to (n, channels, s, s)."""

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.head_channels = heads, channels // heads
        self.norm = nn.GroupNorm(groups, channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        split = self.query_key_value(self.norm(h)).reshape(len(h), self.heads, 3, self.head_channels, -1)
        # Fused kernels want the head channels side by side. Otherwise all weights lie in memory: 2362 instead of 887 MiB on MNIST.
        query, key, value = split.transpose(3, 4).contiguous().unbind(2)  # each (n, heads, pixels, head channels)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return h + self.project(mixed.transpose(2, 3).reshape(h.shape))


class Downsample(nn.Conv2d):
    """Half the side, by a 3x3 convolution of stride 2: (n, channels, s, s) to (n, channels, s / 2, s / 2)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Twice the side, each pixel repeated in a 2x2 square before a 3x3 convolution: (n, channels, s, s) to (n, channels, 2 s, 2 s)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(functional.interpolate(h, scale_factor=2.0, mode="nearest"))


class SkipRecord:
    """The channels of every skip tensor: pushed while the way down is built, popped while the way up is built."""

    def __init__(self) -> None:
        self.channels: list[int] = []
        self.pushed = self.popped = 0

    def push(self, channels: int) -> None:
        self.pushed += 1
        self.channels.append(channels)

    def pop(self) -> int:
        """The channels of the latest push that is not yet popped. ValueError when there is none."""
        self.popped += 1
        if not self.channels:
            raise ValueError(
                f"skip connections: found {self.popped} pops for {self.pushed} pushes, expected equal numbers"
            )
        return self.channels.pop()

    def close(self) -> None:
        """ValueError when a push is left over."""
        if self.channels:
            raise ValueError(
                f"skip connections: found {self.popped} pops for {self.pushed} pushes, expected equal numbers"
            )


def embed_time(t: Tensor, size: int) -> Tensor:
    """Cosines and sines of t (n,) at size / 2 frequencies, falling geometrically from 1 towards 1 / MAX_PERIOD: (n, size)."""
    half = size // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def check_sizes(image_size: int, channels: int, blocks: int, widths: Sequence[int], groups: int) -> None:
    """ValueError for sizes that a UNet cannot have. widths: the channels of each level."""
    if blocks < 1 or not widths or groups < 1:
        raise ValueError(
            f"UNet: found {blocks} blocks, {len(widths)} levels and {groups} groups, expected one or more of each"
        )
    if channels < 2 or channels % 2:
        raise ValueError(
            f"UNet: found {channels} channels, expected an even number (the time embedding is half cosines, half sines)"
        )
    downsampling = 2 ** (len(widths) - 1)
    if image_size < 1 or image_size % downsampling:
        raise ValueError(
            f"UNet: found image size {image_size}, expected a multiple of {downsampling} ({len(widths)} levels)"
        )
    for level, width in enumerate(widths):
        if width < 1 or width % groups:
            raise ValueError(
                f"UNet: found {width} channels at level {level}, expected a multiple of the {groups} groups of group norm"
            )


def attention_levels(image_size: int, levels: int, resolutions: Sequence[int]) -> frozenset[int]:
    """The levels of downsample factor image_size // resolution, counted from 0. ValueError for a resolution that no level has."""
    level_of_factor = {2**level: level for level in range(levels)}
    for resolution in resolutions:
        if resolution < 1 or image_size // resolution not in level_of_factor:
            raise ValueError(
                f"UNet: found attention resolution {resolution} for images of size {image_size}, "
                f"expected size // resolution to be one of the downsample factors {sorted(level_of_factor)}"
            )
    return frozenset(level_of_factor[image_size // resolution] for resolution in resolutions)


def heads_of_level(level: int, width: int, heads: int, head_channels: int | None) -> int:
    """The attention heads of a level of `width` channels. ValueError when they do not divide it."""
    name, divisor = ("heads", heads) if head_channels is None else ("channels a head", head_channels)
    if divisor < 1 or width % divisor:
        raise ValueError(f"UNet: found {divisor} {name} for the {width} channels of level {level}, expected a divisor")
    return heads if head_channels is None else width // head_channels


def zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    """The same convolution, its weights and bias set to zero."""
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution
