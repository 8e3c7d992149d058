"""The built site: everything that a page asks for is there, and it asks no other host."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """What a page refers to, by kind: resources it loads, links it offers, anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.resources, self.links, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in ("script", "img") and values.get("src"):
            self.resources.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon") and values.get("href"):
            self.resources.append(values["href"])


def problems(site: Path) -> list[str]:
    """Resources of another host, and resources, links or anchors that lead nowhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for reference in page.resources + page.links:
            address = urlsplit(reference)
            if address.scheme or address.netloc:
                if reference in page.resources and address.scheme != "data":
                    found.append(f"{name}: loads {reference} from another host")
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{name}: {reference} leads nowhere")
            elif address.fragment and target in pages and unquote(address.fragment) not in pages[target].anchors:
                found.append(f"{name}: {reference} has no such anchor")
    return found


def test_nothing_on_the_site_leads_nowhere(site):
    assert problems(site) == []


def test_the_site_has_its_style_and_its_search(site):
    assert list((site / "assets" / "stylesheets").glob("main.*.css"))
    assert (site / "search" / "search_index.json").stat().st_size > 10_000


def navigation() -> list[str]:
    """The sources of all pages, in the order of the navigation."""

    def pages(node):
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from pages(child)

    return list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def test_only_documents_are_published(site):
    published = {path.suffix for path in site.rglob("*") if path.is_file()}
    assert not published & {".py", ".yaml", ".toml"}


def test_the_source_of_every_page_lies_beside_it(site, tree):
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.md")} == set(navigation())
    assert [page for page in navigation() if (site / page).read_bytes() != (tree / page).read_bytes()] == []


def test_every_page_links_to_its_source(site):
    for page in navigation():
        name = page.rpartition("/")[2]
        built = page[: -len(name)] + ("index.html" if name in ("README.md", "index.md") else f"{name[:-3]}.html")
        assert f'href="{name}">Markdown source</a>' in (site / built).read_text(encoding="utf-8"), built


def test_the_list_for_language_models_names_each_page_once(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    head, *groups = text.split("\n## ")
    assert re.match(r"# [^\n]+\n\n> [^\n]+\n", head)
    entries = [line for group in groups for line in group.splitlines()[1:] if line]
    found = [re.fullmatch(r"- \[([^]]+)\]\(([^)]+)\): (\S.+)", line) for line in entries]
    assert None not in found, entries[found.index(None)]
    assert [match[2] for match in found] == navigation()
    assert all((site / match[2]).is_file() for match in found)


def test_the_list_says_when_to_read_a_page(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    assert "](refs/memory.md): Read this when you need to know whether a run fits on a device" in text
    assert "](SKILL.md): Reproduce or implement a machine-learning paper" in text


def test_the_whole_text_is_every_page_byte_for_byte(site, tree):
    whole = (site / "llms-full.txt").read_bytes()
    head, *parts = re.split(rb"\n<!-- page: (\S+) -->\n", whole)
    assert [path.decode() for path in parts[::2]] == navigation()
    texts = zip(parts[::2], parts[1::2], strict=True)
    assert [path for path, text in texts if text != (tree / path.decode()).read_bytes()] == []


def test_code_that_a_page_names_is_shown_and_linked(site):
    page = (site / "refs/phases.html").read_text(encoding="utf-8")
    assert '<a href="../code/templates/reproduction/repro/phases.py.html"><code>repro/phases.py</code></a>' in page
    shown = (site / "code/templates/reproduction/repro/phases.py.html").read_text(encoding="utf-8")
    code = html.unescape(re.sub(r"<[^>]+>", "", re.search(r"<pre>(.*)</pre>", shown, re.DOTALL)[1]))
    lines = [re.sub(r"^ *\d+", "", line) for line in code.splitlines()]
    assert lines == (ROOT / "templates/reproduction/repro/phases.py").read_text(encoding="utf-8").splitlines()
    assert "../refs/phases.html" in shown and "tests/engine/test_phases.py.html" in shown


def test_every_page_of_the_navigation_is_built(site):
    home = {"README.md": "index.html", "refs/index.md": "refs/index.html"}
    for page in navigation():
        built = home.get(page) or (
            page[: -len("README.md")] + "index.html" if page.endswith("README.md") else page[:-3] + ".html"
        )
        assert (site / built).is_file(), page


BROKEN = {
    "a dead link": ('<a href="absent.html">x</a>', "absent.html leads nowhere"),
    "a dead anchor": ('<a href="other.html#absent">x</a>', "other.html#absent has no such anchor"),
    "a missing style sheet": ('<link rel="stylesheet" href="assets/main.css">', "assets/main.css leads nowhere"),
    "a missing picture": ('<img src="figures/a.png">', "figures/a.png leads nowhere"),
    "a script of another host": ('<script src="https://cdn.example/x.js"></script>', "from another host"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_finds(tmp_path, name):
    html, expected = BROKEN[name]
    (tmp_path / "other.html").write_text('<h1 id="here">x</h1>')
    (tmp_path / "index.html").write_text(
        f'<a href="other.html#here">fine</a><a href="https://arxiv.org">fine</a>{html}'
    )
    (found,) = problems(tmp_path)
    assert expected in found


def test_the_check_is_silent_on_a_sound_page(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="a">x</h1><a href="#a">x</a><a href="./">x</a><img src="data:image/png;base64,AA">'
    )
    assert problems(tmp_path) == []
