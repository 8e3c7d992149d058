"""The self-contained page: nothing of a paper's or a spec's text becomes a tag, a script or a request."""

import base64
import re
import sys
from html.parser import HTMLParser

import pytest
from toy_project import SPEC, write_yaml

from repro_tools.cli import main
from repro_tools.report.html_page import html_page

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def body(markdown, folder, pages=None):
    return html_page(markdown, folder, pages or {}).split("<main>")[1]


def dangerous(page):
    """Tags that run or load something, attributes that run something, and addresses that do either."""
    found = []
    for tag, attributes in Tags(page).found:
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "svg", "b", "div") and attributes.get(
            "class"
        ) not in ("table", "toc"):
            found.append(tag)
        for name, value in attributes.items():
            if name.startswith("on") or name == "style":
                found.append(name)
            if name in ("href", "src") and not re.match(r"(https?://|mailto:|#|data:image/|results.html)", value or ""):
                found.append(value)
            if name == "src" and not (value or "").startswith("data:"):
                found.append(value)
    return found


HOSTILE = {
    "a script": "Text <script>alert(1)</script>",
    "a block": "<div onclick=alert(1)>\n<script>alert(1)</script>\n</div>",
    "a script in a table": "| a | b |\n|---|---|\n| <script>alert(1)</script> | 2 |",
    "a script in a heading": "## <script>alert(1)</script>",
    "scripts in the contents": 5 * "## `<script>` <script>alert(1)</script> [x](javascript:alert(1))\n\n",
    "an attribute": "<b onmouseover=alert(1)>bold</b>",
    "a script as an address": "[link](javascript:alert(1))",
    "one in disguise": "[link](JaVaScRiPt&#58;alert(1)) [link](<java\nscript:alert(1)>)",
    "data as an address": "[link](data:text/html;base64,PHNjcmlwdD4=)",
    "a reference": "[link][1]\n\n[1]: javascript:alert(1)",
    "a picture from elsewhere": "![alt](https://example.org/x.png)",
    "a picture from outside of the folder": "![alt](../secret.png)",
    "a quote in a picture": '![a" onerror="alert(1)](x.png)',
    "a plain tag with an attribute": "x<sup onclick=alert(1)>2</sup>",
    "an automatic link": "<javascript:alert(1)>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_stays_text(tmp_path, name):
    folder = tmp_path / "reports"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PIXEL)
    assert dangerous(body(HOSTILE[name], folder)) == []


def test_the_check_finds_what_it_looks_for():
    for page in (
        "<script>",
        "<a href='javascript:x'>",
        "<p onclick='x'>",
        "<img src='x.png'>",
        "<img src='https://e.org/x'>",
    ):
        assert dangerous(page), page
    assert dangerous("<div class='table'><a href='#x'><img src='data:image/png;base64,AA'></a></div>") == []


def test_text_keeps_what_looks_like_a_tag(tmp_path):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body("<script>alert(1)</script>", tmp_path)


def test_a_script_in_a_claim_reaches_no_page(project):
    claim = SPEC["claims"][0] | {"statement": "<script>alert(1)</script> [x](javascript:alert(1))"}
    write_yaml(project / "spec.yaml", SPEC | {"claims": [claim]})
    assert main(["report", "--html", "--note", "--checklist"]) == 0
    for name in ("results.html", "note.html", "checklist.html"):
        assert dangerous((project / "reports" / name).read_text().split("<main>")[1]) == []
    for name in ("README.md", "note.md"):
        assert "<script" not in (project / "reports" / name).read_text()


def test_the_browser_is_told_to_run_and_load_nothing(tmp_path):
    page = html_page("# Title", tmp_path, {})
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page and "<title>Title</title>" in page


def test_pictures_are_embedded(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(PIXEL)
    page = body("![A figure](figures/a.png)", tmp_path)
    (source,) = [attributes["src"] for tag, attributes in Tags(page).found if tag == "img"]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PIXEL


def test_a_picture_that_is_missing_is_said(tmp_path):
    assert "Picture that is not here: A figure" in body("![A figure](figures/a.png)", tmp_path)


def test_links_lead_to_the_pages_that_were_written_with_it(tmp_path):
    page = body(
        "[a](README.md#runs) [b](other.md) [c](#x) [d](https://arxiv.org)", tmp_path, {"README.md": "results.html"}
    )
    assert [attributes["href"] for tag, attributes in Tags(page).found if tag == "a"] == [
        "results.html#runs",
        "#x",
        "https://arxiv.org",
    ]
    assert "<span>b</span>" in page


def test_signs_without_attributes_pass(tmp_path):
    assert "x<sup>2</sup>" in body("x<sup>2</sup>", tmp_path)


def test_marks_of_parts_written_by_hand_are_not_shown(tmp_path):
    assert "yours" not in body("<!-- yours: x -->\nMine.\n<!-- /yours: x -->\n", tmp_path)


def test_cells_know_their_column_and_verdicts_their_colour(tmp_path):
    header = "| claim | a | b | c | ours | verdict |\n|---|---|---|---|---|---|\n"
    page = body(header + "| x |  | 1 | 2 | 0.5 ± 0.1 | not reproduced |", tmp_path)
    cells = [attributes for tag, attributes in Tags(page).found if tag == "td"]
    assert cells[5] == {"data-label": "verdict", "class": "verdict not-reproduced"}
    assert cells[1]["class"] == "empty" and cells[4] == {"data-label": "ours", "class": "number"}
    assert '<table class="wide">' in page and '<div class="table" tabindex="0"><table' in page
    assert 'class="wide"' not in body("| a | b |\n|---|---|\n| 1 | 2 |", tmp_path)


def test_every_link_within_a_report_leads_somewhere(project):
    assert main(["report", "--html"]) == 0
    page = (project / "reports" / "results.html").read_text()
    tags = Tags(page).found
    anchors = {attributes["id"] for _, attributes in tags if "id" in attributes}
    links = {attributes["href"][1:] for _, attributes in tags if attributes.get("href", "").startswith("#")}
    assert links and links <= anchors


def test_without_the_converter_nothing_is_written(project, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "markdown", None)
    assert main(["report", "--html"]) == 2
    assert "found no package 'markdown', expected Python-Markdown: pip install markdown" in capsys.readouterr().err
    assert not (project / "reports").exists()
    assert main(["report"]) == 0
