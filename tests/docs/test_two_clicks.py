"""From every section of the rules, at most two clicks on the built site lead to its reasons, its evidence, its code and a test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
RULES, CATALOGUE = "SKILL.html", "LEARNING.html"
WITHOUT_RULES = {"Measured traps"}  # reminders of what other sections and their pages say


def links(text: str, page: str) -> Iterator[tuple[str, str]]:
    """(page of the site, anchor) of every link in the text of a page."""
    for reference in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
        address = urlsplit(reference)
        if not address.scheme and not address.netloc:
            target = os.path.join(os.path.dirname(page), unquote(address.path)) if address.path else page
            yield os.path.normpath(target), unquote(address.fragment)


def article(site: Path, page: str) -> str:
    """What a page says, without the navigation around it."""
    text = (site / page).read_text(encoding="utf-8")
    found = re.search(r"<article\b.*?</article>|<body\b.*?<main>", text, re.DOTALL)
    return found[0] if found else text


def sections(text: str, level: str) -> dict[str, str]:
    """The parts of an article below its headings of that level, by their ids."""
    parts = re.split(rf'(?=<h{level} id=")', text)
    return {re.match(r'<h\d id="([^"]+)"', part)[1]: part for part in parts if part.startswith(f"<h{level} ")}


def kind(page: str, anchor: str) -> str | None:
    """What a link leads to: reasons, evidence, code or a test; None for anything else."""
    if page == CATALOGUE and re.fullmatch(r"m\d\d", anchor):
        return "evidence"
    if page.startswith("refs/") and page.endswith(".html"):
        return "reasons"
    if page.startswith("code/"):
        return "test" if re.search(r"/test_\w+\.py\.html$", page) else "code"
    return None


def missing(site: Path) -> list[str]:
    """A line for every section of the rules and every kind of page that is further than two links away."""
    rules = {
        identifier: text
        for identifier, text in sections(article(site, RULES), "2").items()
        if re.sub(r"<[^>]+>|&para;|¶", "", text.partition("</h2>")[0]).strip() not in WITHOUT_RULES
    }
    entries = sections(article(site, CATALOGUE), "3")
    found = [] if rules else [f"{RULES}: found no section"]
    for identifier, text in rules.items():
        first = set(links(text, RULES)) - {(RULES, identifier)}
        second = set()
        for page, anchor in first:
            if page == CATALOGUE:
                second |= set(links(entries.get(anchor, ""), page))
            elif page != RULES and page.endswith(".html") and (site / page).is_file():
                second |= set(links(article(site, page), page))
        reached = {kind(*link) for link in first | second}
        found += [f"{identifier}: no {one}" for one in ("reasons", "evidence", "code", "test") if one not in reached]
    return found


def test_everything_about_a_rule_is_two_clicks_away(site):
    assert missing(site) == []


SOUND = {
    RULES: '<article><h2 id="a">A</h2><a href="refs/a.html">x</a> <a href="LEARNING.html#m01">m01</a></article>',
    CATALOGUE: '<article><h3 id="m01">x</h3><a href="code/tests/test_a.py.html">x</a><h3 id="m02">y</h3></article>',
    "refs/a.html": '<article><a href="../code/a.py.html">x</a></article>',
    "code/a.py.html": "<body><main></main></body>",
    "code/tests/test_a.py.html": "<body><main></main></body>",
}
BROKEN = {
    "no page of refs": (RULES, 'href="refs/a.html"', 'href="TODO.html"', ["a: no reasons", "a: no code"]),
    "no entry": (RULES, "LEARNING.html#m01", "LEARNING.html", ["a: no evidence", "a: no test"]),
    "an entry that names no test": (CATALOGUE, "test_a", "a", ["a: no test"]),
    "the test of another entry": (RULES, "#m01", "#m02", ["a: no test"]),
    "a page that names no code": ("refs/a.html", "code/a.py.html", "TODO.html", ["a: no code"]),
    "code three clicks away": ("refs/a.html", "../code/a.py.html", "b.html", ["a: no code"]),
    "no section": (RULES, "h2", "h4", ["SKILL.html: found no section"]),
}


def planted(folder: Path, pages: dict[str, str]) -> Path:
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_finds(tmp_path, name):
    page, text, instead, expected = BROKEN[name]
    assert missing(planted(tmp_path, SOUND | {page: SOUND[page].replace(text, instead)})) == expected


def test_the_check_is_silent_on_a_sound_site(tmp_path):
    assert missing(planted(tmp_path, SOUND)) == []
