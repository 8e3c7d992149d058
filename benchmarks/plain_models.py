"""Training steps that know nothing of the kit, to hold the memory estimate against: each is `build` and `step(*build())`.

Small enough for a real step on a CPU. What they differ in: how long tensors live, and who keeps them.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)
        )
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet(rows=8):
    """Batch norms with buffers, in-place activations, momentum instead of Adam."""
    blocks = [Residual(16, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2)]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return (
        net,
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        torch.zeros(rows, 3, 32, 32),
        torch.zeros(rows, dtype=torch.long),
    )


def classify(net, optimiser, x, label):
    optimiser.zero_grad()
    functional.cross_entropy(net(x), label).backward()
    optimiser.step()


class ViT(nn.Module):
    def __init__(self, width=96, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(torch.zeros(1, 65, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.head(self.layers(tokens)[:, 0])


def vit(rows=8):
    """Attention over patches, with dropout."""
    net = ViT()
    return (
        net,
        torch.optim.AdamW(net.parameters(), 1e-3),
        torch.zeros(rows, 3, 32, 32),
        torch.zeros(rows, dtype=torch.long),
    )


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        parts = self.attend(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, words=1000, width=96, depth=2, checkpointed=False):
        super().__init__()
        self.words, self.checkpointed = nn.Embedding(words, width), checkpointed
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight  # one matrix, two uses

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


def transformer(rows=4, **sizes):
    """Causal attention, tied weights, a large output."""
    net = Transformer(**sizes)
    return net, torch.optim.AdamW(net.parameters(), 1e-3), torch.zeros(rows, 129, dtype=torch.long)


def predict_next(net, optimiser, tokens):
    optimiser.zero_grad()
    scores = net(tokens[:, :-1])
    functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimiser.step()


def checkpointed_transformer():
    """Activation checkpointing: blocks are computed again in the backward pass."""
    return transformer(rows=4, depth=4, checkpointed=True)


def accumulate(net, optimiser, tokens):
    """Gradient accumulation: one update from four parts of the minibatch."""
    optimiser.zero_grad()
    for part in tokens.chunk(4):
        scores = net(part[:, :-1])
        (functional.cross_entropy(scores.flatten(0, 1), part[:, 1:].flatten()) / 4).backward()
    optimiser.step()


def lstm(rows=16):
    """A state that is handed on from step to step in time."""
    net = nn.ModuleDict({"lstm": nn.LSTM(32, 64, 2, batch_first=True), "head": nn.Linear(64, 8)})
    return net, torch.optim.RMSprop(net.parameters(), 1e-3), torch.zeros(rows, 12, 32), torch.zeros(rows, 8)


def last_state(net, optimiser, x, y):
    optimiser.zero_grad()
    states, _ = net["lstm"](x)
    functional.mse_loss(net["head"](states[:, -1]), y).backward()
    optimiser.step()


def gan(rows=16):
    """Two networks, two optimisers; the discriminator is called three times in a step."""
    generator = nn.Sequential(nn.Linear(32, 64 * 16), nn.Unflatten(1, (64, 4, 4)), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
                              nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())  # fmt: skip
    discriminator = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * 16, 1))  # fmt: skip
    optimisers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in (generator, discriminator)]
    return generator, discriminator, *optimisers, torch.zeros(rows, 3, 16, 16), torch.zeros(rows, 32)


def play(generator, discriminator, generator_optimiser, discriminator_optimiser, real, noise):
    discriminator_optimiser.zero_grad()
    fake = generator(noise)
    (
        functional.softplus(-discriminator(real)).mean() + functional.softplus(discriminator(fake.detach())).mean()
    ).backward()
    discriminator_optimiser.step()
    generator_optimiser.zero_grad()
    functional.softplus(-discriminator(fake)).mean().backward()
    generator_optimiser.step()


PLAIN = {
    "ResNet, SGD with momentum": (resnet, classify),
    "ViT with dropout, AdamW": (vit, classify),
    "causal transformer, clipping": (transformer, predict_next),
    "the same, gradients accumulated": (transformer, accumulate),
    "the same of 4 blocks, checkpointed": (checkpointed_transformer, predict_next),
    "LSTM, RMSprop": (lstm, last_state),
    "GAN, two optimisers": (gan, play),
}
