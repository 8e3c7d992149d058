"""Renders the template: from a repository that holds what copier reads of this one, as its files are now."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import copier
import warm
from forked import LONGEST_S

ROOT = Path(__file__).parents[2]
PRESETS = ("generic", "generative", "classification")
SEEN_BY_COPIER = ("copier.yml", "LICENSE", "templates")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def copy_template(folder: Path) -> None:
    """Puts the template, as it is now, into `folder`, where no other may lie."""
    for name in SEEN_BY_COPIER:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy(source, folder / name)


def make_template(folder: Path) -> Path:
    """A repository with the template as it is now, in one commit."""
    folder.mkdir(parents=True)
    copy_template(folder)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "template")
    return folder


def render(template: Path, destination: Path, **answers) -> Path:
    """The project that `answers` give, everything else by default. Raises ValueError for an answer that is refused."""
    copier.run_copy(str(template), destination, data=answers, defaults=True, quiet=True, vcs_ref="HEAD")
    return destination


def in_project(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python ...` in a project, with one thread and the project's own engine. Libraries are imported beforehand."""
    return warm.python(arguments, project, one_thread())


def in_project_alone(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The same in a process that has imported nothing beforehand, which takes seconds."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=project, capture_output=True, text=True, env=one_thread(), timeout=LONGEST_S
    )


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
