"""What is asked of the documents: functions over text that return a list of problems."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from pathlib import Path

import markdown
import yaml

TOP_PAGES = {
    "README.md",
    "SKILL.md",
    "LEARNING.md",
    "TODO.md",
    "reference_impl/README.md",
    "templates/reproduction/README.md",
}
MADE_BY_THE_READER = "reference_impl/reports/demo/"

FIELDS = (
    "Severity",
    "What",
    "Symptom",
    "Impact",
    "Root cause",
    "Prevention",
    "Fix",
    "Rule",
    "Principle",
    "Evidence",
    "Test",
)
LABELS = ("Field notes", "Measured here", "Dossier", "Paper", "Cited", "Authors' code")
TOKENS_PER_WORD = 1.35  # a proxy: no tokeniser is needed, and English Markdown lies near it


def fences(text: str, language: str) -> list[tuple[int, str]]:
    """The code of every fenced block in `language`, each with the line on which it begins."""
    found, lines, start = [], text.splitlines(), None
    for number, line in enumerate(lines):
        if start is None and (opening := re.fullmatch(r"\s*```(\S*).*", line)):
            start = (number + 1, opening[1])
        elif start is not None and line.strip() == "```":
            if start[1] == language:
                found.append((start[0] + 1, textwrap.dedent("\n".join(lines[start[0] : number]))))
            start = None
    return found


RUN_BLOCKS = """
import json, sys, traceback
for line, code in json.load(sys.stdin):
    try:
        exec(compile("\\n" * (line - 1) + code, "block", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        where = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "block"]
        print(json.dumps(f"line {(where or [line])[0]}: {type(error).__name__}: {error}"))
"""


def failing_python(text: str, folder: Path) -> list[str]:
    """Runs every Python block by itself, in `folder` and outside this process."""
    blocks = fences(text, "python")
    if not blocks:
        return []
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS], input=json.dumps(blocks), capture_output=True, text=True, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2"}, timeout=300,
    )  # fmt: skip
    problems = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"line ')]
    return problems + ([f"exit code {done.returncode}: {done.stderr[-500:]}"] if done.returncode else [])


def commands(text: str) -> list[list[str]]:
    """Every command in the bash blocks, as words, without variables set in front of it."""
    found = []
    for _, block in fences(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set(";&|"):
                    found.append(words)
                    words = []
                elif words or not re.match(r"\w+=", word):
                    words.append(word)
    return [words for words in found if words]


def make_targets(makefile: str) -> set[str]:
    rules = re.findall(r"^([\w.-]+(?: +[\w.-]+)*) *:(?![:=])", makefile, re.MULTILINE)
    return {target for rule in rules for target in rule.split() if not target.startswith(".")}


def unknown_make_targets(text: str, targets: Collection[str]) -> list[str]:
    named = [
        word
        for words in commands(text)
        if words[0] == "make"
        for word in words[1:]
        if "=" not in word and not word.startswith("-")
    ]
    return [f"make {name}: no such target" for name in named if name not in targets]


def repro_commands(text: str) -> list[list[str]]:
    """What stands behind `repro` in each command that starts it, by itself or through python, torchrun or srun."""
    found = []
    for words in commands(text):
        for place, word in enumerate(words):
            before = words[:place]
            if Path(word).name == "repro" and (before in ([], ["srun"]) or before[-1] == "-m"):
                found.append([*takewhile(lambda word: not set(word) <= set("<>"), words[place + 1 :])])
                break
    return [words for words in found if words]


def unknown_repro_commands(text: str, help_of: Callable[[str], str | None]) -> list[str]:
    """`help_of` gives the help text of a subcommand, None when there is no such subcommand."""
    problems = []
    for command, *words in repro_commands(text):
        known = help_of(command)
        if known is None:
            problems.append(f"repro {command}: no such command")
            continue
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        problems += [
            f"repro {command} {option}: no such option"
            for option in options
            if not re.search(rf"{option}\b(?!-)", known)
        ]
    return problems


def refused_commands(text: str, refusal: Callable[[list[str]], str | None]) -> list[str]:
    """Commands that name an experiment or a setting which is not there. `refusal` gives the error of `repro` with these words."""
    told = {shlex.join(words): refusal(words) for words in repro_commands(text)}
    return [f"repro {command}: {line}" for command, line in told.items() if line]


def without_code(text: str) -> str:
    text = re.sub(r"^\s*```.*?^\s*```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text: str) -> set[str]:
    """The ids that the site gives to the headings of a page."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    html = markdown.markdown(body, extensions=["toc", "attr_list", "tables", "fenced_code", "md_in_html"])
    return set(re.findall(r'\bid="([^"]+)"', html))


def is_published(path: str) -> bool:
    """Whether the whitelist of mkdocs.yml lets this file into the site."""
    figure = path.startswith("benchmarks/results/") and path.endswith(".png")
    return figure or path in TOP_PAGES or path.startswith(("refs/", "reference_impl/reports/"))


def broken_links(text: str, page: str, read: Callable[[str], str | None]) -> list[str]:
    """Links of `page` that lead nowhere in the repository or in the site. `read` gives a file's text, None if absent."""
    problems = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        if linked.startswith(MADE_BY_THE_READER):
            continue
        content = text if linked == page else read(linked)
        if content is None:
            problems.append(f"{page}: {target}: no such file")
        elif not is_published(linked):
            problems.append(f"{page}: {target}: not part of the site; name the file in code font instead")
        elif anchor and anchor not in anchors(content):
            problems.append(f"{page}: {target}: no such heading")
    return problems


def missing_paths(text: str, exists: Callable[[str], bool]) -> list[str]:
    """Files of this repository named in code font that are not there. `*` may stand for several."""
    prose = re.sub(r"^\s*```.*?^\s*```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    problems = []
    for name in re.findall(r"`((?:reference_impl|templates|tests|benchmarks|refs|repro)/[\w./*-]*)`", prose):
        if "NN" in name or name.startswith(MADE_BY_THE_READER):  # a pattern for new files; made later
            continue
        path = f"templates/reproduction/{name}" if name.startswith("repro/") else name
        if not exists(path):
            problems.append(f"{name}: no such file")
    return problems


def sections(text: str, letter: str) -> list[tuple[str, str, str]]:
    """(number, title, body) of every heading with an id such as {#m01}."""
    found = re.findall(rf"^### ({letter}\d\d) (.+?) \{{#(\w+)\}}\n(.*?)(?=^###? |\Z)", text, re.MULTILINE | re.DOTALL)
    return [
        (number if number == identifier else f"{number} with id {identifier}", title, body)
        for number, title, identifier, body in found
    ]


def catalogue_problems(text: str, test_files: Collection[str]) -> list[str]:
    """`test_files` are the files in tests/mistakes, by their path in the repository."""
    problems = []
    entries, principles = sections(text, "m"), {number: body for number, _, body in sections(text, "p")}
    numbers = [number for number, _, _ in entries]
    if numbers != [f"m{n:02}" for n in range(1, len(entries) + 1)] or len(
        re.findall(r"^### m\d", text, re.MULTILINE)
    ) != len(entries):
        problems.append(
            f"entries: found {', '.join(numbers)}, expected m01, m02, ... each with its id, none left out or used twice"
        )
    tested = set()
    for number, _, body in entries:
        fields = dict(re.findall(r"^- \*\*([^*]+)\*\*: *(.*)$", body, re.MULTILINE))
        problems += [f"{number}: no field '{field}'" for field in FIELDS if not fields.get(field)]
        if any(not fields.get(field) for field in FIELDS):
            continue
        if not fields["Severity"].startswith(("critical", "moderate", "low")):
            problems.append(f"{number}: severity is neither critical, moderate nor low")
        if "`" not in fields["Symptom"] and not fields["Symptom"].startswith("No error"):
            problems.append(f"{number}: the symptom quotes no message and does not say 'No error'")
        if "](SKILL.md#" not in fields["Rule"]:
            problems.append(f"{number}: the rule links to no section of SKILL.md")
        named = re.findall(r"\]\(#(p\d\d)\)", fields["Principle"])
        if not named or not principles.keys() >= set(named):
            problems.append(f"{number}: the principle links to none that exists")
        if not any(label.lower() in fields["Evidence"].lower() for label in LABELS):
            problems.append(f"{number}: the evidence has no label")
        files = re.findall(r"`(tests/mistakes/[^`]+)`", fields["Test"])
        tested |= set(files)
        if not files or any(
            file not in test_files or not file.startswith(f"tests/mistakes/test_{number}_") for file in files
        ):
            problems.append(f"{number}: no test file of that name: {', '.join(files) or 'none named'}")
    problems += [f"{file}: no entry in LEARNING.md" for file in sorted(set(test_files) - tested)]
    for number, body in principles.items():
        named = re.findall(r"\]\(#(m\d\d)\)", body)
        if not named or not set(named) <= set(numbers):
            problems.append(f"{number}: traces to no entry")
    if [text.count(f"<!-- {mark}measured:sinkhorn -->") for mark in ("", "/")] != [1, 1]:
        problems.append("the place of the measured Sinkhorn table is not marked exactly once")
    return problems


def skill_problems(text: str) -> list[str]:
    """The rules of the Agent Skills specification, and those of the clients that are stricter."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if not match:
        return ["no front matter"]
    head, body = match.groups()
    problems = []
    if "---" in head or "\n---" in body:
        problems.append("'---' cuts the front matter short in some clients")
    if re.search(r":\s*[\[{]", head):
        problems.append("flow style is refused by the validator")
    try:
        fields = yaml.safe_load(head)
    except yaml.YAMLError as error:
        return [*problems, f"front matter: {error}"]
    name, description = fields.get("name", ""), fields.get("description", "")
    extra = set(fields) - {"name", "description", "license", "compatibility", "metadata"}
    if extra:
        problems.append(f"keys that are not allowed: {', '.join(sorted(extra))}")
    if name != "paper-reproduction":
        problems.append(f"name: found '{name}'")
    if not 1 <= len(description) <= 1024:
        problems.append(f"description: {len(description)} characters, at most 1024")
    if not re.search(r"(?i)(reproduce|implement|replicate).*paper", description[:150], re.DOTALL):
        problems.append("the first 150 characters of the description do not trigger by themselves")
    if re.search(r"[<>]", str({key: value for key, value in fields.items()})):
        problems.append("angle brackets in the front matter")
    if len(fields.get("compatibility", "")) > 500:
        problems.append("compatibility: more than 500 characters")
    if any(not isinstance(value, str) for value in fields.get("metadata", {}).values()):
        problems.append("metadata: values must be text")
    tokens = len(body.split()) * TOKENS_PER_WORD
    if tokens > 2500:
        problems.append(f"body: about {tokens:.0f} tokens, at most 2500")
    return problems


def navigation_problems(configuration: str, pages: Collection[str]) -> list[str]:
    """`pages` are the Markdown files that must be in the navigation of mkdocs.yml, each once."""

    def leaves(node):
        for child in node if isinstance(node, list) else node.values():
            if isinstance(child, str):
                yield child
            else:
                yield from leaves(child)

    named = [name for name in leaves(yaml.safe_load(configuration)["nav"]) if not name.startswith(MADE_BY_THE_READER)]
    return [
        f"{name}: {named.count(name)} times in the navigation"
        for name in sorted({*named, *pages})
        if named.count(name) != 1 or name not in pages
    ]


def unknown_settings(text: str, keys: Mapping[str, object]) -> list[str]:
    """Keys of the configuration in code font that no configuration has."""
    named = re.findall(r"`((?:data|sinkhorn|phases|nsgf_plus_plus|evaluation)\.[\w.]+)`", text)
    return [f"{name}: no configuration has this key" for name in named if name not in keys and not name.endswith(".py")]


def block(language: str, *lines: str) -> str:
    return "\n".join(["Some text.", "", f"```{language}", *lines, "```", ""])
