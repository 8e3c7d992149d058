"""What the site holds beside its pages, written after they are built, whatever built them.

    python theme/after_build.py [SITE]        (make site)

- the Markdown source of every page of the navigation, beside the page and byte for byte, so that its relative links hold, and a link to it;
- llms.txt, the list of these sources with a line about each, in the format of https://llmstxt.org;
- llms-full.txt, all sources in the order of the navigation, each after a line that names it;
- code/, a page for every file of the repository that a page names in code font, and on that page a link to it;
- below each section of the rules, the lessons behind it with their tests and code, so that all of these are near a rule;
- search/search_index.js, empty: the theme asks for it on a page that was opened from disk, where no browser lets it search.
"""

from __future__ import annotations

import ast
import html
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from xml.sax.saxutils import quoteattr

import yaml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parents[1]
CODE_SUFFIXES = {".py", ".yaml", ".yml", ".toml", ".jinja"}
BASES = ("", "templates/reproduction/", "reference_impl/", "templates/reproduction/repro/", "repro_tools/")
"""Where a file that a page names may lie: the pages write `repro/phases.py` and `nsgf/flow.py`, as one imports them, and `report/judge.py`."""

PASSED_OVER = r"<pre\b.*?</pre>|<a\b.*?</a>|<script\b.*?</script>|<title>.*?</title>"
NAMED = re.compile(rf"{PASSED_OVER}|<code>(?P<name>[^<\s]+)</code>", re.DOTALL)
LESSON = re.compile(r'<h3 id="(?P<number>m\d\d)">(?P<body>.*?)(?=<h[23] id=|</article>)', re.DOTALL)
RULES = re.compile(r'<h2 id="[^"]+">.*?(?=<h2 id=|<p class="page-source">|</article>)', re.DOTALL)
SEPARATOR = "<!-- page: {} -->"
NOTHING_TO_SEARCH = 'var __index = {"config": {"lang": ["en"], "separator": " ", "pipeline": []}, "docs": []}\n'

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{path} - {title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{style}">
</head>
<body>
<p><a href="{home}">{title}</a></p>
<h1>{path}</h1>
{links}
<main>
{code}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Page:
    """path: of the source, in the repository. title: in the navigation, empty where that gives none. group: its part of the navigation."""

    path: str
    title: str
    group: str

    @property
    def built(self) -> str:
        """Path of the page in the site."""
        folder, _, name = self.path.rpartition("/")
        name = "index.html" if name in ("README.md", "index.md") else f"{name.removesuffix('.md')}.html"
        return f"{folder}/{name}".lstrip("/")


def main(arguments: list[str]) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    site = Path(arguments[0]) if arguments else ROOT / settings["site_dir"]
    pages = [page for page in pages_of(settings["nav"]) if (ROOT / page.path).is_file()]
    absent = [page.built for page in pages if not (site / page.built).is_file()]
    if absent:
        raise SystemExit(f"after_build: {site}: found no {', '.join(absent)}, expected the built site; run make site")
    sources = {page.path: (ROOT / page.path).read_bytes() for page in pages}
    for page in pages:
        (site / page.path).write_bytes(sources[page.path])
        link_source(site / page.built, page.path.rpartition("/")[2])
    title, about = settings["site_name"], settings["site_description"]
    (site / "llms.txt").write_text(llms(title, about, pages, sources), encoding="utf-8")
    (site / "llms-full.txt").write_bytes(llms_full(title, sources))
    write_code(site, pages, title)
    add_lessons(site / "SKILL.html", (site / "LEARNING.html").read_text(encoding="utf-8"))
    if (site / "search").is_dir():  # MkDocs puts its index there, Zensical does not
        (site / "search" / "search_index.js").write_text(NOTHING_TO_SEARCH, encoding="utf-8")


def link_source(built: Path, name: str) -> None:
    """Adds to a built page the link to its source. Raises SystemExit where the builder left no article to end."""
    before, end, after = built.read_text(encoding="utf-8").rpartition("</article>")
    if not end:
        raise SystemExit(f"after_build: {built}: found no </article>, expected one to end with the link to {name}")
    link = f'<p class="page-source"><a href="{name}">Markdown source</a></p>\n'
    built.write_text(f"{before}{link}{end}{after}", encoding="utf-8")


def pages_of(node: object, title: str = "", groups: tuple[str, ...] = ()) -> Iterator[Page]:
    """The pages below a node of the navigation, in its order."""
    if isinstance(node, str):
        yield Page(node, title, ": ".join(groups))
    elif isinstance(node, Mapping):
        for name, child in node.items():
            yield from pages_of(child, name, groups if isinstance(child, str) else (*groups, name))
    elif isinstance(node, list):
        for child in node:
            yield from pages_of(child, "", groups)


def llms(title: str, about: str, pages: Iterable[Page], sources: Mapping[str, bytes]) -> str:
    lines = [f"# {title}", "", f"> {about}.", "", "Every page is Markdown. llms-full.txt has all of them in one file."]
    group = None
    for page in pages:
        text = sources[page.path].decode()
        if page.group != group:
            group = page.group
            lines += ["", f"## {group or 'Start'}", ""]
        lines.append(f"- [{page.title or heading(text)}]({page.path}): {first_sentence(text)}")
    return "\n".join(lines) + "\n"


def llms_full(title: str, sources: Mapping[str, bytes]) -> bytes:
    said = f"# {title}: every page\n\nA page begins below the line that names it, and its relative links start from there.\n"
    parts = [f"\n{SEPARATOR.format(path)}\n".encode() + source for path, source in sources.items()]
    return b"".join([said.encode(), *parts])


def heading(text: str) -> str:
    return plain(re.search(r"^# (.+)$", text, re.MULTILINE)[1])


def first_sentence(text: str) -> str:
    """When to read a page: of the description in its front matter, its "Read this when", or else its first sentence."""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if front:
        paragraph = yaml.safe_load(front[1])["description"]
    else:
        paragraphs = [" ".join(one.split()) for one in re.split(r"\n\s*\n", text)]
        prose = [one for one in paragraphs if re.match(r"[\w`\[*]", one)]
        paragraph = next((one for one in prose if one.startswith("Read this when")), prose[0])
    return plain(re.match(r".*?\.(?=\s|$)|.*", paragraph)[0])


def plain(text: str) -> str:
    """Without links and without the ids of headings."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"\s*\{#.*?\}", "", text)).strip()


def add_lessons(skill: Path, learning: str) -> None:
    """Adds to each section of the built rules the entries of the built catalogue whose rule it is."""
    lessons = [(match["number"], match["body"]) for match in LESSON.finditer(learning)]

    def with_lessons(match: re.Match) -> str:
        names = set(re.findall(r'\bid="([^"]+)"', match[0]))
        own = [one for one in lessons if names & set(re.findall(r'href="SKILL\.html#([^"]+)"', one[1]))]
        return match[0] + (_trail(own) if own else "")

    skill.write_text(RULES.sub(with_lessons, skill.read_text(encoding="utf-8")), encoding="utf-8")


def _trail(lessons: Iterable[tuple[str, str]]) -> str:
    """Links to the entries, to the test of each, and to the code that they name."""
    entries, code = [], {}
    for number, body in lessons:
        links = dict(re.findall(r'<a href="(code/[^"]+)"><code>([^<]+)</code></a>', body))
        tests = [link for link in links if link.startswith("code/tests/")]
        code |= {link: name for link, name in links.items() if link not in tests}
        shown = ", ".join(f'<a href="{link}">test</a>' for link in tests)
        entries.append(f'<a href="LEARNING.html#{number}">{number}</a>' + (f" ({shown})" if shown else ""))
    files = ", ".join(f'<a href="{link}"><code>{name}</code></a>' for link, name in code.items())
    said = f"Lessons behind this section: {', '.join(entries)}." + (f" Code: {files}." if files else "")
    return f'<p class="lessons">{said}</p>\n'


def write_code(site: Path, pages: Iterable[Page], title: str) -> None:
    """Links what the built pages name in code font, and writes the pages that these links lead to."""
    named_on: dict[str, list[Page]] = {}
    for page in pages:
        built, found = site / page.built, set()
        text = built.read_text(encoding="utf-8")
        built.write_text(NAMED.sub(partial(_linked, page=page, found=found), text), encoding="utf-8")
        for path in found:
            named_on.setdefault(path, []).append(page)
    tested_by = {path: tests_of(path) for path in named_on}
    for test in sorted({test for tests in tested_by.values() for test in tests}):
        named_on.setdefault(test, [])
    for path, own in named_on.items():
        target = site / code_page(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_as_page(path, own, tested_by.get(path, []), title), encoding="utf-8")
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    style = (ROOT / "theme" / "code.css").read_text(encoding="utf-8")
    (site / "code" / "code.css").write_text(
        f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{style}", encoding="utf-8"
    )


def repository_path(name: str) -> str | None:
    """The file of the repository that a page means by `name`; None when it means none."""
    if "/" not in name or Path(name).suffix not in CODE_SUFFIXES:
        return None
    for base in BASES:
        path = os.path.normpath(base + name)
        if not path.startswith("..") and (ROOT / path).is_file():
            return path
    return None


def code_page(path: str) -> str:
    """Path in the site of the page that shows a file of the repository."""
    return f"code/{path}.html"


def tests_of(path: str) -> list[str]:
    """The test files that import a module of the engine, of the tools or of the reference implementation."""
    tops = {"templates/reproduction/repro/": BASES[1], "reference_impl/": BASES[2], "repro_tools/": ""}
    top = next((top for top in tops if path.startswith(top)), None)
    if top is None or not path.endswith(".py"):
        return []
    module = path.removeprefix(tops[top]).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return [test for test, imported in _imports().items() if module in imported]


@cache
def _imports() -> dict[str, set[str]]:
    """What every test file imports, modules and their names alike, by its path."""
    found = {}
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        names = set()
        for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
        found[test.relative_to(ROOT).as_posix()] = names
    return found


def _linked(match: re.Match, page: Page, found: set[str]) -> str:
    path = repository_path(html.unescape(match["name"])) if match["name"] else None
    if path is None:
        return match[0]
    found.add(path)
    return f'<a href="{_from(page.built, code_page(path))}">{match[0]}</a>'


def _from(page: str, target: str) -> str:
    """Relative link from one page of the site to another."""
    return os.path.relpath(target, os.path.dirname(page) or ".")


def _link(page: str, target: str, label: str) -> str:
    return f"<a href={quoteattr(_from(page, target))}>{html.escape(label)}</a>"


def _as_page(path: str, named_on: Iterable[Page], tests: Iterable[str], title: str) -> str:
    page = code_page(path)
    code = (ROOT / path).read_text(encoding="utf-8")
    try:
        lexer = get_lexer_for_filename(path.removesuffix(".jinja"))
    except ClassNotFound:
        lexer = TextLexer()
    shown = highlight(code, lexer, HtmlFormatter(linenos="inline"))
    named = ", ".join(_link(page, one.built, one.path) for one in named_on)
    tested = ", ".join(_link(page, code_page(test), test) for test in tests)
    links = f"<p>Named on: {named}</p>\n" if named else ""
    links += f"<details><summary>Tests that import it</summary>\n<p>{tested}</p></details>\n" if tested else ""
    return PAGE.format(
        path=html.escape(path),
        title=html.escape(title),
        home=_from(page, "index.html"),
        style=_from(page, "code/code.css"),
        links=links,
        code=shown,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
