"""The form in which each file of this folder proves one entry of LEARNING.md.

    PROOFS = [Proof(check, plant={flipped: "moves away from the target"}, innocent=[in_float64])]

    def test_proof(case):
        case()

`case` (conftest.py) runs every proof: green on the code as it is; red with each mistake planted, for the reason beside it; silent on each
innocent variant.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pytest

Patch = Callable[..., None]
"""Changes the real code through pytest's monkeypatch, its argument of that name. Other arguments are fixtures."""


@dataclass(frozen=True)
class Proof:
    """check: what must hold of the real code; an AssertionError that says what was found where it does not. Its arguments are fixtures.
    plant: the smallest patches that put the mistake back, each with the words that the AssertionError must contain literally.
    innocent: patches that change the code and are correct."""

    check: Callable[..., None]
    plant: Mapping[Patch, str]
    innocent: Sequence[Patch]

    def __post_init__(self) -> None:
        if not (self.plant and all(self.plant.values()) and self.innocent):
            raise ValueError(f"{self}: expected a plant, a reason for each, and an innocent variant")

    def cases(self) -> Iterator[tuple[str, Patch | None, str | None]]:
        """Name, patch and reason of each case; no patch: the code as it is; no reason: the check must pass."""
        yield "green", None, None
        for patch, reason in self.plant.items():
            yield f"red-{_name(patch)}", patch, reason
        for patch in self.innocent:
            yield f"silent-{_name(patch)}", patch, None

    def run(self, patch: Patch | None, reason: str | None, request: pytest.FixtureRequest) -> None:
        """Runs the check under the patch, and takes the patch back."""
        with request.getfixturevalue("monkeypatch").context() as monkeypatch:
            if patch is not None:
                _call(patch, request, monkeypatch=monkeypatch)
            if reason is None:
                _call(self.check, request)
            else:
                # No other exception counts: a patch that breaks the code proves nothing.
                with pytest.raises(AssertionError, match=re.escape(reason)):
                    _call(self.check, request)

    def __str__(self) -> str:
        return _name(self.check)


def _call(function: Callable[..., None], request: pytest.FixtureRequest, **given: object) -> None:
    wanted = [
        name for name, one in inspect.signature(function).parameters.items() if one.default is inspect.Parameter.empty
    ]
    function(**{name: given[name] if name in given else request.getfixturevalue(name) for name in wanted})


def _name(function: Callable[..., None]) -> str:
    """Of a function, or of one with arguments filled in: their values too."""
    if isinstance(function, partial):
        values = [*function.args, *function.keywords.values()]
        return "-".join([_name(function.func), *(str(value) for value in values if isinstance(value, str | int))])
    return function.__name__
