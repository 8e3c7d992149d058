"""Each check of the documents on a text with the fault planted, which it must report, and on a sound one."""

from __future__ import annotations

import pytest
from document_checks import (
    FIELDS,
    block,
    broken_links,
    catalogue_problems,
    failing_python,
    make_targets,
    missing_paths,
    navigation_problems,
    refused_commands,
    skill_problems,
    unknown_make_targets,
    unknown_repro_commands,
    unknown_settings,
)
from test_documents import refusal


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


def test_refused_commands():
    text = block("bash", "repro run a --set b=1", "repro report --runs c", "torchrun -m repro run d")
    assert refused_commands(text, lambda words: "no b" if words[1] == "a" else None) == ["repro run a --set b=1: no b"]


@pytest.mark.parametrize(
    "command, problem",
    [
        ("run 2d-* digits --train-iters 5", None),
        ("run digits --device cuda:9", None),
        ("run digit", "found no experiment 'digit'"),
        ("run digits --set phases.*.pol.batches=2", "did you mean 'phases.*.pool.batches'?"),
        ("run digits --seeds -1", "expected a whole number"),
        ("report --run here", "unrecognized arguments: --run here"),
    ],
)
def test_what_a_command_is_refused_for(command, problem):
    told = refusal(command.split())
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
    assert missing_paths("`repro/memory/command.py` `tests/y.py`", there.__contains__) == [
        "repro/memory/command.py: no such file",
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
