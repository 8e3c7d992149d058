"""The UNet of the image experiments: its size, its shapes, and what its construction refuses."""

import pytest
import torch

from nsgf import unet
from nsgf.unet import SkipRecord, UNet

MNIST = dict(
    image_size=28, image_channels=1, channels=32, blocks=1, multipliers=[1, 2, 2], heads=1, head_channels=None,
    attention_resolutions=[16], dropout=0.0, groups=32,
)  # fmt: skip
CIFAR = dict(
    image_size=32, image_channels=3, channels=128, blocks=2, multipliers=[1, 2, 2, 2], heads=4, head_channels=64,
    attention_resolutions=[16], dropout=0.0, groups=32,
)  # fmt: skip
# The same plans with few channels: the attention levels, the levels and the blocks are those of the paper.
TINY_MNIST = MNIST | dict(channels=8, groups=4)
TINY_CIFAR = CIFAR | dict(channels=8, groups=4, head_channels=4)
TINY = dict(
    image_size=8, image_channels=2, channels=4, blocks=1, multipliers=[1, 2], heads=2, head_channels=None,
    attention_resolutions=[8], dropout=0.0, groups=2,
)  # fmt: skip


def build(**arguments) -> UNet:
    """A network as it is after training has moved the zeros: nothing in it is zero."""
    torch.manual_seed(0)
    net = UNet(**arguments)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def inputs(arguments, n=2):
    generator = torch.Generator().manual_seed(1)
    size = arguments["image_size"]
    return torch.randn(n, arguments["image_channels"], size, size, generator=generator), torch.linspace(0.1, 0.9, n)


@pytest.mark.parametrize(("arguments", "count"), [(MNIST, 1_075_361), (CIFAR, 35_746_307)], ids=["mnist", "cifar10"])
def test_parameter_count_of_the_paper(arguments, count):
    with torch.device("meta"):
        net = UNet(**arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(("arguments", "levels"), [(MNIST, {0}), (CIFAR, {1})], ids=["mnist", "cifar10"])
def test_attention_16_is_a_downsample_factor(arguments, levels):
    """MNIST attends at 28 x 28 pixels (28 // 16 = 1), CIFAR-10 at 16 x 16 (32 // 16 = 2)."""
    with torch.device("meta"):
        net = UNet(**arguments)
    assert net.attention_levels == levels
    assert {
        int(name.split("_")[1]) for way in (net.down, net.up) for name in way if name.startswith("attention")
    } == levels


def test_heads_of_the_paper():
    with torch.device("meta"):
        for arguments, heads in ((MNIST, 1), (CIFAR, 4)):
            found = {module.heads for module in UNet(**arguments).modules() if isinstance(module, unet.SelfAttention)}
            assert found == {heads}


def test_head_channels_decide_over_heads():
    net = UNet(**TINY | dict(heads=1, head_channels=2, attention_resolutions=[8, 4]))
    assert {net.down[f"attention_{level}_0"].heads for level in (0, 1)} == {2, 4}  # of 4 and of 8 channels


def test_attention_is_softmax_of_scaled_products_over_pixels():
    torch.manual_seed(0)
    attention = unet.SelfAttention(6, heads=2, groups=3).double()
    torch.nn.init.normal_(attention.project.weight)
    h = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        pixels = attention.query_key_value(attention.norm(h)).reshape(18, 4)
        heads = []
        for head in range(2):
            query, key, value = pixels[9 * head : 9 * head + 9].split(3)  # each (channels of a head, pixels)
            heads.append(value @ torch.softmax(query.T @ key / 3**0.5, dim=1).T)
        expected = h + attention.project(torch.cat(heads).reshape(1, 6, 2, 2))
        assert torch.allclose(attention(h), expected, atol=1e-12)


@pytest.mark.parametrize("arguments", [TINY_MNIST, TINY_CIFAR], ids=["mnist", "cifar10"])
def test_shape_and_gradients(arguments):
    net = build(**arguments).double()
    x, t = (tensor.double() for tensor in inputs(arguments))
    velocity = net(x, t)
    assert velocity.shape == x.shape
    velocity.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, f"{name} has no gradient beyond rounding"


def test_paper_sizes_run_for_mnist():
    x, t = inputs(MNIST, n=1)
    with torch.no_grad():
        velocity = build(**MNIST)(x, t)
    assert velocity.shape == x.shape and velocity.dtype == torch.float32


@pytest.mark.parametrize("arguments", [TINY_MNIST, TINY_CIFAR], ids=["mnist", "cifar10"])
def test_zero_when_new_and_still_trainable(arguments):
    net = UNet(**arguments)
    for module in net.modules():  # every branch that is added to something starts at zero
        if isinstance(module, unet.ResidualBlock):
            assert not module.after[-1].weight.any() and not module.after[-1].bias.any()
        if isinstance(module, unet.SelfAttention):
            assert not module.project.weight.any() and not module.project.bias.any()
    x, t = inputs(arguments)
    velocity = net(x, t)
    assert not velocity.any()
    (velocity - x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert net.out[-1].weight.grad.any()


def test_output_depends_on_time_and_on_every_input_channel():
    net = build(**TINY)
    x, t = inputs(TINY)
    with torch.no_grad():
        before = net(x, t)
        assert (net(x, t + 0.5) - before).abs().amin(dim=(2, 3)).min() > 0
        for channel in range(x.shape[1]):
            moved = x.clone()
            moved[:, channel, 3, 3] += 1
            assert not torch.allclose(net(moved, t), before)


def test_time_is_not_scaled():
    """Time 0.5 reaches the first layer as the cosines and sines of 0.5 times the frequencies, not of 500 times."""
    net = build(**TINY | dict(channels=6, multipliers=[1, 1])).double()
    seen = []
    net.time.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        net(inputs(TINY, n=1)[0].double(), torch.tensor([0.5], dtype=torch.float64))
    angles = 0.5 * torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)], dtype=torch.float64)
    assert torch.allclose(seen[0][0], torch.cat([angles.cos(), angles.sin()]), rtol=1e-12, atol=1e-14)


