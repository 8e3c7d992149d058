"""Plain tables for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 120
GAP = 2


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; where that is more than WIDTH, the widest are wrapped."""
    widths = [max(len(row[index]) for row in [headings, *rows]) for index in range(len(headings))]
    while sum(widths) + GAP * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in [headings, *rows]:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for index in range(max(map(len, cells))):
            parts = [cell[index] if index < len(cell) else "" for cell in cells]
            lines.append(
                (" " * GAP).join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
            )
    return "\n".join(lines)


def wrapped(text: str, indent: str) -> list[str]:
    """The lines of a text; `indent` begins every line but the first."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in words, many of them cut short."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def in_patterns(names: Sequence[str], known: Sequence[str]) -> str:
    """Experiments in few words: "all 9", or a pattern such as 2d-* where every experiment that it matches is meant."""
    names, known = list(names), list(known)
    if len(names) > 1 and set(names) == set(known):
        return f"all {len(known)}"
    words: dict[str, None] = {}
    for name in names:
        prefix = name.partition("-")[0] + "-"
        family = [one for one in known if one.startswith(prefix)]
        words[f"{prefix}*" if len(family) > 1 and set(family) <= set(names) else name] = None
    return ", ".join(words)
