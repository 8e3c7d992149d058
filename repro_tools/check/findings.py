"""One fault that a check of the spec found, and the words in which faults are told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from repro_tools.check.paper import Readings
from repro_tools.table import listed

PLACEHOLDER, MISSING, UNSOURCED = "to fill in", "missing", "unsourced"
CONTRADICTED, NOT_FOUND, CHANGED = "contradicted", "not found", "changed"
KINDS = (PLACEHOLDER, MISSING, UNSOURCED, CONTRADICTED, NOT_FOUND, CHANGED)


@dataclass(frozen=True)
class Finding:
    """One fault: its kind, the file and key, what is there, and what should be."""

    kind: str
    place: str
    found: str
    expected: str


def grouped(items: Iterable[tuple[str, Finding]]) -> Iterator[Finding]:
    """Findings, each with its experiment; those that differ in nothing else become one that names all experiments."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for experiment, finding in items:
        path = f"configs/{experiment}.yaml"
        same = (finding.kind, *(part.replace(path, "\0") for part in (finding.place, finding.found, finding.expected)))
        groups.setdefault(same, []).append(experiment)
    for (kind, *parts), experiments in groups.items():
        first = f"configs/{experiments[0]}.yaml"
        place, found, expected = (part.replace("\0", first) for part in parts)
        if "\0" not in "".join(parts):
            found += f" (in {some(experiments)})"
        elif len(experiments) > 1:
            found += f" (also in {some(experiments[1:])})"
        yield Finding(kind, place, found, expected)


def some(items: Sequence[Any]) -> str:
    """Names or numbers in words; many of them cut short."""
    return listed([str(item) for item in items])


def on_pages(pages: Sequence[int]) -> str:
    return f"page{'s' * (len(pages) > 1)} {some(pages)}"


def short(text: str) -> str:
    """A text in quotation marks, in one line, cut to 60 characters."""
    flat = " ".join(text.split())
    return f"'{flat}'" if len(flat) <= 60 else f"'{flat[:57]}...'"


def readings_in_words(token: Readings) -> str:
    """What a number in the paper may mean: '60 or 0.6'."""
    return " or ".join(f"{reading:f}" for reading in sorted(token, reverse=True))
