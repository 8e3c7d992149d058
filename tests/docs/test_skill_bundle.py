"""The skill that `make skill` builds: installed alone it has everything that its pages name, and its lint refuses what would break it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from document_checks import anchors, missing_paths
from forked import LONGEST_S

from bundle import build, lint
from repro.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RUN_FAILED

ROOT = Path(__file__).parents[2]
HOMES = (".claude/skills", ".agents/skills")
"""Where Claude Code and Codex look for a user's skills (https://code.claude.com/docs/en/skills, https://developers.openai.com/codex/skills)."""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, env=environment, timeout=LONGEST_S
    )


def validate(skill: Path) -> subprocess.CompletedProcess:
    """The public validator, from PyPI's skills-ref."""
    return run("skills_ref.cli", "validate", str(skill), cwd=skill.parent)


def read_json(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def skill(tmp_path_factory) -> Path:
    return build.build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module", params=HOMES)
def installed(skill, request, tmp_path_factory) -> Path:
    """The skill in a home of its own: copied for one client, unzipped for the other."""
    place = tmp_path_factory.mktemp("home") / request.param
    place.mkdir(parents=True)
    if request.param == HOMES[0]:
        shutil.copytree(skill, place / build.NAME)
    else:
        zipped = place.parent / "skill.zip"
        build.archive(skill, zipped)
        with zipfile.ZipFile(zipped) as packed:
            packed.extractall(place)
    return place / build.NAME


def pages(skill: Path) -> dict[str, str]:
    paths = [path for pattern in lint.PAGES for path in skill.glob(pattern)]
    return {path.relative_to(skill).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_installed_skill_passes_the_validator_and_the_lint(installed):
    told = validate(installed)
    assert told.returncode == 0, told.stderr
    assert lint.problems(installed) == []


def test_the_validator_refuses_another_folder(skill, tmp_path):
    told = validate(shutil.copytree(skill, tmp_path / "my-clone"))
    assert told.returncode == 1 and "must match skill name" in told.stderr


def test_links_of_an_installed_skill_lead_to_headings_that_are_there(installed):
    texts = pages(installed)
    ids = {page: anchors(text) for page, text in texts.items()}
    broken = [
        f"{page}: {target}"
        for page, text in texts.items()
        for linked, target in lint.links(text, page)
        if "#" in target and target.partition("#")[2] not in ids.get(linked, ())
    ]
    assert broken == []


def test_paths_in_code_font_are_in_the_installed_skill_or_said_to_be_elsewhere(installed):
    texts = pages(installed)
    said = re.findall(r"`(\w+)/`", texts["SKILL.md"].partition("\n## This copy\n")[2])
    assert said == list(build.LEFT_OUT)

    def there(path: str) -> bool:
        elsewhere = [ROOT, installed / "tutorial/project"] if path.split("/")[0] in said else []
        return any(any(home.glob(path.rstrip("/"))) for home in (installed, *elsewhere))

    assert {page: missing_paths(text, there) for page, text in texts.items()} == {page: [] for page in texts}


@pytest.mark.parametrize("installed", HOMES[1:], indirect=True)
def test_copier_renders_a_green_project_from_an_installed_skill(installed, tmp_path):
    project = tmp_path / "my-paper"
    rendered = run("copier", "copy", "--defaults", "--quiet", str(installed), str(project), cwd=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    flight = run("repro_tools", "preflight", cwd=project)
    assert flight.returncode == EXIT_OK, flight.stdout + flight.stderr


def test_the_zip_holds_the_folder_and_two_builds_give_the_same_bytes(tmp_path):
    one, two = (build.build(ROOT, tmp_path / name) for name in ("one", "two"))
    for path in [two / "SKILL.md", two / "templates/README.md"]:
        os.utime(path, (10**9, 10**9))
        path.chmod(0o600)
    for folder in (one, two):
        build.archive(folder, folder.with_suffix(".zip"))
    assert one.with_suffix(".zip").read_bytes() == two.with_suffix(".zip").read_bytes()
    with zipfile.ZipFile(one.with_suffix(".zip")) as packed:
        unpacked = {name.removeprefix(f"{build.NAME}/"): packed.read(name) for name in packed.namelist()}
    assert unpacked == contents(one)


def test_a_build_leaves_nothing_of_the_one_before(tmp_path):
    (tmp_path / build.NAME / "refs").mkdir(parents=True)
    (tmp_path / build.NAME / "refs/gone.md").write_text("# Gone\n")
    assert not (build.build(ROOT, tmp_path) / "refs/gone.md").exists()


def small_repository(folder: Path) -> Path:
    """One file for each thing that the builder ships, none of them as it should be."""
    for name in (
        "SKILL.md",
        "LEARNING.md",
        "refs/index.md",
        "templates/README.md",
        "tutorial/README.md",
        "LICENSE",
        "pyproject.toml",
        "repro_tools/__init__.py",
        "copier.yml",
        "tests/methods/wgan_gp.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# Page\n")
    return folder


def test_caches_are_not_shipped(tmp_path):
    root = small_repository(tmp_path)
    before = build.shipped(root)
    for cache in ("templates/__pycache__/a.txt", "templates/x/.ruff_cache/b.txt", "templates/c.pyc"):
        (root / cache).parent.mkdir(parents=True, exist_ok=True)
        (root / cache).write_text("")
    assert build.shipped(root) == before


def test_nothing_is_shipped_that_git_ignores():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(build.shipped(ROOT)) - set(listed.stdout.split("\0")) == set()


@pytest.mark.parametrize(
    "line, expected",
    [
        ("see [the memory](memory.md#fits)", "see [the memory](memory.md#fits)"),
        ("see [the\nresults](../reports/a.md).", "see the\nresults (`reports/a.md` in the repository)."),
        ("[`b` of it](../reports/a.md#b)", "`b` of it (`reports/a.md#b` in the repository)"),
        ("![A curve](../plots/a.png)", "A curve (`plots/a.png` in the repository)"),
        ("[here](#fits), [there](https://example.org/a.md)", "[here](#fits), [there](https://example.org/a.md)"),
        ("`models[0](x)` and `[a](b.md)`", "`models[0](x)` and `[a](b.md)`"),
        ("```python\nmodels[0](x)\n```", "```python\nmodels[0](x)\n```"),
        ("````md\n```\n[a](b.md)\n```\n````", "````md\n```\n[a](b.md)\n```\n````"),
    ],
)
def test_links_out_of_the_skill_become_paths_and_code_is_left_alone(line, expected):
    assert build.standing_alone(line, "refs/page.md", {"refs/page.md", "refs/memory.md"}) == expected


def edited(page: str, old: str, new: str):
    """A defect: the first match of the pattern `old` in `page` becomes `new`."""

    def plant(skill: Path) -> None:
        text = (skill / page).read_text(encoding="utf-8")
        changed = re.sub(old, lambda match: new, text, count=1, flags=re.DOTALL)
        assert changed != text, "nothing was planted"
        (skill / page).write_text(changed, encoding="utf-8")

    return plant


def added(page: str, text: str):
    return lambda skill: (skill / page).write_text((skill / page).read_text(encoding="utf-8") + text, encoding="utf-8")


def deep_page(skill: Path) -> None:
    (skill / "refs/deep").mkdir()
    (skill / "refs/deep/page.md").write_text("# Deep\n\nRead this when it is deep.\n")
    added("SKILL.md", "\n[deep](refs/deep/page.md)\n")(skill)


DESCRIPTION = r"description: .*?(?=\n\w+:|\n---\n)"
DEFECTS = {
    "another name": (edited("SKILL.md", r"name: [\w-]+", "name: paper-copying"), "expected the name of the folder"),
    "a long description": (edited("SKILL.md", DESCRIPTION, f"description: {'Reproduce a paper. ' * 60}"), "1 to 1024"),
    "no description": (edited("SKILL.md", DESCRIPTION, "description: ''"), "found 0 characters"),
    "a description that begins with something else": (
        edited("SKILL.md", DESCRIPTION, f"description: {'A careful collection. ' * 8} It helps to reproduce a paper."),
        "first 150 characters",
    ),
    "a rule in the front matter": (edited("SKILL.md", DESCRIPTION, "description: Reproduce a paper --- well"), "short"),
    "a key that is not allowed": (
        edited("SKILL.md", "license: MIT", "version: 1"),
        "keys that are not allowed: version",
    ),
    "markup in the front matter": (edited("SKILL.md", DESCRIPTION, "description: Reproduce a <b>paper</b>"), "angle"),
    "flow style": (edited("SKILL.md", r"metadata:\n  [^\n]+", "metadata: {version: '1'}"), "flow style"),
    "a version that is a number": (edited("SKILL.md", r"version: \S+", "version: 0.1"), "metadata: expected"),
    "a long compatibility": (
        edited("SKILL.md", r"compatibility: [^\n]+", f"compatibility: {'x' * 501}"),
        "compatibility: found 501",
    ),
    "no front matter": (edited("SKILL.md", r"\A---\n", ""), "found no front matter"),
    "front matter that is no YAML": (edited("SKILL.md", DESCRIPTION, "description: reproduce: a paper"), "mapping"),
    "front matter without keys": (edited("SKILL.md", r"\A---\n.*?\n---\n", "---\ntext\n---\n"), "expected keys"),
    "a long body": (added("SKILL.md", " word" * 2500), "expected 800 to 2500"),
    "a short body": (edited("SKILL.md", r"(?<=\n---\n).*", "# Rules\n"), "expected 800 to 2500"),
    "no SKILL.md": (lambda skill: (skill / "SKILL.md").unlink(), "found no SKILL.md"),
    "a page that is gone": (lambda skill: (skill / "refs/spec.md").unlink(), "refs/spec.md: no such file in the skill"),
    "a link out of the skill": (added("refs/spec.md", "\n[the next skill](../../other/SKILL.md)\n"), "no such file"),
    "a link to a file of the machine": (added("refs/spec.md", "\n[there](file:///etc/hosts)\n"), "no such file"),
    "a page that is too deep": (deep_page, "deeper than one folder"),
    "a page that nothing leads to": (
        lambda skill: (skill / "refs/lost.md").write_text("# Lost\n\nRead this when it is lost.\n"),
        "refs/lost.md: neither SKILL.md nor refs/index.md",
    ),
    "an absolute path": (added("refs/spec.md", "\nSee `/home/me/papers/spec.yaml`.\n"), "/home/me: an absolute path"),
    "a path of Windows": (added("LEARNING.md", "\nSee C:\\Users.\n"), "an absolute path"),
    "a page without its occasion": (
        edited("refs/spec.md", "Read this when", "This page is for those who"),
        "does not begin with 'Read this when'",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_lint_refuses(defect, skill, tmp_path):
    plant, expected = DEFECTS[defect]
    spoilt = shutil.copytree(skill, tmp_path / build.NAME)
    plant(spoilt)
    assert [problem for problem in lint.problems(spoilt) if expected in problem]


def test_only_the_links_of_the_skill_itself_are_held_to_one_folder():
    files = {"templates/reproduction/repro/rounds.py"}
    assert lint.link_problems("[rounds](../templates/reproduction/repro/rounds.py)", "refs/memory.md", files) == []
    assert "deeper" in lint.link_problems("[rounds](templates/reproduction/repro/rounds.py)", "SKILL.md", files)[0]


def test_addresses_and_placeholders_are_no_absolute_paths():
    text = "https://example.org/home/me, ~/tmp/x, `copier copy /path/to/it`, a/opt/b, [x](https://example.org/var/log)"
    assert lint.path_problems(text, "refs/page.md") == []


def test_the_command_leaves_folder_and_zip(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "OUT", tmp_path / "dist")
    assert build.main() == EXIT_OK, capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "dist").iterdir()) == [build.NAME, f"{build.NAME}.zip"]


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "OUT", tmp_path / "dist")
    assert build.main() == EXIT_BAD_INPUT
    assert "found no SKILL.md; expected the root of the repository" in capsys.readouterr().err


def test_the_command_leaves_no_zip_of_a_skill_with_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", small_repository(tmp_path))
    monkeypatch.setattr(build, "OUT", tmp_path / "dist")
    (tmp_path / "dist").mkdir()
    zipped = tmp_path / f"dist/{build.NAME}.zip"
    zipped.write_text("of the build before")
    assert build.main() == EXIT_RUN_FAILED
    assert "found no front matter" in capsys.readouterr().err and not zipped.exists()


# The manifests. Claude Code: https://code.claude.com/docs/en/plugins-reference, where a plugin with SKILL.md at its root, no folder skills/
# and no key `skills` is one skill (from 2.1.142 on; some earlier versions refused the key with "./"). Codex:
# https://developers.openai.com/codex/plugins/build; its loader ignores `skills` when it is "./" (openai/codex, core-plugins/src/manifest.rs).


def test_the_manifests_call_the_skill_what_it_is_called():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    head = yaml.safe_load((ROOT / "SKILL.md").read_text(encoding="utf-8").split("---")[1])
    claude, codex = read_json(".claude-plugin/plugin.json"), read_json(".codex-plugin/plugin.json")
    entry = read_json(".claude-plugin/marketplace.json")["plugins"][0]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {cited["version"], project["version"], head["metadata"]["version"], claude["version"], codex["version"]} == {
        "0.2.0"
    }
    assert {project["name"], head["name"], claude["name"], codex["name"], entry["name"]} == {build.NAME}
    assert {manifest["description"] for manifest in (claude, codex, entry)} == {project["description"]}
    assert {project["license"], head["license"], claude["license"], codex["license"], cited["license"]} == {"MIT"}


def test_the_plugin_of_claude_code_is_the_root_of_the_repository():
    marketplace = read_json(".claude-plugin/marketplace.json")
    assert marketplace["name"] and marketplace["owner"]["name"]
    assert [entry["source"] for entry in marketplace["plugins"]] == ["./"]
    assert "skills" not in read_json(".claude-plugin/plugin.json") and not (ROOT / "skills").exists()
    assert (ROOT / "SKILL.md").is_file()


def test_the_plugin_of_codex_leads_to_what_is_built():
    (entry,) = read_json(".agents/plugins/marketplace.json")["plugins"]
    assert entry["name"] == build.NAME and entry["source"] == {"source": "local", "path": "./"}
    assert entry["policy"] == {"installation": "AVAILABLE", "authentication": "ON_INSTALL"} and entry["category"]
    skills = read_json(".codex-plugin/plugin.json")["skills"]
    assert skills.startswith("./") and ROOT / skills == build.OUT