def test_one_channel_a_group_hides_the_time():
    """Group norm removes what was added to a whole channel: in the MNIST network, level 0 does not see the time."""
    seen = []
    for groups in (4, 8):
        torch.manual_seed(0)
        block = unet.ResidualBlock(8, 8, embedded=5, dropout=0.0, groups=groups).double()
        torch.nn.init.normal_(block.after[-1].weight)
        h, e = torch.randn(1, 8, 4, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
        with torch.no_grad():
            first, second = block(h.expand(2, -1, -1, -1), e)
        seen.append((first - second).abs().max().item())
    assert seen[0] > 0.1 and seen[1] < 1e-12


def test_float64_works_and_agrees_with_float32():
    net = build(**TINY)
    x, t = inputs(TINY)
    with torch.no_grad():
        single, double = net(x, t), net.double()(x.double(), t.double())
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4)


def test_batch_elements_do_not_influence_each_other():
    net = build(**TINY_MNIST).double()
    x, t = (tensor.double() for tensor in inputs(TINY_MNIST, n=3))
    x.requires_grad_()
    together = net(x, t)
    with torch.no_grad():
        for index in range(3):
            alone = net(x[index : index + 1], t[index : index + 1])
            assert torch.allclose(alone[0], together[index], atol=1e-10)
    (gradient,) = torch.autograd.grad(together[1].sum(), x)
    assert gradient[1].any() and not gradient[0].any() and not gradient[2].any()


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("multipliers", [[1, 2, 3], [3, 1, 2], [1, 1, 1]], ids=str)
def test_three_levels(multipliers, blocks, monkeypatch):
    records = []

    class Watched(SkipRecord):
        def close(self):
            super().close()
            records.append((self.pushed, self.popped))

    monkeypatch.setattr(unet, "SkipRecord", Watched)
    arguments = TINY | dict(image_size=12, multipliers=multipliers, blocks=blocks, attention_resolutions=[3])
    net = build(**arguments)
    skips = 1 + 3 * blocks + 2  # the stem, the blocks of three levels, two downsamplings
    assert records == [(skips, skips)]
    x, t = inputs(arguments)
    with torch.no_grad():
        assert net(x, t).shape == x.shape


def test_one_level_and_no_attention_levels():
    arguments = TINY | dict(image_size=7, multipliers=[1], attention_resolutions=[])
    x, t = inputs(arguments)
    with torch.no_grad():
        assert build(**arguments)(x, t).shape == x.shape


def test_dropout_acts_in_training_only():
    net = build(**TINY | dict(dropout=0.5))
    x, t = inputs(TINY)
    with torch.no_grad():
        assert torch.equal(net(x, t), net(x, t))
        net.train()
        assert not torch.equal(net(x, t), net(x, t))


def test_skip_record_names_both_counts():
    record = SkipRecord()
    record.push(8)
    record.push(16)
    assert record.pop() == 16
    with pytest.raises(ValueError, match="found 1 pops for 2 pushes"):
        record.close()
    assert record.pop() == 8
    record.close()
    with pytest.raises(ValueError, match="found 3 pops for 2 pushes"):
        record.pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(multipliers=[2, 3], channels=16, groups=32),
            "found 48 channels at level 1, expected a multiple of the 32 groups",
        ),
        (dict(channels=6, groups=4), "found 6 channels at level 0, expected a multiple of the 4 groups"),
        (dict(image_size=9), "found image size 9, expected a multiple of 2"),
        (dict(multipliers=[1, 2, 2], image_size=10), "found image size 10, expected a multiple of 4"),
        (dict(blocks=0), "found 0 blocks"),
        (dict(multipliers=[]), "0 levels"),
        (dict(channels=3, groups=1), "found 3 channels, expected an even number"),
        (dict(attention_resolutions=[16]), "found attention resolution 16 for images of size 8"),
        (dict(attention_resolutions=[2]), "found attention resolution 2 for images of size 8"),
        (dict(heads=3), "found 3 heads for the 4 channels of level 0"),
        (dict(head_channels=8), "found 8 channels a head for the 4 channels of level 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**TINY | change)


@pytest.mark.parametrize(
    ("x", "t"),
    [((2, 2, 8, 4), (2,)), ((2, 1, 8, 8), (2,)), ((2, 8, 8), (2,)), ((2, 2, 8, 8), (3,)), ((2, 2, 8, 8), (2, 1))],
)
def test_images_or_times_of_another_shape_are_refused(x, t):
    with pytest.raises(ValueError, match=r"expected \(n, 2, 8, 8\) and \(n,\)"):
        UNet(**TINY)(torch.zeros(x), torch.zeros(t))
