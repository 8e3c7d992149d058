"""What follows from the entries of LEARNING.md and is written down elsewhere: the index, the mistakes of each principle, the links of each page.

    python tests/docs/catalogue.py        (make catalogue)

writes all of it anew, between marks. A test asks that nothing would change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEARNING = "LEARNING.md"
INDEX = ("<!-- index -->", "<!-- /index -->")
BEHIND = ("<!-- mistakes -->", "<!-- /mistakes -->")


@dataclass(frozen=True)
class Entry:
    """number and title of a heading, and its fields by name."""

    number: str
    title: str
    fields: Mapping[str, str]

    @property
    def severity(self) -> str:
        return re.match(r"\w*", self.fields.get("Severity", ""))[0]

    @property
    def rule(self) -> tuple[str, str]:
        """The section of SKILL.md, as its words and its link."""
        found = re.search(r"\[([^]]+)\]\((SKILL\.md#[^)]+)\)", self.fields.get("Rule", ""))
        return (found[1], found[2]) if found else ("", "")

    @property
    def pages(self) -> list[str]:
        """The pages of refs/ on which a reader meets the mistake."""
        return re.findall(r"\]\((refs/[^)#]+\.md)", self.fields.get("Rule", ""))

    @property
    def principles(self) -> list[str]:
        return re.findall(r"\]\(#(p\d\d)\)", self.fields.get("Principle", ""))


def sections(text: str, letter: str) -> list[tuple[str, str, str]]:
    """(number, title, body) of every heading with an id such as {#m01}."""
    found = re.findall(
        rf"^### ({letter}\d\d) ([^\n]+?) \{{#(\w+)\}}\n(.*?)(?=^###? |\Z)", text, re.MULTILINE | re.DOTALL
    )
    return [
        (number if number == identifier else f"{number} with id {identifier}", title, body)
        for number, title, identifier, body in found
    ]


def entries(text: str) -> list[Entry]:
    return [
        Entry(number, title, dict(re.findall(r"^- \*\*([^*]+)\*\*: *(.*)$", body, re.MULTILINE)))
        for number, title, body in sections(text, "m")
    ]


def index(text: str) -> str:
    """The table of all entries, in the order of the rules and then of the numbers."""
    found = entries(text)
    order = sorted({one.rule for one in found}, key=lambda rule: _place(rule[1]))
    lines = ["| rule | mistake | severity |", "|---|---|---|"]
    for rule in order:
        for place, one in enumerate(sorted((e for e in found if e.rule == rule), key=lambda e: e.number)):
            name = f"[{rule[0]}]({rule[1]})" if place == 0 else ""
            lines.append(f"| {name} | [{one.number}](#{one.number}) {one.title} | {one.severity} |")
    return "\n".join(lines)


def _place(link: str) -> tuple[int, str]:
    number = re.search(r"#(\d+)-", link)
    return (int(number[1]) if number else 99, link)


def learning_page(text: str) -> str:
    """LEARNING.md with its index, and below each principle the mistakes that name it."""
    text = _between(text, INDEX, index(text))
    found = entries(text)
    for number, title, body in sections(text, "p"):
        own = [f"[{one.number}](#{one.number})" for one in found if number in one.principles]
        kept = re.sub(r"\n*Mistakes: .*\n", "\n", body).strip("\n")
        made = f"\n{kept}\n\nMistakes: {', '.join(own)}.\n\n" if own else f"\n{kept}\n\n"
        heading = f"### {number} {title} {{#{number}}}\n"
        text = text.replace(heading + body, heading + made, 1)
    return text


def reference_page(name: str, text: str, learning: str) -> str:
    """A page of refs/ with the mistakes that lead to it, at its end; `name` is its path in the repository."""
    own = [one for one in entries(learning) if name in one.pages]
    if not own:
        return re.sub(rf"\n*{BEHIND[0]}.*?{BEHIND[1]}\n", "\n", text, flags=re.DOTALL)
    lines = ["## Mistakes behind this page", ""]
    lines += [f"- [{one.number}](../LEARNING.md#{one.number}) {one.title}" for one in own]
    if BEHIND[0] not in text:
        text = f"{text.rstrip()}\n\n{BEHIND[0]}\n{BEHIND[1]}\n"
    return _between(text, BEHIND, "\n".join(lines))


def _between(text: str, marks: tuple[str, str], content: str) -> str:
    before, _, rest = text.partition(marks[0])
    _, _, after = rest.partition(marks[1])
    return f"{before}{marks[0]}\n\n{content}\n\n{marks[1]}{after}"


def pages() -> dict[Path, str]:
    """Every page that is made in part from the entries, as it must be."""
    learning = (ROOT / LEARNING).read_text(encoding="utf-8")
    made = {ROOT / LEARNING: learning_page(learning)}
    for path in sorted((ROOT / "refs").glob("*.md")):
        made[path] = reference_page(f"refs/{path.name}", path.read_text(encoding="utf-8"), learning)
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
