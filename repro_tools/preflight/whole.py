"""The whole of a phase in motion, leaf by leaf, and the first leaf in which two of them differ (`repro preflight`).

A leaf is a tensor or a plain value of what `Loop.snapshot` holds, or a tensor of the networks that the phase would hand on. How long
anything took is in neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from repro.loop import Loop
from repro_tools.table import listed

Place = tuple[Any, ...]
"""Where a leaf lies: keys and indices from the outside in, such as ("state", "optimiser", "state", 0, "exp_avg")."""

LONGEST = 60
"""Characters of a value that are told."""


@dataclass(frozen=True)
class Leaf:
    """A value as it is told, and the hash of its bytes where it is a tensor: two equal leaves have the same bits."""

    told: str
    digest: str = ""


NOTHING = Leaf("nothing")
Whole = Mapping[Place, Leaf]


def whole(loop: Loop) -> Whole:
    """Every leaf in the order of the snapshot. No copy of a tensor is kept."""
    networks = {name: dict(one.state_dict()) for name, one in loop.phase.networks(loop.state).items()}
    return leaves(with_rows(loop, loop.snapshot()) | {"networks": networks})


def with_rows(loop: Loop, snapshot: dict[str, Any]) -> dict[str, Any]:
    """A snapshot of the loop with the data of its round, which otherwise may lie in a folder."""
    if loop.round is None:
        return snapshot
    return snapshot | {"round": {"began": loop.round.began, "rows": dict(loop.round.rows)}}


def leaves(snapshot: Mapping[str, Any]) -> Whole:
    """Every leaf of nested dicts, lists and tuples. A tuple that has become a list holds the same leaves."""
    return dict(_leaves(snapshot, ()))


def first_difference(expected: Whole, found: Whole, when: str) -> str | None:
    """One line on the first leaf that differs and the parts in which others do; None where every bit is the same."""
    places = [*expected, *(place for place in found if place not in expected)]
    differing = [place for place in places if expected.get(place) != found.get(place)]
    if not differing:
        return None
    first = differing[0]
    was, now = expected.get(first, NOTHING), found.get(first, NOTHING)
    what = "other bits" if was.told == now.told else _short(now.told)
    others = list(dict.fromkeys(_name(place[:2]) for place in differing[1:]))
    return (
        f"{_name(first)}: found {what} {when}"
        + (f", expected {_short(was.told)}" if was.told != now.told else "")
        + (f"; other leaves differ in {listed(others)}" if others else "")
    )


def _leaves(value: Any, place: Place) -> Iterator[tuple[Place, Leaf]]:
    if isinstance(value, Mapping) and set(value) == {"state_dict", "resting", "frozen"}:  # a network
        value = {**value["state_dict"], **{key: value[key] for key in ("resting", "frozen")}}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*place, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*place, index))
    elif isinstance(value, Tensor):
        yield place, _leaf_of_tensor(value)
    else:
        yield place, Leaf(repr(value))


def _leaf_of_tensor(tensor: Tensor) -> Leaf:
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        return Leaf(f"a tensor of the type {type(tensor).__name__}, {tensor.layout}")  # which no checkpoint takes
    told = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return Leaf(told, hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest())


def _name(place: Place) -> str:
    return ".".join(map(str, place))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
