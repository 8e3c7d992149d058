"""What is asked of the documents: functions over text that return a list of problems."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from itertools import takewhile, zip_longest
from pathlib import Path

import forked
import markdown
import yaml
from catalogue import Entry, entries, sections

TOP_PAGES = {
    "README.md",
    "SKILL.md",
    "LEARNING.md",
    "TODO.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "reference_impl/README.md",
    "templates/README.md",
    "tutorial/README.md",
    "tutorial/project/pilots.md",
}
REPORTS = ("reference_impl/reports/", "tutorial/project/reports/")
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
LABELS = ("Field notes", "Measured here", "By hand", "Dossier", "Paper", "Cited", "Authors' code", "Assumed")
SHORTEST_REASON = 12


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


def run_blocks(blocks: list[tuple[int, str]], folder: str) -> int:
    """Runs every block by itself and prints a line of JSON for each that raises."""
    os.chdir(folder)
    for line, code in blocks:
        try:
            exec(compile("\n" * (line - 1) + code, "block", "exec"), {"__name__": "__main__"})
        except BaseException as error:
            where = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "block"]
            print(json.dumps(f"line {(where or [line])[0]}: {type(error).__name__}: {error}"))
    return 0


def failing_python(text: str, folder: Path) -> list[str]:
    """Runs every Python block by itself, in `folder` and outside this process."""
    blocks = fences(text, "python")
    if not blocks:
        return []
    told = folder / "told.log"
    code = forked.run(run_blocks, blocks, str(folder), output=told)
    lines = told.read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines if line.startswith('"line ')]
    return problems + ([f"exit code {code}: {' '.join(lines)[-500:]}"] if code else [])


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
            if Path(word).name in ("repro", "repro_tools") and (before in ([], ["srun"]) or before[-1] == "-m"):
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


@cache
def anchors(text: str) -> set[str]:
    """The ids that the site gives to the headings of a page."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    html = markdown.markdown(body, extensions=["toc", "attr_list", "tables", "fenced_code", "md_in_html"])
    return set(re.findall(r'\bid="([^"]+)"', html))


def is_published(path: str) -> bool:
    """Whether the whitelist of mkdocs.yml lets this file into the site."""
    figure = path.startswith("benchmarks/results/") and path.endswith(".png")
    return figure or path in TOP_PAGES or path.startswith(("refs/", *REPORTS))


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
    for name in re.findall(
        r"`((?:reference_impl|templates|tests|benchmarks|refs|repro|repro_tools)/[\w./*-]*)`", prose
    ):
        if "NN" in name or name.startswith(MADE_BY_THE_READER):  # a pattern for new files; made later
            continue
        path = f"templates/reproduction/{name}" if name.startswith("repro/") else name
        if not exists(path):
            problems.append(f"{name}: no such file")
    return problems


def catalogue_problems(text: str, tests: Mapping[str, str], skill: str, pages: Collection[str]) -> list[str]:
    """`tests` are the files of tests/mistakes with their text, `skill` is SKILL.md, `pages` are the paths of the pages of refs/."""
    problems = []
    found, principles = entries(text), {number: body for number, _, body in sections(text, "p")}
    numbers = [entry.number for entry in found]
    headings = len(re.findall(r"^### m\d", text, re.MULTILINE))
    if numbers != [f"m{n:02}" for n in range(1, len(found) + 1)] or headings != len(found):
        odd = next(
            (n for n, m in zip_longest(numbers, (f"m{i:02}" for i in range(1, len(found) + 1))) if n != m), numbers[-1:]
        )
        problems.append(
            f"entries: found {headings} headings and {len(found)} with an id that fits, '{odd}' out of line; expected m01 to m{headings:02}, "
            f"in order, each as '### m{headings:02} Title {{#m{headings:02}}}'"
        )
    outside = re.findall(
        r"^### (m\d\d)",
        f"\n{text}".partition("\n## Mistakes\n")[0] + text.partition("\n## Principles\n")[2],
        re.MULTILINE,
    )
    problems += [f"{number}: stands outside of 'Mistakes'" for number in outside]
    for number, _, body in sections(text, "m"):
        problems += [f"{number}: {problem}" for problem in form_problems(body)]
    for entry in found:
        problems += [f"{entry.number}: {problem}" for problem in entry_problems(entry, tests, principles, skill, pages)]
    tested = {file for entry in found for file in _files(entry)}
    problems += [f"{file}: no entry in LEARNING.md" for file in sorted(set(tests) - tested)]
    for name in _repeated(entry.title for entry in found):
        problems.append(f"two entries have the title '{name}'")
    named = {principle for entry in found for principle in entry.principles}
    problems += [f"{number}: no entry names it" for number in principles if number not in named]
    rules = {entry.rule[1].partition("#")[2] for entry in found}
    numbered = {anchor for anchor in anchors(skill) if re.match(r"[1-9]-", anchor)}
    problems += [f"SKILL.md#{anchor}: a rule that no entry leads to" for anchor in sorted(numbered - rules)]
    if [text.count(f"<!-- {mark}measured:sinkhorn -->") for mark in ("", "/")] != [1, 1]:
        problems.append("the place of the measured Sinkhorn table is not marked exactly once")
    return problems


