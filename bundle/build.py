"""Builds the skill that is installed: one folder that stands by itself, and a zip of it. `python -m bundle.build` (make skill).

The folder holds the rules, the catalogue, the reference pages, the tutorial and what copier reads. Tests, reports and the reference implementation
stay in the repository: a link of a shipped page to one of their files becomes the path in code font.
"""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from collections.abc import Collection
from fnmatch import fnmatch
from os.path import dirname, join, normpath
from pathlib import Path

from bundle.lint import PAGES, problems
from repro.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RUN_FAILED, BadInput

ROOT = Path(__file__).parents[1]
OUT = ROOT / "dist"
NAME = "paper-reproduction"
CONTENTS = (
    *PAGES,
    "LICENSE",
    "pyproject.toml",
    "copier.yml",
    "repro_tools/**/*",
    "templates/**/*",
    "tutorial/**/*",
    "tests/methods/*.py",
)
CACHES = ("__pycache__", "*.py[co]", "*.egg-info", ".*_cache", ".ipynb_checkpoints", ".DS_Store")
LEFT_OUT = ("benchmarks", "reference_impl", "tests")
"""Folders of the repository that shipped pages name."""

NOTE = f"""
## This copy

This folder is an installed copy. Paths that begin with {", ".join(f"`{name}/`" for name in LEFT_OUT)} name files of the repository, which
are not here, but for the complete methods in `tests/methods/`.
"""

CODE_OR_LINK = re.compile(
    r"^ *(?P<fence>`{3,}).*?^ *(?P=fence)`* *$|`[^`\n]*`|!?\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)
UNIX, PLAIN_FILE = 3, 0o100644


def shipped(root: Path) -> list[str]:
    """The files of the skill, as paths below the repository `root`, sorted. Raises BadInput where a part of them is missing."""
    found = {pattern: [path for path in root.glob(pattern) if path.is_file()] for pattern in CONTENTS}
    empty = [pattern for pattern, paths in found.items() if not paths]
    if empty:
        raise BadInput(*(f"{root}: found no {pattern}; expected the root of the repository" for pattern in empty))
    names = {path.relative_to(root).as_posix() for paths in found.values() for path in paths}
    return sorted(name for name in names if not any(_is_cache(part) for part in name.split("/")))


def _is_cache(part: str) -> bool:
    return any(fnmatch(part, pattern) for pattern in CACHES)


def standing_alone(text: str, page: str, files: Collection[str]) -> str:
    """The text of `page` with every link to a file outside of `files` turned into words and the path from the repository's root."""

    def link_or_path(match: re.Match) -> str:
        target = match["target"]
        if target is None or re.match(r"[a-z]+:", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        linked = normpath(join(dirname(page), path)) if path else page
        return match[0] if linked in files else f"{match['words']} (`{linked}{mark}{anchor}` in the repository)"

    return CODE_OR_LINK.sub(link_or_path, text)


def build(root: Path, out: Path) -> Path:
    """Writes the skill of the repository `root` to a folder below `out`, anew, and returns that folder."""
    files = shipped(root)
    skill = out / NAME
    if skill.exists():
        shutil.rmtree(skill)
    pages = {path for pattern in PAGES for path in root.glob(pattern)}
    for name in files:
        target = skill / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if root / name in pages:
            text = standing_alone((root / name).read_text(encoding="utf-8"), name, files)
            target.write_text(text + NOTE if name == "SKILL.md" else text, encoding="utf-8", newline="\n")
        else:
            shutil.copyfile(root / name, target)
    return skill


def archive(skill: Path, file: Path) -> None:
    """Packs the folder `skill` into a zip whose bytes follow from names and contents alone.

    Its files are stored and not deflated: what deflate writes depends on the version of zlib.
    """
    paths = {path.relative_to(skill.parent).as_posix(): path for path in skill.rglob("*") if path.is_file()}
    with zipfile.ZipFile(file, "w") as packed:
        for name in sorted(paths):
            entry = zipfile.ZipInfo(name)  # dated 1980-01-01
            entry.create_system, entry.external_attr = UNIX, PLAIN_FILE << 16
            packed.writestr(entry, paths[name].read_bytes())


def main() -> int:
    """Builds and checks the skill. A zip is there afterwards only if no fault was found."""
    zipped = OUT / f"{NAME}.zip"
    zipped.unlink(missing_ok=True)
    try:
        skill = build(ROOT, OUT)
    except BadInput as error:
        print(*(f"bundle: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return EXIT_BAD_INPUT
    faults = problems(skill)
    if faults:
        print(*(f"bundle: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        return EXIT_RUN_FAILED
    archive(skill, zipped)
    print(skill, zipped, sep="\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
