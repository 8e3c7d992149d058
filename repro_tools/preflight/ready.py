"""What a process of `repro preflight` begins with. Processes are copies of one that has imported this, and nothing has run in it."""

from contextlib import suppress
from pathlib import Path

import repro_tools.preflight.command  # noqa: F401
from repro.method import find_project

with suppress(Exception):  # what is wrong with the method is said in the rows
    find_project(Path.cwd())