def form_problems(body: str) -> list[str]:
    """What is wrong with how the fields of an entry are written down."""
    lines = body.strip("\n").split("\n\n")[0].splitlines()
    names = [match[1] for line in lines if (match := re.match(r"- \*\*([^*]+)\*\*: ", line))]
    problems = [f"field '{name}' stands twice" for name in _repeated(names)]
    strange = [line for line in lines if not re.match(r"- \*\*[^*]+\*\*:", line)]
    if strange:
        problems.append(f"a line of the fields is none of '- **Name**: text': {strange[0][:60]}")
    return problems


def entry_problems(
    entry: Entry, tests: Mapping[str, str], principles: Collection[str], skill: str, pages: Collection[str]
) -> list[str]:
    """What is wrong with one entry."""
    fields = entry.fields
    empty = [f"no field '{field}'" for field in FIELDS if not fields.get(field)]
    if empty:
        return empty
    problems = [f"field '{field}' is not one of the form" for field in fields if field not in FIELDS]
    if list(fields) != [field for field in FIELDS if field in fields] and not problems:
        problems.append(f"fields in another order than {', '.join(FIELDS)}")
    if not re.fullmatch(r"(critical|moderate|low)(; .+)?", fields["Severity"]):
        problems.append("severity is neither critical, moderate nor low, with or without '; ' and when it is another")
    if not _quoted(fields["Symptom"]) and not re.match(r"(Often n|N)o error", fields["Symptom"]):
        problems.append("the symptom quotes no message of two words or more and does not begin with 'No error'")
    if entry.rule[1].partition("#")[2] not in anchors(skill):
        problems.append("the rule links to no section of SKILL.md")
    elif not re.search(rf"^## (\d+\. )?{re.escape(entry.rule[0])}$", skill, re.MULTILINE):
        problems.append(f"the rule is called '{entry.rule[0]}', no section of SKILL.md is")
    if not entry.pages or not set(entry.pages) <= set(pages):
        problems.append("the rule names no page of refs/ that exists")
    if not entry.principles or not set(entry.principles) <= set(principles):
        problems.append("the principle links to none that exists")
    if not any(label.lower() in fields["Evidence"].lower() for label in LABELS):
        problems.append(f"the evidence has none of the labels: {', '.join(LABELS).lower()}")
    files = _files(entry)
    if not files or any(
        file not in tests or not file.startswith(f"tests/mistakes/test_{entry.number}_") for file in files
    ):
        return [*problems, f"no test file of that name: {', '.join(files) or 'none named'}"]
    reasons = re.findall(r"red with `([^`]+)`", fields["Test"])
    broken = [file for file in files if not _parses(tests[file])]
    if broken:
        return [*problems, f"{broken[0]}: is no Python"]
    texts = [text for file in files for text in _texts(tests[file])]
    if not reasons or any(
        len(reason) < SHORTEST_REASON or not any(reason in text for text in texts) for reason in reasons
    ):
        problems.append(
            f"the reason for red stands in no text of the test's code: {', '.join(reasons) or 'none named'}"
        )
    problems += [f"{file}: {problem}" for file in files for problem in proof_problems(tests[file], entry.number)]
    return problems


def proof_problems(code: str, number: str) -> list[str]:
    """What is wrong with the form of a test file of tests/mistakes. That it proves something is seen when it runs."""
    tree = ast.parse(code)
    problems = []
    if not (ast.get_docstring(tree) or "").startswith(f"{number}: "):
        problems.append(f"its docstring does not begin with '{number}: '")
    proofs = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "Proof"
    ]
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "PROOFS" not in names or not proofs:
        problems.append("no PROOFS with a Proof in it")
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "test_proof"]
    if not tests or "case()" not in ast.unparse(tests[0]).partition(":")[2]:
        problems.append("no test_proof that calls case()")
    clocks = [node for node in ast.walk(tree) if _asks_the_clock(node)]
    if clocks:
        problems.append(f"line {clocks[0].lineno} asks the clock")
    return problems


def _asks_the_clock(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "time"
    return isinstance(node, ast.Import) and any(name.name == "time" for name in node.names)


def _quoted(symptom: str) -> list[str]:
    return [text for text in re.findall(r"`([^`]+)`", symptom) if len(re.findall(r"[A-Za-z_]+", text)) > 1]


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _texts(code: str) -> list[str]:
    """Every text in the code, those of f-strings in parts; no docstrings, no comments."""
    tree = ast.parse(code)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


def _files(entry: Entry) -> list[str]:
    return re.findall(r"`(tests/mistakes/[^`]+)`", entry.fields.get("Test", ""))


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


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
