"""A rendered project trains where only what the engine needs is installed: no tools, nothing that draws."""

import json

import pytest
from rendering import in_project_alone

BLOCKED = ("repro_tools", "matplotlib", "markdown", "nbformat", "scipy")
ALONE = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None  # its import fails from now on
from repro.__main__ import main
"""
STOPPED = """
from method.method import METHOD

def stop(*given):
    raise KeyboardInterrupt

object.__setattr__(METHOD, "evaluate", stop)
"""
RUN = "raise SystemExit(main(['run', 'main', '--seeds', '0', '--resume', '--device', 'cpu']))"


def test_a_run_begins_resumes_and_writes_its_record_without_the_tools(project):
    made = project()
    record = made / "runs/main/seed-0/record.json"
    first = in_project_alone(made, "-c", ALONE + STOPPED + RUN)
    assert first.returncode == 130 and not record.exists(), first.stderr
    second = in_project_alone(made, "-c", ALONE + RUN)
    assert second.returncode == 0 and "goes on at the evaluation" in second.stderr, second.stderr
    written = json.loads(record.read_text())
    assert written["metrics"] and "claims" not in written
    assert written["method_placeholder"].startswith("the toy phases") and len(written["spec_sha256"]) == 64


@pytest.mark.parametrize("name", BLOCKED[:2])
def test_the_block_blocks(project, name):
    done = in_project_alone(project(), "-c", f"{ALONE}\nimport {name}")
    assert "ModuleNotFoundError" in done.stderr
