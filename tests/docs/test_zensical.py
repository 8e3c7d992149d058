"""The same mkdocs.yml built by Zensical, which comes after Material: every page, every link, and the search for error messages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from site_browser import chromium, opened, served
from test_search import TRACEBACK, messages, symptoms
from test_site import navigation, problems


@pytest.fixture(scope="module")
def zensical_site(tree: Path, tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("zensical") / "source"
    shutil.copytree(tree, source)
    for one in (
        [sys.executable, "-m", "zensical", "build", "--strict"],
        [sys.executable, "theme/after_build.py", "site"],
    ):
        done = subprocess.run(one, cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return source / "site"


@pytest.fixture(scope="module")
def page(zensical_site: Path) -> Iterator[Page]:
    with served(zensical_site) as address, chromium() as browser:
        page = opened(browser, address)
        page.wait_for_load_state("networkidle")
        page.keyboard.press("/")
        yield page


def first_result(page: Page, query: str) -> str:
    """The address of the first result, without the host. The results of the query before are cleared away first."""
    box, results = page.get_by_role("combobox"), page.get_by_role("option")
    box.fill("")
    expect(results).to_have_count(0)
    box.fill(query)
    expect(results).not_to_have_count(0)
    return re.sub(r"^https?://[^/]*/|\?[^#]*", "", results.first.get_attribute("href"))


def test_every_page_is_built_and_nothing_leads_nowhere(zensical_site):
    absent = [page for page in navigation() if not (zensical_site / page).is_file()]
    assert absent == []
    assert problems(zensical_site) == []


def test_the_message_of_every_entry_finds_it_first(page):
    wrong = []
    for number, symptom in symptoms().items():
        for message in messages(symptom):
            alike = [f"LEARNING.html#{other}" for other, text in symptoms().items() if message in text]
            if (found := first_result(page, message)) not in alike:
                wrong.append(f"{number}: {message}: {found}")
    assert wrong == []


def test_a_whole_traceback_finds_its_entry(page):
    assert first_result(page, TRACEBACK) == "LEARNING.html#m06"
    assert [line for line in page.said if line.startswith(("error", "warning"))] == []
