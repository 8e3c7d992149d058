"""Types of option values that only the tools have; the others are the engine's (`repro.__main__`)."""

from __future__ import annotations

import argparse


def hours(text: str) -> float:
    """A finite number of hours above 0."""
    return above_zero(text, "a number of hours above 0")


def above_zero(text: str, expected: str) -> float:
    """A finite number above 0; `expected` says of what, in the error."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found '{text}', expected {expected}")
    return value
