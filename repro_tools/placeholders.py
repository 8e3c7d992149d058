"""Texts that hold the place of something still to be written ("FILL IN: ..."), and where they stand.

A project that was begun from a template is full of them and can run. What was made with one of them earns no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

from repro.config import RunConfig
from repro_tools.spec import Claim, Spec

PLACEHOLDER = re.compile(r"\s*(?:FILL IN|TODO|TBD|FIXME|\?\?\?)")
FEW = 3
"""So many places are named in a line about all of them."""


@dataclass(frozen=True)
class OpenPlace:
    """A placeholder, or a text that is empty: its key as pydantic names it, as a reader finds it, and the text."""

    key: str
    shown: str
    text: str


def open_places(node: Any, key: str = "", shown: str = "") -> Iterator[OpenPlace]:
    """Every placeholder and empty text in plain data."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from open_places(child, _join(key, name), _join(shown, name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from open_places(child, _join(key, str(index)), _join(shown, label(child, str(index))))
    elif isinstance(node, str) and (not node.strip() or PLACEHOLDER.match(node)):
        yield OpenPlace(key, shown, node.strip())


def label(entry: Any, index: str) -> str:
    """An entry of a list as a reader finds it: by its id or name, else by its index."""
    name = (entry.get("id") or entry.get("name")) if isinstance(entry, dict) else None
    return index if name is None else f"'{name}'"


def holds_placeholder(data: Any) -> bool:
    """Whether plain data is a placeholder or holds one. An empty text is none."""
    return any(place.text for place in open_places(data))


def of_run(method: str, spec: Spec, experiment: str, config: RunConfig | dict[str, Any]) -> list[str]:
    """What a run of the experiment would be made with and is still to be filled in.

    `method` is `Method.placeholder`. The claims are not among them: a run measures the same whatever they say.
    """
    places = [f"method: {method}"] if method else []
    places += _places_in(config, f"configs/{experiment}.yaml: ")
    for setting in spec.settings:
        if fnmatchcase(experiment, setting.experiments) or holds_placeholder(setting.experiments):
            places += _places_in(setting, f"spec.yaml: setting '{setting.name}'.")
    return places


def of_claim(spec: Spec, claim: Claim) -> list[str]:
    """What is still to be filled in of a claim and of its tolerance."""
    tolerance = spec.tolerances[claim.tolerance]
    return [
        *_places_in(claim, f"spec.yaml: claim {claim.id}."),
        *_places_in(tolerance, f"spec.yaml: tolerance {claim.tolerance}."),
    ]


def _places_in(entry: BaseModel | dict[str, Any], prefix: str) -> list[str]:
    data = entry.model_dump(mode="json") if isinstance(entry, BaseModel) else entry
    return [f"{prefix}{place.shown}" for place in open_places(data) if place.text]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
