"""Patches of the real code that the proofs of several entries are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from repro import loop


def change_finished_networks(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object]) -> None:
    """Every network that a finished phase hands on is changed in place first."""
    real = loop._load_finished

    def load_finished(*arguments):
        result = real(*arguments)
        for network in result.networks.values():
            change(network)
        return result

    monkeypatch.setattr(loop, "_load_finished", load_finished)
