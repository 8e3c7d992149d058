"""m05: a size inferred from a module list. The forward pass reads the number of blocks that was stored at construction."""

from functools import partial

import pytest
import torch
from proof import Proof

from nsgf import unet

SMALL = dict(
    image_size=8, image_channels=1, channels=4, blocks=1, multipliers=[1, 2, 2], heads=1, head_channels=None,
    attention_resolutions=[8], dropout=0.0, groups=2,
)  # fmt: skip

# Downsampling lies between levels and attention only at some, so modules / levels is not the number of blocks.
UNEVEN = {
    "attention at one level": SMALL,
    "attention at the middle level, two blocks": SMALL | dict(blocks=2, attention_resolutions=[4]),
    "four levels, as for CIFAR-10": SMALL | dict(blocks=2, multipliers=[1, 2, 2, 2], attention_resolutions=[4]),
}

# Networks whose levels differ little or not at all.
EVEN = {
    "no attention": SMALL | dict(attention_resolutions=[]),
    "attention at every level": SMALL | dict(attention_resolutions=[8, 4, 2]),
    "one level": SMALL | dict(multipliers=[1]),
    "three blocks": SMALL | dict(blocks=3),
    "levels of different widths": SMALL | dict(multipliers=[3, 1, 2]),
}


def check(name):
    """The forward pass runs, and uses every module that has parameters exactly once."""
    arguments = (UNEVEN | EVEN)[name]
    told = f"{name}: {arguments['blocks']} blocks in each of {len(arguments['multipliers'])} levels"
    net = unet.UNet(**arguments)
    calls = {key: 0 for key, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))}
    for key in calls:
        net.get_submodule(key).register_forward_hook(lambda *_, key=key: calls.update({key: calls[key] + 1}))
    x = torch.zeros(1, arguments["image_channels"], arguments["image_size"], arguments["image_size"])
    try:
        found = net(x, torch.zeros(1)).shape
    except (LookupError, RuntimeError) as error:
        raise AssertionError(f"{told}, but the forward pass looks for others: {error!r}") from error
    assert found == x.shape, f"{told}: found output {tuple(found)}"
    wrong = {key: count for key, count in calls.items() if count != 1}
    assert not wrong, f"{told}, but these modules are not used once: {wrong}"


def blocks_by_division(monkeypatch):
    """The block count that `forward` reads is the length of a module list divided by the number of levels."""
    inferred = property(lambda self: len(self.down) // self.levels, lambda self, stored: None)
    monkeypatch.setattr(unet.UNet, "blocks", inferred, raising=False)


def blocks_read_from_a_tuple(monkeypatch):
    """All sizes are stored in one place, and a property reads them."""
    stored = property(lambda self: self.sizes[0], lambda self, blocks: setattr(self, "sizes", (blocks,)))
    monkeypatch.setattr(unet.UNet, "blocks", stored, raising=False)


PROOFS = [
    Proof(partial(check, name), {blocks_by_division: f"{name}: {reason}"}, [blocks_read_from_a_tuple])
    for name, reason in zip(
        UNEVEN,
        [
            "1 blocks in each of 3 levels, but the forward pass looks for others: KeyError('block_0_1",
            "2 blocks in each of 3 levels, but the forward pass looks for others: KeyError('block_0_2",
            "2 blocks in each of 4 levels, but the forward pass looks for others: KeyError('block_0_2",
        ],
        strict=True,
    )
]


def test_proof(case):
    case()


@pytest.mark.parametrize("name", EVEN)
def test_even_levels(name):
    check(name)


def test_division_is_right_where_the_levels_are_even(monkeypatch):
    """Why these networks are no proof."""
    blocks_by_division(monkeypatch)
    check("no attention")
