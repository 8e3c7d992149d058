"""What the tests of the documents share: the built site, and a browser that looks at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page
from site_browser import chromium, opened, served

ROOT = Path(__file__).parents[2]
DEMO_PAGE = "reference_impl/reports/demo/README.md"
TAKE_MINUTES = {"site", "zensical_site", "browser"}
"""Fixtures: to build the site, and to look at it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TAKE_MINUTES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy of what git tracks, from which the site is built, with the demo's page as `make site` leaves it."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    (source / DEMO_PAGE).parent.mkdir(parents=True, exist_ok=True)
    (source / DEMO_PAGE).write_text("# Your demo run\n\nNone yet.\n")
    return source


@pytest.fixture(scope="session")
def site(tree: Path, tmp_path_factory) -> Path:
    """The site, built strictly, with what `make site` writes into it afterwards."""
    out = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    after = [sys.executable, "theme/after_build.py", str(out)]
    for one in (command, after):
        subprocess.run(one, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the built site is served."""
    with served(site) as address:
        yield address


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    """A page of the browser, at the site's home."""
    with chromium() as browser:
        yield opened(browser, address)
