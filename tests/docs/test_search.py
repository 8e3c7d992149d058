"""Searching the site for an error message finds the entry of the catalogue that quotes it, in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from document_checks import sections

ROOT = Path(__file__).parents[2]
BOX, META, LINK = "input.md-search__input", ".md-search-result__meta", ".md-search-result__link"
EMPTY = "Type to start searching"
TRACEBACK = """Traceback (most recent call last):
  File "/kaggle/working/train.py", line 212, in <module>
    loss = (u - (y - x0)).pow(2).mean()
RuntimeError: The size of tensor a (64) must match the size of tensor b (17) at non-singleton dimension 0"""


def symptoms() -> dict[str, str]:
    """The symptom of every entry, by its number."""
    text = (ROOT / "LEARNING.md").read_text(encoding="utf-8")
    return {
        number: re.search(r"^- \*\*Symptom\*\*: (.*)$", body, re.MULTILINE)[1]
        for number, _, body in sections(text, "m")
    }


def messages(symptom: str) -> list[str]:
    """What a person would paste: the quoted texts of two words and more."""
    return [quoted for quoted in re.findall(r"`([^`]+)`", symptom) if len(re.findall(r"[A-Za-z_]+", quoted)) > 1]


def first_results(page, query: str) -> list[str]:
    """The addresses of the first results, without the host."""
    page.keyboard.press("Escape")
    page.keyboard.press("f")
    page.fill(BOX, "")
    page.press(BOX, "End")
    page.wait_for_function(f"document.querySelector('{META}').textContent.includes('{EMPTY}')")
    page.fill(BOX, query)
    page.press(BOX, "End")
    page.wait_for_function(f"!document.querySelector('{META}').textContent.includes('{EMPTY}')")
    links = page.locator(LINK).evaluate_all("links => links.map(link => link.href)")
    return [re.sub(r"^https?://[^/]*/|\?[^#]*", "", link) for link in links]


@pytest.mark.parametrize("number", symptoms())
def test_the_message_of_an_entry_finds_it_first(page, number):
    for message in messages(symptoms()[number]):
        found = first_results(page, message)
        alike = [
            other for other, symptom in symptoms().items() if message in symptom
        ]  # a message may have several causes
        assert found[:1] and found[0] in [f"LEARNING.html#{other}" for other in alike], f"{message}: {found[:3]}"


def test_a_whole_traceback_with_other_numbers_finds_the_entry(page):
    assert first_results(page, TRACEBACK)[0] == "LEARNING.html#m06"


def test_a_word_that_is_no_message_is_left_to_the_theme(page):
    found = first_results(page, "blur")
    assert found and not re.search(r"#m\d\d$", found[0])


def test_the_browser_has_nothing_to_complain_of(page):
    first_results(page, "CUDA out of memory")
    assert [line for line in page.said if line.startswith(("error", "warning"))] == []
