"""m44: attention that is silently not fused because of strides.

In every attention of every UNet of the experiments no tensor is as large as the weights of attention, forward and backward, and PyTorch's fused
kernel takes the queries, keys and values. `repro memory` has nothing to say about them.
"""

import warnings
from functools import partial

import pytest
import torch
from proof import Proof
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsgf import unet
from nsgf.phases import make_phases
from repro.config import load
from repro.runtime import Runtime
from repro_tools.memory.footprint import of_phase

FLOAT32 = 4
PIXELS = {"mnist": 784, "cifar10": 256, "digits": 16}  # that attend to each other, at most


def field(project, experiment, *overrides):
    """The phase of the velocity field."""
    config, _ = load(project.config_class(experiment), project.experiments()[experiment], list(overrides))
    return make_phases(config, Runtime(torch.device("cpu")))[0]


def attentions(project, experiment):
    """Each attention of the experiment's UNet, and the features that it gets: noise in their real shape, for one image."""
    phase, made = field(project, experiment), {}
    with torch.device("meta"):  # shapes without numbers: CIFAR-10's network has 36 million
        network = phase.make_model()
        for module in network.modules():
            if isinstance(module, unet.SelfAttention):
                module.register_forward_pre_hook(lambda module, h: made.update({(module.heads, h[0].shape): None}))
        network(torch.zeros(1, *phase.laws.shape), torch.zeros(1))
    for heads, shape in made:
        torch.manual_seed(0)
        yield unet.SelfAttention(shape[1], heads, groups=1), torch.randn(shape, requires_grad=True)


def check(project, storages, experiment):
    largest = 0
    for attention, h in attentions(project, experiment):
        pixels = h[0, 0].numel()
        weights = attention.heads * pixels**2 * FLOAT32
        if weights > 3 * h.nbytes:  # than queries, keys and values: otherwise the size of a tensor tells nothing
            with storages() as counted:
                attention(h).sum().backward()
            told = f"{experiment}: one tensor has {counted.largest} bytes, the weights of {pixels} pixels"
            assert counted.largest < weights, f"{told} have {weights}"
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            try:
                attention(h)
            except RuntimeError as error:
                why = "; ".join(str(reason.message) for reason in reasons)
                raise AssertionError(f"{experiment}: {pixels} pixels: {error} {why}") from None
        largest = max(largest, pixels)
    assert largest == PIXELS[experiment]


def check_command(project):
    """What `repro memory` says below its table."""
    small = ["channels=8", "multipliers=[1]", "attention_resolutions=[]"]  # the middle attends
    phase = field(project, "digits", *(f"phases.velocity_field.network.{size}" for size in small))
    notes = of_phase(phase, [], steps=1, work=False).notes
    assert not notes, f"repro memory: {' '.join(notes)}"


def attention_by(heads):
    """SelfAttention with another way from (n, 3 * channels, s, s) to the queries, keys and values of scaled_dot_product_attention."""

    def forward(self, h):
        mixed = heads(self, self.query_key_value(self.norm(h)))
        return h + self.project(mixed.transpose(2, 3).reshape(h.shape))

    return lambda monkeypatch: monkeypatch.setattr(unet.SelfAttention, "forward", forward)


def split(self, h):
    """(n, heads, 3, pixels, head channels), the pixels of a channel side by side in memory."""
    return h.reshape(len(h), self.heads, 3, self.head_channels, -1).transpose(3, 4)


def strided(monkeypatch):
    """As this project's UNet was: a convolution puts the pixels side by side, and the transpose is a view."""
    attention_by(lambda self, h: functional.scaled_dot_product_attention(*split(self, h).unbind(2)))(monkeypatch)


def only_the_value_strided(monkeypatch):
    def heads(self, h):
        query, key, value = split(self, h).unbind(2)
        return functional.scaled_dot_product_attention(query.contiguous(), key.contiguous(), value)

    attention_by(heads)(monkeypatch)


def weights_by_hand(monkeypatch):
    """As in code from before PyTorch 2.0."""

    def heads(self, h):
        query, key, value = split(self, h).contiguous().unbind(2)
        return torch.softmax(query @ key.transpose(2, 3) / self.head_channels**0.5, 3) @ value

    attention_by(heads)(monkeypatch)


def each_made_contiguous(monkeypatch):
    def heads(self, h):
        return functional.scaled_dot_product_attention(*(one.contiguous() for one in split(self, h).unbind(2)))

    attention_by(heads)(monkeypatch)


def pixel_after_pixel(monkeypatch):
    """None of the three is contiguous, and each has its head channels side by side: that is all a fused kernel asks for."""

    def heads(self, h):
        rows = h.flatten(2).transpose(1, 2).contiguous()  # (n, pixels, 3 * channels)
        split = rows.reshape(len(h), -1, self.heads, 3, self.head_channels).transpose(1, 2)
        query, key, value = split.unbind(3)
        assert not query.is_contiguous() and query.stride(-1) == 1
        return functional.scaled_dot_product_attention(query, key, value)

    attention_by(heads)(monkeypatch)


INNOCENT = [each_made_contiguous, pixel_after_pixel]
PLANTS = [strided, only_the_value_strided, weights_by_hand]
PROOFS = [
    *(
        Proof(
            partial(check, experiment=experiment),
            dict.fromkeys(PLANTS, f"bytes, the weights of {PIXELS[experiment]} pixels have "),
            INNOCENT,
        )
        for experiment in ("mnist", "cifar10")
    ),
    Proof(
        partial(check, experiment="digits"),
        {strided: "the last dimension of the input to have stride 1. Got Query.stride(-1): 16"},
        INNOCENT,
    ),
    Proof(check_command, {strided: "repro memory: attention is not fused, all its weights lie in memory"}, INNOCENT),
]


def test_proof(case):
    case()


def test_the_symptom_is_what_pytorch_says_when_it_must_fuse():
    strided = torch.randn(1, 1, 8, 4).transpose(2, 3)
    functional.scaled_dot_product_attention(strided, strided, strided)  # no message
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.warns(UserWarning, match="kernel not used because|All fused kernels require|^$") as told,
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        functional.scaled_dot_product_attention(strided, strided, strided)
    reason = "All fused kernels require the last dimension of the input to have stride 1. Got Query.stride(-1): 4"
    assert any(reason in str(warning.message) for warning in told)
