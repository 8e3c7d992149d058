"""A causal transformer (Vaswani et al., 2017) on sequences of unequal length, which count by some step modulo ten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention
from torch.optim.lr_scheduler import OneCycleLR

from repro.phases import Batch, Draw, Networks, Phase
from repro.update import Update

BATCH, LENGTH, TOKENS, END, PADDING = 32, 12, 12, 10, 11
WIDTH, HEADS, LAYERS, DROPOUT, RATE, NORM = 32, 2, 2, 0.1, 3e-3, 1.0


@dataclass
class Learner:
    network: nn.Module
    adam: torch.optim.Adam
    schedule: OneCycleLR


class LanguageModel(Phase[Learner]):
    name, steps = "language_model", 600

    def setup(self, earlier: Mapping[str, Networks]) -> Learner:
        network = Transformer()
        adam = torch.optim.Adam(network.parameters(), lr=RATE)
        return Learner(network, adam, OneCycleLR(adam, max_lr=RATE, total_steps=self.steps))

    def minibatch(self, step: int, draw: Draw) -> Batch:
        """tokens (BATCH, LENGTH): 3 to LENGTH - 1 digits, the end, padding."""
        first, by = torch.randint(10, (2, BATCH, 1), generator=draw)
        digits = torch.randint(3, LENGTH, (BATCH, 1), generator=draw)
        place = torch.arange(LENGTH)
        tokens = torch.where(place < digits, (first + by * place) % 10, PADDING)
        return {"tokens": tokens.scatter(1, digits, END)}

    def train_step(self, state: Learner, batch: Batch, update: Update) -> None:
        for part in update.parts(batch):
            guess, truth = state.network(part["tokens"][:, :-1]), part["tokens"][:, 1:]
            loss = cross_entropy(guess.flatten(0, 1), truth.flatten(), ignore_index=PADDING)
            update.backward(loss, weight=predicted(part) / predicted(batch))
        update.log("loss", update.step(state.adam, clip=NORM))
        state.schedule.step()

    def networks(self, state: Learner) -> Mapping[str, nn.Module]:
        return {"network": state.network}


def predicted(batch: Batch) -> int:
    """Tokens that the loss is a mean over: all but padding and the first of each row."""
    return int((batch["tokens"][:, 1:] != PADDING).sum())


class Transformer(nn.Module):
    """Tokens (rows, length) to logits (rows, length, TOKENS) of the next one. Its last weights are its first."""

    later: Tensor  # (LENGTH, LENGTH): -inf where a token would look ahead

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        nn.init.normal_(self.token.weight, std=WIDTH**-0.5)
        self.output.weight = self.token.weight
        self.register_buffer("later", torch.full((LENGTH, LENGTH), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        padding = torch.zeros(tokens.shape, device=tokens.device).masked_fill(tokens == PADDING, -torch.inf)
        hidden = self.token(tokens) + self.place.weight[:length]
        for layer in self.layers:
            hidden = layer(hidden, self.later[:length, :length] + padding[:, None, None])
        logits: Tensor = self.output(self.norm(hidden))
        return logits


class Layer(nn.Module):
    """Attention and a network for each place, each behind a norm and with a way past it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.each = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        heads = self.into(self.norm(hidden)).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        seen = scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        hidden = hidden + dropout(self.out(seen), DROPOUT, self.training)
        return hidden + dropout(self.each(hidden), DROPOUT, self.training)


def make_phase() -> LanguageModel:
    return LanguageModel()
