"""A phase of a few milliseconds for tests of what a killed run keeps. It notes what each step saw."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from repro.config import Pace
from repro.loop import run_phase
from repro.phases import SingleLossPhase
from repro.runtime import Runtime

STEPS, BATCH, ROWS, WIDTH = 8, 4, 32, 16
SAVED_EVERY = 2


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


class TinyPhase(SingleLossPhase):
    """Dropout and a linear layer, trained on rows drawn from a set. The process dies before the step `killed_at`."""

    name, iterations = "tiny", STEPS

    def __init__(self, killed_at: int | None = None):
        self.killed_at = killed_at
        self.done: list[int] = []
        self.rows: list[list[int]] = []
        self.dropped: list[list[bool]] = []
        self.rates: list[float] = []

    def make_model(self):
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, 1))

    def make_optimiser(self, model):
        self.optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
        self.optimiser.register_step_pre_hook(lambda optimiser, *_: self.rates.append(optimiser.param_groups[0]["lr"]))
        return self.optimiser

    def minibatch(self, step, generator):
        if step == self.killed_at:
            raise Killed
        self.done.append(step)
        return {"row": torch.randperm(ROWS, generator=generator)[:BATCH]}

    def loss(self, model, batch):
        self.rows.append(batch["row"].tolist())
        kept = model[0](torch.ones(BATCH, WIDTH))
        self.dropped.append((kept == 0).flatten().tolist())
        return (model[1](kept).squeeze(1) - batch["row"]).square().mean()


def train(phase: TinyPhase, folder: Path) -> TinyPhase:
    """One process: goes on from what is saved in `folder`, until the phase ends or the process dies."""
    with suppress(Killed):
        run_phase(
            phase,
            folder=folder,
            identity={},
            seed=0,
            runtime=Runtime(torch.device("cpu")),
            pace=Pace(log_every=1, checkpoint_every=SAVED_EVERY),
            earlier={},
        )
    return phase
