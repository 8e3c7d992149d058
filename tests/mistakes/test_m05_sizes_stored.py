"""m05: a size inferred from a module list. The forward pass reads the number of blocks that was stored at construction."""

import pytest
import torch

from nsgf import unet

SMALL = dict(
    image_size=8, image_channels=1, channels=4, blocks=1, multipliers=[1, 2, 2], heads=1, head_channels=None,
    attention_resolutions=[8], dropout=0.0, groups=2,
)  # fmt: skip

# Downsampling lies between levels and attention only at some, so modules / levels is not the number of blocks.
UNEVEN = [
    ("attention at one level", SMALL),
    ("attention at the middle level, two blocks", SMALL | dict(blocks=2, attention_resolutions=[4])),
    ("four levels, as for CIFAR-10", SMALL | dict(blocks=2, multipliers=[1, 2, 2, 2], attention_resolutions=[4])),
]

# Correct networks whose levels differ little or not at all; nothing may be found in them.
innocent = [
    ("no attention", SMALL | dict(attention_resolutions=[])),
    ("attention at every level", SMALL | dict(attention_resolutions=[8, 4, 2])),
    ("one level", SMALL | dict(multipliers=[1])),
    ("three blocks", SMALL | dict(blocks=3)),
    ("levels of different widths", SMALL | dict(multipliers=[3, 1, 2])),
]


def check(UNet, plans=UNEVEN):
    """The forward pass runs, and uses every module that has parameters exactly once."""
    for name, arguments in plans:
        told = f"{name}: {arguments['blocks']} blocks in each of {len(arguments['multipliers'])} levels"
        net = UNet(**arguments)
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


def plant(monkeypatch):
    """The mistake: the block count that `forward` reads is the length of a module list divided by the number of levels."""
    inferred = property(lambda self: len(self.down) // self.levels, lambda self, stored: None)
    monkeypatch.setattr(unet.UNet, "blocks", inferred, raising=False)


def test_holds():
    check(unet.UNet)
    check(unet.UNet, innocent)


def test_catches_the_planted_mistake(monkeypatch):
    plant(monkeypatch)
    check(
        unet.UNet, [variant for variant in innocent if variant[0] == "no attention"]
    )  # here floor division happens to be right
    for plan, missing in zip(UNEVEN, ["block_0_1", "block_0_2", "block_0_2"], strict=True):
        with pytest.raises(
            AssertionError, match=rf"{plan[0]}: \d blocks in each of \d levels, but .* looks for others: .*{missing}"
        ):
            check(unet.UNet, [plan])
    with pytest.raises(AssertionError, match="attention at one level: 1 blocks in each of 3 levels"):
        check(unet.UNet)
