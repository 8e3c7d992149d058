"""What is asked of an installed skill beyond the public validator, which looks at the front matter alone.

The limits and their sources:

- front matter: https://agentskills.io/specification; the folder has the name, the description at most 1,024 characters.
- the first 150 characters: clients with many skills shorten descriptions (https://developers.openai.com/codex/skills).
- length: the specification advises less than 5,000 tokens; dotnet/skills found 800 to 2,500 best and more than 5,000 worse than no skill
  (README of its skill-validator, on SkillsBench, arXiv 2602.12670).
- references one level deep from SKILL.md, paths relative to it: the specification, "File references".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from os.path import dirname, join, normpath
from pathlib import Path
from typing import Any

import yaml

PAGES = ("SKILL.md", "LEARNING.md", "refs/*.md", "templates/README.md", "tutorial/README.md")
KEYS = {"name", "description", "license", "compatibility", "metadata"}
LONGEST_DESCRIPTION, SHOWN_OF_DESCRIPTION, LONGEST_COMPATIBILITY = 1024, 150, 500
TOKENS = (800, 2500)
TOKENS_PER_WORD = 1.35  # a proxy: no tokeniser is needed, and English Markdown lies near it
OPENING = re.compile(r"\A# [^\n]+\n\nRead this when ")
CODE = re.compile(r"^ *(?P<fence>`{3,}).*?^ *(?P=fence)`* *$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
OF_A_MACHINE = re.compile(r"(?<![\w.:~/])(?:/(?:home|Users|root|work|tmp|var|opt|usr|mnt|srv)/|[A-Za-z]:\\)[\w.-]+")


def problems(skill: Path) -> list[str]:
    """What is wrong with the skill in this folder, one line each: file, key, found, expected."""
    pages = {
        path.relative_to(skill).as_posix(): path.read_text(encoding="utf-8")
        for pattern in PAGES
        for path in sorted(skill.glob(pattern))
    }
    if "SKILL.md" not in pages:
        return [f"{skill}: found no SKILL.md"]
    files = {path.relative_to(skill).as_posix() for path in skill.rglob("*") if path.is_file()}
    found = skill_problems(pages["SKILL.md"], skill.name) + unlisted(pages)
    for page, text in pages.items():
        found += link_problems(text, page, files) + path_problems(text, page)
        if page.startswith("refs/") and not OPENING.match(text):
            found.append(f"{page}: its first paragraph does not begin with 'Read this when'")
    return found


def skill_problems(text: str, folder: str) -> list[str]:
    """What is wrong with the front matter and the length of SKILL.md in a folder of this name."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if not match:
        return ["SKILL.md: found no front matter between two lines '---'"]
    head, body = match.groups()
    try:
        fields = yaml.safe_load(head)
    except yaml.YAMLError as error:
        return [f"SKILL.md: front matter: {' '.join(str(error).split())}"]
    if not isinstance(fields, dict):
        return ["SKILL.md: front matter: expected keys with values"]
    found = front_matter_problems(head, fields)
    if fields.get("name") != folder:
        found.append(f"name: found '{fields.get('name')}', expected the name of the folder, '{folder}'")
    description = str(fields.get("description") or "")
    if not 1 <= len(description) <= LONGEST_DESCRIPTION:
        found.append(f"description: found {len(description)} characters, expected 1 to {LONGEST_DESCRIPTION}")
    if not re.search(r"(?i)(reproduce|implement|replicate).*paper", description[:SHOWN_OF_DESCRIPTION], re.DOTALL):
        found.append(f"description: its first {SHOWN_OF_DESCRIPTION} characters do not say what it is for")
    tokens = len(body.split()) * TOKENS_PER_WORD
    if not TOKENS[0] <= tokens <= TOKENS[1]:
        found.append(f"body: found about {tokens:.0f} tokens, expected {TOKENS[0]} to {TOKENS[1]}")
    return [f"SKILL.md: {problem}" for problem in found]


def front_matter_problems(head: str, fields: Mapping[str, Any]) -> list[str]:
    """What a client or the public validator refuses in the front matter: its form, its keys and their kinds."""
    found = []
    if "---" in head:
        found.append("front matter: '---' inside it cuts it short in some clients")
    if re.search(r":\s*[\[{]", head):
        found.append("front matter: flow style, which the validator refuses")
    if re.search(r"[<>]", str(fields)):
        found.append("front matter: angle brackets, which some clients read as markup")
    if extra := set(fields) - KEYS:
        found.append(f"front matter: keys that are not allowed: {', '.join(sorted(map(str, extra)))}")
    compatibility = str(fields.get("compatibility") or "")
    if len(compatibility) > LONGEST_COMPATIBILITY:
        found.append(f"compatibility: found {len(compatibility)} characters, expected at most {LONGEST_COMPATIBILITY}")
    metadata = fields.get("metadata") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        found.append("metadata: expected keys with texts")
    return found


def unlisted(pages: Mapping[str, str]) -> list[str]:
    """Reference pages that an agent cannot find: neither SKILL.md nor the index links to them."""
    listed = {linked for page in ("SKILL.md", "refs/index.md") for linked, _ in links(pages.get(page, ""), page)}
    return [
        f"{page}: neither SKILL.md nor refs/index.md links to it"
        for page in pages
        if page.startswith("refs/") and page not in listed
    ]


def link_problems(text: str, page: str, files: Collection[str]) -> list[str]:
    """Links of `page` that lead to none of `files`, and links of SKILL.md that lead deeper than one folder."""
    found = []
    for linked, target in links(text, page):
        if linked not in files:
            found.append(f"{page}: {target}: no such file in the skill")
        elif page == "SKILL.md" and linked.count("/") > 1:
            found.append(f"{page}: {target}: deeper than one folder")
    return found


def links(text: str, page: str) -> list[tuple[str, str]]:
    """Where the links of `page` lead, as paths in the skill, each with the link as it is written. Web addresses are left out."""
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", CODE.sub("", text))
    inside = [target for target in targets if not re.match(r"https?:|mailto:", target)]
    return [(_resolved(target.partition("#")[0], page), target) for target in inside]


def _resolved(path: str, page: str) -> str:
    return normpath(join(dirname(page), path)) if path else page


def path_problems(text: str, page: str) -> list[str]:
    """Absolute paths of one machine, in prose, code and links. `/path/to/...` is a placeholder."""
    return [f"{page}: {path}: an absolute path" for path in OF_A_MACHINE.findall(text)]
