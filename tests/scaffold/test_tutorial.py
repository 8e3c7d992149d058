"""The tutorial: its steps, carried out as the page says. What the page shows of files and of outputs is what they are."""

import json
import re
import shlex
import shutil

import pytest
import yaml
from rendering import ROOT, in_project, render

from repro.config import flatten, read_yaml
from repro_tools.spec import claim_hashes, load_spec

PAGE = (ROOT / "tutorial/README.md").read_text(encoding="utf-8")
FILES = ROOT / "tutorial/project"
STEPS = re.split(r"^## \d\. ", PAGE, flags=re.MULTILINE)[1:]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text, language):
    return [body for found, body in FENCE.findall(text) if found == language]


def written(step):
    """The files that a step writes: those named in its paragraph "Writes `a`, `b`."."""
    paragraph = re.search(r"^Writes (.*?)\.(?:\s|$)(?!`)", step, re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", paragraph[1]) if paragraph else []


def run(project, line):
    """What a line of the page prints. `repro` is the tools on the project's own engine."""
    words = {"repro": ["-m", "repro_tools"], "pytest": ["-m", "pytest", "-p", "no:cacheprovider"]}
    command, _, fails = line.partition(" || ")
    program, *arguments = shlex.split(command)
    done = in_project(project, *words[program], *arguments)
    assert done.returncode == (1 if fails else 0), f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def outputs(template, tmp_path_factory):
    """What the commands of each step printed, in a project that is made step by step."""
    project = tmp_path_factory.mktemp("tutorial") / "forward-forward"
    answers = yaml.safe_load((ROOT / "tutorial/answers.yaml").read_text(encoding="utf-8"))
    found = []
    for step in STEPS:
        lines = [line for body in blocks(step, "sh") for line in body.splitlines()]
        if lines and lines[0].startswith("copier copy"):
            assert "--data-file tutorial/answers.yaml" in lines[0]
            render(template, project, **answers)
            lines = lines[2:]
        for name in written(step):
            shutil.copy(FILES / name, project / name)
        found.append("".join(run(project, line) for line in lines))
    return found


def test_every_file_of_the_tutorial_is_written_by_one_step():
    steps = [name for step in STEPS for name in written(step)]
    there = [path.relative_to(FILES) for path in FILES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(steps) == sorted(path.as_posix() for path in there if path.parts[0] != "reports")


def test_there_is_no_second_kit():
    assert not list((ROOT / "tutorial").rglob("repro"))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(STEPS)))
def test_the_commands_print_what_the_page_shows(outputs, number):
    printed = [" ".join(line.split()) for line in outputs[number].splitlines()]
    for line in (line for body in blocks(STEPS[number], "text") for line in body.splitlines()):
        shown = " ".join(line.split())
        assert any(one.startswith(shown) for one in printed), line


@pytest.mark.parametrize("language", ["py", "yaml"])
def test_what_the_page_shows_of_files_stands_there(language):
    texts = [path.read_text(encoding="utf-8") for path in FILES.rglob(f"*.{language}")]
    for body in blocks(PAGE, language):
        assert any(body in text for text in texts), body


@pytest.mark.slow
def test_a_project_can_be_judged_after_the_last_step(outputs):
    assert re.search(r"^ +\d (reproduced|close|not reproduced)", "".join(outputs), re.MULTILINE)


def records():
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((FILES / "reports/records").glob("*.json"))]


def test_the_committed_runs_were_made_with_the_files_that_lie_there():
    spec = load_spec(FILES / "spec.yaml")
    assert {(one["experiment"], one["seed"]) for one in records()} == {
        (name, seed) for name in ("digits", "mnist") for seed in spec.seeds
    }
    for record in records():
        assert record["claims"] == claim_hashes(spec, record["experiment"])
        assert (record["departures"], record["placeholders"]) == ([], [])
        config = read_yaml(FILES / "configs" / f"{record['experiment']}.yaml")
        assert flatten(record["config"]) == flatten(config)


def test_the_page_says_what_came_out():
    judged = json.loads((FILES / "reports/results.json").read_text(encoding="utf-8"))["claims"]
    came_out = " ".join(STEPS[6].split())
    for claim in judged:
        row = re.search(rf"\| `{claim['id']}` \|.*?\| ([\d.]+) ± ([\d.]+) \| (\w+(?: \w+)?) \|", came_out)
        assert row, claim["id"]
        assert float(row[1]) == pytest.approx(claim["reproduced"]["mean"], abs=0.006)
        assert float(row[2]) == pytest.approx(claim["reproduced"]["spread"], abs=0.006)
        assert row[3] == claim["verdict"]
