"""The project as a whole: what `repro preflight` looks at, on every test run. `repro preflight` shows it as a table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_A_RUN = "commit"
"""The row about changes that are not committed: while one works there are some."""


@pytest.fixture(scope="module")
def rows():
    command = [sys.executable, "-m", "repro_tools", "preflight", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)["rows"]


def test_preflight_finds_no_fault(rows):
    faults = [row for row in rows if row["status"] == "fail" and row["check"] != OF_A_RUN]
    assert not faults, "\n".join(f"{row['check']} {row['experiment']} {row['phase']}: {row['text']}" for row in faults)


def test_every_phase_was_killed_and_resumed(rows):
    resumed = [row for row in rows if row["check"] == "resume"]
    assert {row["status"] for row in resumed} == {"pass"}
