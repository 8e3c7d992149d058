"""One self-contained HTML file from a page of a report: pictures embedded, no script, nothing from elsewhere.

Text of a paper, a spec or a record may hold anything. So raw HTML is shown as text, a link may only lead to a web page or within the
page, a picture only comes from the report's folder, and the page itself forbids its reader's browser to run or load anything.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repro.errors import BadInput
from repro_tools.report.judge import VERDICTS

PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
PLAIN_TAGS = ("sup", "sub", "br")
"""Tags without attributes that Markdown has no signs for; all others are shown as text."""
_NUMBERS = re.compile(r"[-+]?[\d.,e+-]+(?:%|( ± | to )-?[\d.,e+-]+)?")
WIDE = 6
"""A table of at least so many columns is shown row by row on a narrow screen."""


def html_page(page: str, folder: Path, pages: Mapping[str, str]) -> str:
    """The HTML of a Markdown `page` whose pictures lie in `folder`; `pages` names the HTML file of each page beside it.

    Raises BadInput when Python-Markdown is not installed.
    """
    converter = _converter(folder, pages)
    body = converter.convert(re.sub(r"^<!-- .*? -->\n?", "", page, flags=re.MULTILINE))
    body = re.sub(rf"&lt;(/?(?:{'|'.join(PLAIN_TAGS)}))&gt;", r"<\1>", body)
    contents = f"<details class='contents'><summary>Contents</summary>\n{converter.toc}</details>\n"
    title = re.search(r"^# +(.+)$", page, re.MULTILINE)
    return _FRAME.format(
        title=html.escape(html.unescape(title[1]) if title else "Report"),
        style=_STYLE,
        contents=contents if len(converter.toc_tokens) and converter.toc.count("<li>") > 3 else "",
        body=body,
    )


def require_converter() -> None:
    """Raises BadInput when Python-Markdown is not installed; to be asked before anything is written."""
    try:
        import markdown  # noqa: F401
    except ImportError:
        raise BadInput("--html: found no package 'markdown', expected Python-Markdown: pip install markdown") from None


def _converter(folder: Path, pages: Mapping[str, str]) -> Any:
    require_converter()
    from markdown import Markdown
    from markdown.treeprocessors import Treeprocessor

    class Finish(Treeprocessor):  # type: ignore[misc]  # Markdown has no stubs
        def run(self, root):
            for element in list(root.iter()):  # a list: tables are wrapped on the way
                if element.tag == "a":
                    _finish_link(element, pages)
                elif element.tag == "img":
                    _finish_picture(element, folder)
                elif element.tag == "table":
                    _finish_table(element)
                for place, child in enumerate(list(element)):
                    if child.tag == "table":
                        _wrap(element, place, child)

    converter = Markdown(
        extensions=["tables", "admonition", "fenced_code", "sane_lists", "toc"],
        extension_configs={"toc": {"toc_depth": "2-3"}},
        output_format="html",
    )
    # Without these two, tags in the text stay text.
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    converter.treeprocessors.register(Finish(converter), "finish", 4)  # after the inline patterns have made the links
    return converter


def _finish_link(element: Any, pages: Mapping[str, str]) -> None:
    target = element.get("href", "").strip()
    if re.match(r"(https?://|mailto:|#)", target):
        return
    path, hash_sign, anchor = target.partition("#")
    if path in pages:
        element.set("href", f"{pages[path]}{hash_sign}{anchor}")
    else:  # another scheme, or a file that does not travel with the page
        element.tag, _ = "span", element.attrib.clear()


def _finish_picture(element: Any, folder: Path) -> None:
    source, alt = element.get("src", ""), element.get("alt", "")
    path = (folder / source).resolve()
    kind = PICTURES.get(path.suffix.lower())
    if kind and path.is_relative_to(folder.resolve()) and path.is_file():
        element.set("src", f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")
    else:
        element.tag, element.text = "em", f"Picture that is not here: {alt or source}"
        element.attrib.clear()


def _finish_table(table: Any) -> None:
    """Each cell gets the name of its column, for narrow screens, and each verdict its colour."""
    labels = ["".join(cell.itertext()) for cell in table.iter("th")]
    if len(labels) >= WIDE:
        table.set("class", "wide")
    for row in table.iter("tr"):
        for label, cell in zip(labels, row.findall("td"), strict=False):
            content = "".join(cell.itertext())
            cell.set("data-label", label)
            if not content.strip():
                cell.set("class", "empty")
            elif (verdict := content.removesuffix(", open")) in VERDICTS:
                cell.set("class", f"verdict {verdict.replace(' ', '-')}")
            elif _NUMBERS.fullmatch(content):
                cell.set("class", "number")


def _wrap(parent: Any, place: int, table: Any) -> None:
    """Puts a table into a frame that scrolls by itself."""
    frame = parent.makeelement("div", {"class": "table", "tabindex": "0"})
    frame.tail, table.tail = table.tail, None
    parent.remove(table)
    frame.append(table)
    parent.insert(place, frame)


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{contents}{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --ink: #1d2129; --soft: #59616e; --paper: #ffffff; --line: #d9dde3; --head: #f4f5f7; --link: #2456a6;
  --good: #1a6e3c; --near: #7a5a00; --bad: #a32222; --open: #4b5563;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7eb; --soft: #a3abb8; --paper: #15181d; --line: #363c46; --head: #1f242b; --link: #8ab4f8;
    --good: #6fd08c; --near: #e5c05b; --bad: #ff8f87; --open: #aab2bf;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 88rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; }
main > p, main > ul, main > ol, main > details { max-width: 50rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 1rem; text-wrap: balance; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
a { color: var(--link); }
code { font: .9em/1.4 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: .4rem; }
li { margin: .35rem 0; }
.contents { color: var(--soft); }
.contents li { margin: .1rem 0; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--head); font-weight: 600; white-space: nowrap; }
td code { overflow-wrap: break-word; }
@media screen and (min-width: 48.01rem) { table.wide td:first-child:not(.number) { min-width: 14rem; } }
td.number { white-space: nowrap; }
td.verdict { font-weight: 600; white-space: nowrap; }
.reproduced { color: var(--good); } .close { color: var(--near); } .not-reproduced { color: var(--bad); }
.inconclusive, .could-not-run { color: var(--open); }
.admonition { border-left: .3rem solid var(--near); background: var(--head); padding: .5rem 1rem; margin: 1rem 0; max-width: 50rem; }
.admonition-title { font-weight: 600; margin: 0; }
@media screen and (max-width: 48rem) {
  table.wide, table.wide tbody, table.wide tr, table.wide td { display: block; width: 100%; }
  table.wide thead { display: none; }
  table.wide tr { padding: .6rem 0; border-bottom: 2px solid var(--line); }
  table.wide td { border: 0; padding: .1rem 0 .1rem 8.5rem; position: relative; min-height: 1.5rem; white-space: normal; overflow-wrap: anywhere; }
  table.wide td::before { content: attr(data-label); position: absolute; left: 0; width: 8rem; color: var(--soft); font-weight: 400; }
  table.wide td:first-child { padding-left: 0; margin-bottom: .3rem; }
  table.wide td:first-child::before { content: none; }
  table.wide td.empty { display: none; }
}
@media print {
  @page { size: A4; margin: 18mm; }
  :root { --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --head: #eee; --link: #000; }
  body { font-size: 10pt; line-height: 1.4; } main { padding: 0; max-width: none; }
  main > p, main > ul, main > ol { max-width: none; }
  h1 { font-size: 16pt; } h2 { font-size: 12pt; margin: 12pt 0 4pt; padding-top: 4pt; } h3 { font-size: 10.5pt; margin: 8pt 0 3pt; }
  p, ul, .table { margin: 4pt 0; } li { margin: 1pt 0; } table { font-size: 8pt; } th, td { padding: 1.5pt 4pt; white-space: normal; }
  td.verdict { white-space: normal; } code { font-size: .95em; } .contents { display: none; } img { max-height: 75mm; padding: 0; border: 0; }
  h2, h3 { break-after: avoid; } tr, img { break-inside: avoid; }
}
"""
