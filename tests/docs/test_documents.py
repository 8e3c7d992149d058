"""The documents say only what holds: their code runs, their commands exist, their links lead somewhere.

Every check is a function over text that returns a list of problems. Each is run on the real documents and, in the
second half of this file, on a text with the fault planted, which it must report.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from itertools import takewhile
from pathlib import Path

import markdown
import pytest
import yaml

from nsgf import inception
from repro import cli
from repro.config import flatten, read_yaml

ROOT = Path(__file__).parents[2]
TOP_PAGES = {
    "README.md",
    "SKILL.md",
    "LEARNING.md",
    "TODO.md",
    "reference_impl/README.md",
    "templates/reproduction/README.md",
}
REFS = sorted((ROOT / "refs").glob("*.md"))
WITH_CODE = [
    *(ROOT / page for page in ("SKILL.md", "LEARNING.md", "README.md", "TODO.md", "reference_impl/README.md")),
    *REFS,
]
LINKED = [*REFS, *(ROOT / page for page in sorted(TOP_PAGES)), ROOT / "reference_impl/reports/README.md"]
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


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- the checks --------------------------------------------------------------------------------------------------


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


def refused_runs(text: str, refusal: Callable[[list[str]], str | None]) -> list[str]:
    """Runs that name an experiment or a setting which is not there. `refusal` gives the error of `repro run` with these arguments."""
    told = {shlex.join(words): refusal(words[1:]) for words in repro_commands(text) if words[0] == "run"}
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


# --- on the real documents ---------------------------------------------------------------------------------------


def read_repository(path: str) -> str | None:
    file = ROOT / path
    if not file.is_file():
        return None
    return file.read_text(encoding="utf-8") if file.suffix == ".md" else ""


@cache
def repro_help(command: str) -> str | None:
    done = subprocess.run(
        [sys.executable, "-m", "repro", command, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    return done.stdout if done.returncode == 0 else None


def refusal(arguments: list[str]) -> str | None:
    """What `repro run` says to these arguments before it would begin, on a machine without a GPU; None when it would."""
    told = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(told):
        try:
            code = cli.main(["run", *arguments, "--device", "cpu", "--dry-run"])
        except SystemExit as end:
            code = end.code
    return None if code == 0 else told.getvalue().strip().splitlines()[-1]


def mistake_tests() -> set[str]:
    return {relative(path) for path in (ROOT / "tests/mistakes").glob("test_*.py")}


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_python_blocks_run(page, tmp_path):
    assert failing_python(page.read_text(encoding="utf-8"), tmp_path) == []


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert unknown_make_targets(text, targets) + unknown_repro_commands(text, repro_help) == []


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_runs_name_experiments_and_settings_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refused_runs(page.read_text(encoding="utf-8"), refusal) == []


def test_the_makefile_runs_experiments_and_settings_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = ["demo", "reproduce-2d", "reproduce-digits", "reproduce-mnist-reduced"]
    shown = ["make", "--dry-run", "VENV=unmade", "--assume-old=unmade/.ready", *targets]
    recipe = subprocess.run(shown, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout
    text = block("bash", *recipe.splitlines())
    assert {words[0] for words in repro_commands(text)} == {"run", "report"}
    assert refused_runs(text, refusal) + unknown_repro_commands(text, repro_help) == []


@pytest.mark.parametrize("page", LINKED, ids=relative)
def test_links_and_paths_resolve(page):
    text = page.read_text(encoding="utf-8")
    assert (
        broken_links(text, relative(page), read_repository)
        + missing_paths(text, lambda path: any(ROOT.glob(path.rstrip("/"))))
        == []
    )


def test_catalogue_is_complete():
    assert catalogue_problems((ROOT / "LEARNING.md").read_text(encoding="utf-8"), mistake_tests()) == []


def test_skill_is_valid():
    assert skill_problems((ROOT / "SKILL.md").read_text(encoding="utf-8")) == []


def test_every_page_is_in_the_navigation():
    pages = TOP_PAGES | {"reference_impl/reports/README.md"}
    assert (
        navigation_problems(
            (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), pages | {relative(page) for page in REFS}
        )
        == []
    )


def test_every_reference_page_says_when_to_read_it():
    assert [relative(page) for page in REFS if "\nRead this when " not in page.read_text(encoding="utf-8")] == []
    index = (ROOT / "refs/index.md").read_text(encoding="utf-8")
    assert [page.name for page in REFS if page.name != "index.md" and f"]({page.name})" not in index] == []


def test_the_readme_downloads_the_weights_that_the_code_opens():
    assert inception.URL in (ROOT / "README.md").read_text(encoding="utf-8") and inception.URL.endswith(
        inception.WEIGHTS
    )


@pytest.mark.parametrize("page, experiments", [("refs/nsgf.md", "2d-*"), ("refs/nsgf-images.md", "[!2]*")])
def test_the_case_studies_name_settings_that_exist(page, experiments):
    configs = sorted((ROOT / "reference_impl/configs").glob(f"{experiments}.yaml"))
    keys = {key: None for path in configs for key in flatten(read_yaml(path))}
    assert keys and unknown_settings((ROOT / page).read_text(encoding="utf-8"), keys) == []


# --- with a fault planted ----------------------------------------------------------------------------------------


def block(language: str, *lines: str) -> str:
    return "\n".join(["Some text.", "", f"```{language}", *lines, "```", ""])


def test_a_failing_block_is_reported_with_its_line_and_the_others_still_run(tmp_path):
    text = block("python", "x = 1", "assert x == 2, 'planted'") + block("python", "y = 1") + block("python", "print(y)")
    assert failing_python(text, tmp_path) == [
        "line 5: AssertionError: planted",
        "line 15: NameError: name 'y' is not defined",
    ]


def test_a_block_that_ends_the_process_is_reported(tmp_path):
    assert failing_python(block("python", "import os", "os._exit(3)"), tmp_path)[0].startswith("exit code 3")


def test_other_languages_are_not_run(tmp_path):
    assert failing_python(block("bash", "exit 1") + block("", "raise SystemExit"), tmp_path) == []


MAKEFILE = "BIN := x\n.PHONY: help\nhelp: ## list\n\techo\nsetup test: help\n"


@pytest.mark.parametrize(
    "line, problems",
    [
        ("make test", []),
        ("make setup && make help  # comment", []),
        ("SEEDS=1 make test JOBS=3", []),
        ("make tests", ["make tests: no such target"]),
        ("make help; make BIN", ["make BIN: no such target"]),
    ],
)
def test_unknown_make_targets(line, problems):
    assert unknown_make_targets(block("bash", line), make_targets(MAKEFILE)) == problems


@pytest.mark.parametrize(
    "line, problems",
    [
        ("repro run x --set 'a.*.b=1' --resume", []),
        (".venv/bin/repro run x", []),
        ("repro frobnicate", ["repro frobnicate: no such command"]),
        ("python -m repro frobnicate", ["repro frobnicate: no such command"]),
        ("torchrun --nproc-per-node 2 -m repro run x --restart", ["repro run --restart: no such option"]),
        ("srun repro frobnicate", ["repro frobnicate: no such command"]),
        ("cp -r kit/repro mine", []),
        ("repro run x > --log", []),
        ("make x && repro run --restart", ["repro run --restart: no such option"]),
        ("repro run --res=1", ["repro run --res: no such option"]),
    ],
)
def test_unknown_repro_commands(line, problems):
    assert unknown_repro_commands(block("bash", line), {"run": "--set KEY --resume --resume-phase N"}.get) == problems


def test_refused_runs():
    text = block("bash", "repro run a --set b=1", "repro report --runs c", "torchrun -m repro run d")
    assert refused_runs(text, lambda words: "no b" if words[0] == "a" else None) == ["repro run a --set b=1: no b"]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["2d-*", "digits", "--train-iters", "5"], None),
        (["digits", "--device", "cuda:9"], None),
        (["digit"], "found no experiment 'digit'"),
        (["digits", "--set", "phases.*.pol.batches=2"], "did you mean 'phases.*.pool.batches'?"),
        (["digits", "--seeds", "-1"], "expected a whole number"),
    ],
)
def test_what_a_run_is_refused_for(arguments, problem, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = refusal(arguments)
    assert problem in told if problem else told is None


@pytest.mark.parametrize(
    "text, problem",
    [
        ("[a](refs/there.md#a-heading) [b](#here)\n\n## Here", None),
        ("`[a](no.md)` is code", None),
        ("[a](https://example.org/no.md)", None),
        ("[a](refs/no.md)", "no such file"),
        ("[a](refs/there.md#no)", "no such heading"),
        ("[a](#no)", "no such heading"),
        ("![a](no.png)", "no such file"),
        ("[a](code.py)", "not part of the site"),
    ],
)
def test_broken_links(text, problem):
    files = {"refs/there.md": "# There\n\n## A heading", "code.py": ""}
    found = broken_links(text, "SKILL.md", files.get)
    assert len(found) == (problem is not None) and all(problem in line for line in found)


def test_links_are_resolved_from_the_folder_of_their_page():
    assert broken_links("[a](../SKILL.md) [b](SKILL.md)", "refs/x.md", {"SKILL.md": ""}.get) == [
        "refs/x.md: SKILL.md: no such file"
    ]


def test_missing_paths():
    there = {"templates/reproduction/repro/pool.py", "tests/x.py"}
    assert missing_paths("`repro/pool.py` `tests/x.py` `tests/mistakes/test_mNN_x.py`", there.__contains__) == []
    assert missing_paths("`repro/memory.py` `tests/y.py`", there.__contains__) == [
        "repro/memory.py: no such file",
        "tests/y.py: no such file",
    ]


ENTRY = {
    "Severity": "critical", "What": "It broke.", "Symptom": "`Error: x`", "Impact": "A day.", "Root cause": "Haste.", "Prevention": "A test.",
    "Fix": "Done.", "Rule": "[Test](SKILL.md#test)", "Principle": "[p01](#p01)", "Evidence": "Field notes.", "Test": "`tests/mistakes/test_m01_x.py`",
}  # fmt: skip
MARKS = "<!-- measured:sinkhorn -->\n<!-- /measured:sinkhorn -->\n"


def catalogue(
    marks: str = MARKS, heading: str = "m01 It broke {#m01}", traces: str = "[m01](#m01)", **changes: str
) -> str:
    fields = {**ENTRY, **{name.replace("_", " "): value for name, value in changes.items()}}
    lines = "\n".join(f"- **{name}**: {value}" for name, value in fields.items())
    return f"## Mistakes\n\n### {heading}\n\n{lines}\n\n## Principles\n\n### p01 Test {{#p01}}\n\nFrom {traces}.\n\n{marks}"


def test_a_complete_catalogue_passes():
    assert catalogue_problems(catalogue(), ["tests/mistakes/test_m01_x.py"]) == []


@pytest.mark.parametrize(
    "changes, problem",
    [
        *(({field.replace(" ", "_"): ""}, f"m01: no field '{field}'") for field in FIELDS),
        ({"Severity": "bad"}, "m01: severity is neither"),
        ({"Symptom": "It stops."}, "m01: the symptom quotes no message"),
        ({"Rule": "Be careful."}, "m01: the rule links to no section"),
        ({"Principle": "[p09](#p09)"}, "m01: the principle links to none"),
        ({"Evidence": "Everybody knows."}, "m01: the evidence has no label"),
        ({"Test": "`tests/mistakes/test_m01_y.py`"}, "m01: no test file of that name"),
        ({"Test": "by hand"}, "m01: no test file of that name"),
        ({"heading": "m02 It broke {#m02}"}, "entries: found m02"),
        ({"heading": "m01 It broke {#m1}"}, "entries: found m01 with id m1"),
        ({"heading": "m01 It broke"}, "entries: found"),
        ({"traces": "experience"}, "p01: traces to no entry"),
        ({"traces": "[m07](#m07)"}, "p01: traces to no entry"),
        ({"marks": ""}, "the place of the measured"),
        ({"marks": MARKS + MARKS}, "the place of the measured"),
    ],
)
def test_catalogue_problems(changes, problem):
    assert any(
        line.startswith(problem) for line in catalogue_problems(catalogue(**changes), ["tests/mistakes/test_m01_x.py"])
    )


def test_a_test_without_an_entry_is_reported():
    files = ["tests/mistakes/test_m01_x.py", "tests/mistakes/test_m02_x.py"]
    assert catalogue_problems(catalogue(), files) == ["tests/mistakes/test_m02_x.py: no entry in LEARNING.md"]


SKILL = '---\nname: paper-reproduction\ndescription: Implement a paper from scratch.\nlicense: MIT\nmetadata:\n  version: "1"\n---\nBody.\n'


def test_a_valid_skill_passes():
    assert skill_problems(SKILL) == []


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("---\n", "", "no front matter"),
        ("paper-reproduction", "Paper_Reproduction", "name: found"),
        ("license: MIT", "version: 1", "keys that are not allowed: version"),
        ("from scratch.", "x" * 1024, "description: 10"),
        (
            "Implement a paper",
            "Everything you need to know" + " " * 130 + "implement a paper",
            "the first 150 characters",
        ),
        ("from scratch", "<b>", "angle brackets"),
        ("from scratch.", "rules --- and more", "'---' cuts"),
        ('metadata:\n  version: "1"', "metadata: {a: b}", "flow style"),
        ('"1"', "1", "metadata: values must be text"),
        ("from scratch.", "now: later", "front matter:"),
        ("license: MIT", "compatibility: " + "x" * 501, "compatibility: more than 500"),
        ("Body.", "word " * 1900, "body: about 2565 tokens"),
    ],
)
def test_skill_problems(old, new, problem):
    assert any(line.startswith(problem) for line in skill_problems(SKILL.replace(old, new, 1)))


def test_navigation_problems():
    text = "nav:\n  - Home: a.md\n  - Part:\n      - b.md\n      - Mine: reference_impl/reports/demo/README.md\n"
    assert navigation_problems(text, {"a.md", "b.md"}) == []
    assert navigation_problems(text, {"a.md", "b.md", "c.md"}) == ["c.md: 0 times in the navigation"]
    assert navigation_problems(text, {"a.md"}) == ["b.md: 1 times in the navigation"]
    assert navigation_problems(text.replace("Home: a.md", "Home: b.md"), {"b.md"}) == [
        "b.md: 2 times in the navigation"
    ]


def test_unknown_settings():
    assert unknown_settings("`sinkhorn.blur` `phases.py` `phases.x.y`", {"sinkhorn.blur": None}) == [
        "phases.x.y: no configuration has this key"
    ]


def test_the_reading_list_of_the_reference_implementation_names_every_module_and_no_other():
    folder = ROOT / "reference_impl"
    listed = re.findall(r"`nsgf/(\w+)\.py`", (folder / "README.md").read_text())
    assert sorted(listed) == sorted(path.stem for path in (folder / "nsgf").glob("[!_]*.py"))
