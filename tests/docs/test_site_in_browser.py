"""The built site in a browser, opened from disk: nothing to complain of, no other host, nothing wider than a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from site_browser import chromium

PHONE = {"width": 390, "height": 844}
OVERFLOW = """() => {
  const room = document.documentElement.clientWidth
  if (document.documentElement.scrollWidth <= room) return []
  const wide = [...document.body.querySelectorAll("*")].filter(one => one.getBoundingClientRect().right > room + 1)
  return wide.slice(0, 1).map(one => `<${one.tagName.toLowerCase()}> is wider than ${room} px`)
    .concat(wide.length ? [] : [`the page is wider than ${room} px`])
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def problems(browser: Browser, site: Path, names: list[str], scheme: str = "light") -> list[str]:
    """What a phone has to complain of on these pages of the site, a line each."""
    found, at = [], ""
    page = browser.new_page(viewport=PHONE, color_scheme=scheme)
    page.on(
        "console",
        lambda said: found.append(f"{at}: {said.type}: {said.text}") if said.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: found.append(f"{at}: error: {error}"))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith(("file:", "data:", "blob:")) else found.append(f"{at}: asks {asked.url}")
        ),
    )
    for at in names:
        page.goto((site / at).as_uri(), wait_until="load")
        found += [f"{at}: {line}" for line in page.evaluate(OVERFLOW)]
    page.close()
    return found


def pages(site: Path) -> list[str]:
    """Every page, and of those that show code the first and the longest."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    code = [name for name in found if name.startswith("code/")]
    longest = max(code, key=lambda name: (site / name).stat().st_size)
    return [name for name in found if not name.startswith("code/")] + [code[0], longest]


def test_a_phone_without_a_network_has_nothing_to_complain_of(browser, site):
    assert problems(browser, site, pages(site)) == []


def test_nor_has_one_in_the_dark(browser, site):
    assert problems(browser, site, ["index.html", "LEARNING.html", "refs/calculator.html"], "dark") == []


def test_wide_tables_scroll_inside_themselves(browser, site):
    page = browser.new_page(viewport=PHONE)
    page.goto((site / "refs/memory.html").as_uri())
    widths = page.locator(".md-typeset__scrollwrap").evaluate_all(
        "all => all.map(one => [one.clientWidth, one.scrollWidth])"
    )
    page.close()
    assert any(inner > own for own, inner in widths)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "name", ["refs/calculator.html", "SKILL.html", "code/templates/reproduction/repro/phases.py.html"]
)
def test_text_stands_out_from_what_is_behind_it(browser, site, name, scheme):
    """At least 4.5 to 1, the ratio of WCAG 2 for text (AA)."""
    page = browser.new_page(viewport=PHONE, color_scheme=scheme)
    page.goto((site / name).as_uri())
    weak = page.evaluate(CONTRAST)
    page.close()
    assert weak == []


CONTRAST = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const over = (top, below) => { const a = top[3] ?? 1; return top.slice(0, 3).map((c, i) => a * c + (1 - a) * below[i]) }
  const behind = one => {
    const layers = []
    for (let at = one; at; at = at.parentElement) layers.unshift(parts(getComputedStyle(at).backgroundColor))
    return layers.reduce((below, layer) => over(layer, below), matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255])
  }
  const selectors = ".calculator label, .calculator select, #calculator-answer td, #calculator-answer strong, .lessons, .lessons a, .page-source a, h1, p a, .linenos"
  return [...document.querySelectorAll(selectors)].filter(one => one.getClientRects().length).flatMap(one => {
    const back = behind(one), front = over(parts(getComputedStyle(one).color), back)
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x)
    const ratio = (a + 0.05) / (b + 0.05)
    return ratio < 4.5 ? [`${one.tagName} ${one.className} ${one.textContent.trim().slice(0, 20)}: ${ratio.toFixed(1)}`] : []
  }).slice(0, 5)
}"""

BROKEN = {
    "an error on the console": ("<script>console.error('planted')</script>", "error: planted"),
    "a script that throws": ("<script>throw new Error('planted')</script>", "error: planted"),
    "a script that is not there": ('<script src="absent.js"></script>', "ERR_FILE_NOT_FOUND"),
    "a wide element": ('<div style="width: 900px">x</div>', "<div> is wider than 390 px"),
    "a word that does not break": (f"<p>{'x' * 400}</p>", "wider than 390 px"),
    "a picture of another host": ('<img src="http://127.0.0.1:9/x.png" alt="">', "asks http://127.0.0.1:9/x.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_finds(browser, tmp_path, name):
    html, expected = BROKEN[name]
    head = '<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    (tmp_path / "a.html").write_text(f"{head}<p>fine</p>{html}")
    found = problems(browser, tmp_path, ["a.html"])
    assert any(expected in line for line in found), found


def test_the_check_is_silent_on_a_sound_page(browser, tmp_path):
    wide = '<div style="overflow-x: auto"><div style="width: 900px">x</div></div>'
    (tmp_path / "a.html").write_text(
        f'<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><p>fine</p>{wide}'
    )
    assert problems(browser, tmp_path, ["a.html"]) == []
