"""Markdown that the kit writes: cells, tables, numbers, and the parts of a page that a person writes.

Text of a spec or a record may hold anything, so it passes through `text` or `cell` before it stands on a page.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from repro.errors import BadInput
from repro_tools.spec import Paper

_OPEN, _CLOSE = "<!-- yours: {} -->", "<!-- /yours: {} -->"
LEAST, MOST = 3, 8
"""Significant digits of a value without a spread, and of any value."""
_MARK = re.compile(r"<!-- (/?)yours: ([a-z0-9-]+) -->")


def text(value: object) -> str:
    """A value as a page shows it: tags as text outside of code, no line breaks, so that it begins no heading, list or script."""
    parts = re.split(r"(`[^`]*`)", " ".join(str(value).split()))
    return "".join(part if part.startswith("`") else re.sub(r"<(?=[A-Za-z/!?])", "&lt;", part) for part in parts)


def cell(value: object) -> str:
    """A value inside a table."""
    return text(value).replace("|", "\\|")


def code(value: object) -> str:
    """A value in code font, also inside a table. Backticks in it become apostrophes, since they would end it."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`" if str(value) else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float | None, spread: float | None = None, significant: int | None = None) -> str:
    """A measured value, to two significant digits of its `spread` and to no fewer than `significant` of its own.

    Without a spread, or with one of 0, three significant digits or the number asked for. Nothing for None.
    """
    if value is None:
        return ""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    wanted = [1 - _exponent(spread, 2)] if spread and math.isfinite(spread) else []
    if significant or not wanted:
        digits = significant or LEAST
        wanted.append(digits - 1 - _exponent(value, digits))
    exponent = _exponent(value, MOST)
    decimals = min(max(wanted), MOST - 1 - exponent)
    if decimals > MOST or exponent >= MOST:
        return f"{value:.{max(0, decimals + exponent)}e}"
    return f"{value:z.{max(0, decimals)}f}"


def mean_and_spread(summary: Mapping | None, reported: float | None = None) -> tuple[str, str]:
    """Mean and standard deviation of a judgement's summary as a page shows them; empty where there is none.

    One seed has no spread: its value gets as many significant digits as the reported one has, and three at least.
    """
    if summary is None:
        return "", ""
    mean, spread = summary["mean"], summary["spread"]
    digits = None if spread or reported is None else max(LEAST, _significant(reported))
    return number(mean, spread, digits), number(spread, spread)


def as_reported(value: float | None) -> str:
    """A value of the paper with the digits that the spec gives it. A whole number below 100 keeps one decimal: 98.0, not 98."""
    if value is None:
        return ""
    shown = f"{value:.{MOST}g}"
    return f"{value:.1f}" if re.fullmatch(r"-?\d{1,2}", shown) else shown


def _significant(value: float) -> int:
    """The significant digits of a value as it is shown."""
    mantissa = as_reported(value).split("e")[0]
    return len(mantissa.replace(".", "").lstrip("-0")) if value else 0


def _exponent(value: float, digits: int) -> int:
    """The power of ten of the first digit, after rounding to `digits` significant ones."""
    return int(f"{value:.{digits - 1}e}".split("e")[1])


def title_of(paper: Paper) -> str:
    """The title, as a link where the spec gives the address of a web page."""
    url = paper.url or ""
    is_page = re.fullmatch(r"https?://[^\s<>]+", url)
    address = url.replace("(", "%28").replace(")", "%29")
    return f"[{text(paper.title)}]({address})" if is_page else text(paper.title)


def edition_of(paper: Paper) -> str:
    """Which text of the paper it is: 'arXiv 2401.14069v1', or what the spec says of one that is not there."""
    arxiv, version, url = paper.arxiv or "", paper.version or "", paper.url or ""
    number_there = re.fullmatch(r"(?i:arxiv:)?(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})", arxiv.strip())
    if number_there and re.fullmatch(r"v\d+", version):
        parts = [f"arXiv {number_there[1]}{version}"]
    else:
        parts = [f"arXiv {number_there[1]}" if number_there else arxiv, version]
    if not re.match(r"https?://", url):
        parts.append(url)
    return ", ".join(text(part) for part in parts if part.strip()) or "edition not stated"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def yours(name: str, prompt: str, earlier: Mapping[str, str]) -> str:
    """A part that only a person can write: what stood there before, or a prompt that says so."""
    body = earlier.get(name) or f"*Not written yet. {prompt}*"
    return f"{_OPEN.format(name)}\n{body}\n{_CLOSE.format(name)}\n"


def kept(earlier: Mapping[str, str], used: Sequence[str]) -> str:
    """Parts that a person wrote and that the page no longer asks for; they are shown at its end rather than lost."""
    left = [name for name in earlier if name not in used]
    if not left:
        return ""
    return "## Kept from an earlier version\n\n" + "\n".join(yours(name, "", earlier) for name in left)


def words(page: str) -> int:
    """The words of a page: runs of characters with a letter or a digit in them, without comments and addresses of links."""
    page = re.sub(r"<!--.*?-->", " ", page, flags=re.DOTALL)
    page = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", page)
    return sum(bool(re.search(r"\w", word)) for word in page.split())


def is_written(name: str, earlier: Mapping[str, str]) -> bool:
    """Whether a person wrote the part `name`."""
    return bool(earlier.get(name))


def written_by_hand(path: Path) -> dict[str, str]:
    """What a person wrote into the parts of a page that the kit will write again, by their names; prompts are left out.

    Raises BadInput when the marks are damaged: writing the page again would then lose text.
    """
    if not path.exists():
        return {}
    page = path.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    begun: re.Match | None = None
    for mark in _MARK.finditer(page):
        closes, name = mark.groups()
        line = page.count("\n", 0, mark.start()) + 1
        if bool(closes) != (begun is not None) or (begun and begun[2] != name) or (not closes and name in found):
            expected = f"'{_CLOSE.format(begun[2])}'" if begun else "each part opened once and closed"
            raise BadInput(f"{path}, line {line}: found '{mark[0]}', expected {expected}; nothing was written")
        if begun:
            found[name] = page[begun.end() : mark.start()].strip()
        begun = None if closes else mark
    if begun:
        raise BadInput(f"{path}: found '{begun[0]}' without an end, expected '{_CLOSE.format(begun[2])}'")
    return {name: body for name, body in found.items() if body and not body.startswith("*Not written yet.")}


def write(path: Path, page: str) -> None:
    """Replaces a file as a whole: a reader sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
