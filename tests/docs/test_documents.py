"""The documents say only what holds: their code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import catalogue
import pytest
from document_checks import (
    REPORTS,
    TOP_PAGES,
    block,
    broken_links,
    catalogue_problems,
    entry_problems,
    failing_python,
    fences,
    make_targets,
    missing_paths,
    navigation_problems,
    refused_commands,
    repro_commands,
    unknown_make_targets,
    unknown_repro_commands,
    unknown_settings,
)

from nsgf import inception
from repro import __main__ as command_line
from repro.config import flatten, read_yaml
from repro.errors import BadInput
from repro.method import find_project
from repro_tools import cli
from repro_tools.gate import checked_plan

ROOT = Path(__file__).parents[2]
REFS = sorted((ROOT / "refs").glob("*.md"))
WITH_CODE = [
    *(
        ROOT / page
        for page in (
            "SKILL.md",
            "LEARNING.md",
            "README.md",
            "TODO.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "reference_impl/README.md",
        )
    ),
    *REFS,
]
LINKED = [*REFS, *(ROOT / page for page in sorted(TOP_PAGES)), ROOT / "reference_impl/reports/README.md"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read_repository(path: str) -> str | None:
    file = ROOT / path
    if not file.is_file():
        return None
    return file.read_text(encoding="utf-8") if file.suffix == ".md" else ""


@cache
def repro_help(command: str) -> str | None:
    if command not in cli.COMMANDS:
        return None
    told = io.StringIO()
    with redirect_stdout(told), pytest.raises(SystemExit):
        cli.parser(command).parse_args([command, "--help"])
    return told.getvalue()


def refusal(words: list[str]) -> str | None:
    """What `repro` says to these words before it would begin; None when it would begin."""
    told = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(told):
            options = cli.parser(words[0]).parse_args(words)
        project = find_project(ROOT)
        overrides = command_line.overrides(options) if hasattr(options, "overrides") else []
        for name in command_line.names(project, getattr(options, "experiments", [])):
            checked_plan(project, name, overrides)
    except BadInput as error:
        return error.problems[-1]
    except SystemExit as end:
        return told.getvalue().strip().splitlines()[-1] if end.code else None
    return None


def mistake_tests() -> dict[str, str]:
    return {relative(path): path.read_text(encoding="utf-8") for path in (ROOT / "tests/mistakes").glob("test_*.py")}


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_python_blocks_run(page, tmp_path):
    assert failing_python(page.read_text(encoding="utf-8"), tmp_path) == []


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert unknown_make_targets(text, targets) + unknown_repro_commands(text, repro_help) == []


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_commands_name_experiments_and_settings_that_exist(page):
    assert refused_commands(page.read_text(encoding="utf-8"), refusal) == []


def test_the_makefile_runs_experiments_and_settings_that_exist():
    targets = ["demo", "reproduce-2d", "reproduce-digits", "reproduce-mnist-reduced"]
    shown = ["make", "--dry-run", "VENV=unmade", "--assume-old=unmade/.ready", *targets]
    recipe = subprocess.run(shown, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    text = block("bash", *recipe.splitlines())
    assert {words[0] for words in repro_commands(text)} == {"run", "report"}
    assert refused_commands(text, refusal) + unknown_repro_commands(text, repro_help) == []


@pytest.mark.parametrize("page", LINKED, ids=relative)
def test_links_and_paths_resolve(page):
    text = page.read_text(encoding="utf-8")
    assert (
        broken_links(text, relative(page), read_repository)
        + missing_paths(
            text, lambda path: any(any(folder.glob(path.rstrip("/"))) for folder in (ROOT, page.parent / "project"))
        )
        == []
    )


def test_catalogue_is_complete():
    learning, skill = ((ROOT / name).read_text(encoding="utf-8") for name in ("LEARNING.md", "SKILL.md"))
    assert catalogue_problems(learning, mistake_tests(), skill, [relative(page) for page in REFS]) == []


def test_what_follows_from_the_entries_is_written_down():
    stale = [relative(path) for path, text in catalogue.pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run make catalogue"


def test_the_template_of_an_entry_passes_the_lint():
    page = (ROOT / "refs/contributing-a-lesson.md").read_text(encoding="utf-8")
    ((_, entry),), ((_, proof),) = fences(page, "md"), fences(page, "py")
    (found,) = catalogue.entries(entry)
    skill = (ROOT / "SKILL.md").read_text(encoding="utf-8")
    tests = {"tests/mistakes/test_m99_same_draws.py": proof}
    assert entry_problems(found, tests, found.principles, skill, [relative(path) for path in REFS]) == []


def test_the_template_of_a_proof_proves(tmp_path):
    ((_, proof),) = fences((ROOT / "refs/contributing-a-lesson.md").read_text(encoding="utf-8"), "py")
    (tmp_path / "test_m99_same_draws.py").write_text(proof)
    for name in ("conftest.py", "proof.py"):
        shutil.copyfile(ROOT / "tests/mistakes" / name, tmp_path / name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


def test_every_page_is_in_the_navigation():
    pages = TOP_PAGES | {f"{folder}{name}.md" for folder in REPORTS for name in ("README", "note", "checklist")}
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


def test_the_reading_list_of_the_reference_implementation_names_every_module_and_no_other():
    folder = ROOT / "reference_impl"
    listed = re.findall(r"`nsgf/(\w+)\.py`", (folder / "README.md").read_text())
    assert sorted(listed) == sorted(path.stem for path in (folder / "nsgf").glob("[!_]*.py"))
