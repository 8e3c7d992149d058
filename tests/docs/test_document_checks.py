"""Each check of the documents on a text with the fault planted, which it must report, and on a sound one."""

from __future__ import annotations

from textwrap import indent

import catalogue
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


def test_a_block_inside_of_details_is_run_and_reported_with_its_line(tmp_path):
    hidden = indent(block("python", "if True:", "    assert False, 'planted'"), "    ")
    assert failing_python(f"Question.\n\n??? answer\n\n    Text.\n\n{hidden}", tmp_path) == [
        "line 11: AssertionError: planted"
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
    there = {"templates/reproduction/repro/rounds.py", "tests/x.py"}
    assert missing_paths("`repro/rounds.py` `tests/x.py` `tests/mistakes/test_mNN_x.py`", there.__contains__) == []
    assert missing_paths("`repro/lost.py` `repro_tools/lost.py` `tests/y.py`", there.__contains__) == [
        "repro/lost.py: no such file",
        "repro_tools/lost.py: no such file",
        "tests/y.py: no such file",
    ]


ENTRY = {
    "Severity": "critical", "What": "It broke.", "Symptom": "`Error: x`", "Impact": "A day.", "Root cause": "Haste.", "Prevention": "A test.",
    "Fix": "Done.", "Rule": "[Test](SKILL.md#1-test), [page](refs/page.md)", "Principle": "[p01](#p01)", "Evidence": "Field notes.",
    "Test": "`tests/mistakes/test_m01_x.py`, red with `it moved away`",
}  # fmt: skip
MARKS = "<!-- measured:sinkhorn -->\n<!-- /measured:sinkhorn -->\n"
FILE = "tests/mistakes/test_m01_x.py"
PROOF = '"""m01: it broke."""\n# only a comment\nPROOFS = [Proof(check, {plant: "it moved away"}, [innocent])]\ndef test_proof(case):\n    case()\n'
SKILL_OF_ONE_RULE = "# Skill\n\n## 1. Test\n"


def learning(
    marks: str = MARKS,
    heading: str = "m01 It broke {#m01}",
    principles: str = "### p01 Test {#p01}\n\nTest.\n",
    **changes: str,
) -> str:
    fields = {**ENTRY, **{name.replace("_", " "): value for name, value in changes.items()}}
    lines = "\n".join(f"- **{name}**: {value}" for name, value in fields.items())
    return f"## Mistakes\n\n### {heading}\n\n{lines}\n\n## Principles\n\n{principles}\n## Memory\n\n{marks}"


def problems_of(text: str, proof: str = PROOF, skill: str = SKILL_OF_ONE_RULE, **more: str) -> list[str]:
    return catalogue_problems(text, {FILE: proof, **more}, skill, ["refs/page.md"])


def test_a_complete_catalogue_passes():
    assert problems_of(learning()) == []


@pytest.mark.parametrize(
    "changes, problem",
    [
        *(({field.replace(" ", "_"): ""}, f"m01: no field '{field}'") for field in FIELDS),
        ({"Remedy": "Care."}, "m01: field 'Remedy' is not one of the form"),
        ({"Severity": "bad"}, "m01: severity is neither"),
        ({"Severity": "low enough"}, "m01: severity is neither"),
        ({"Symptom": "Bad with `x`."}, "m01: the symptom quotes no message"),
        ({"Rule": "[Care](SKILL.md#1-test), [page](refs/page.md)"}, "m01: the rule is called 'Care'"),
        ({"Fix": "Done\nat last."}, "m01: a line of the fields is none of"),
        ({"Fix": "Done.\n- **Impact**: Two days."}, "m01: field 'Impact' stands twice"),
        ({"Test": f"`{FILE}`, red with `it`"}, "m01: the reason for red stands in no text"),
        ({"Test": f"`{FILE}`, red with `only a comment`"}, "m01: the reason for red stands in no text"),
        ({"Symptom": "It stops."}, "m01: the symptom quotes no message"),
        ({"Rule": "Be careful."}, "m01: the rule links to no section"),
        ({"Rule": "[Test](SKILL.md#9-test), [page](refs/page.md)"}, "m01: the rule links to no section"),
        ({"Rule": "[Test](SKILL.md#1-test)"}, "m01: the rule names no page"),
        ({"Rule": "[Test](SKILL.md#1-test), [page](refs/other.md)"}, "m01: the rule names no page"),
        ({"Principle": "[p09](#p09)"}, "m01: the principle links to none"),
        ({"Evidence": "Everybody knows."}, "m01: the evidence has none of the labels"),
        ({"Test": "`tests/mistakes/test_m01_y.py`, red with `it moved away`"}, "m01: no test file of that name"),
        ({"Test": "by hand"}, "m01: no test file of that name"),
        ({"Test": f"`{FILE}`"}, "m01: the reason for red stands in no text of the test's code: none named"),
        (
            {"Test": f"`{FILE}`, red with `it stood still`"},
            "m01: the reason for red stands in no text of the test's code: it stood",
        ),
        ({"heading": "m02 It broke {#m02}"}, "entries: found 1 headings and 1 with an id that fits, 'm02' out of line"),
        (
            {"heading": "m01 It broke {#m1}"},
            "entries: found 1 headings and 1 with an id that fits, 'm01 with id m1' out of line",
        ),
        ({"heading": "m01 It broke"}, "entries: found 1 headings and 0 with an id"),
        ({"principles": "### p01 Test {#p01}\n\nTest.\n\n### p02 Haste {#p02}\n\nHaste.\n"}, "p02: no entry names it"),
        ({"marks": ""}, "the place of the measured"),
        ({"marks": MARKS + MARKS}, "the place of the measured"),
    ],
)
def test_catalogue_problems(changes, problem):
    assert any(line.startswith(problem) for line in problems_of(learning(**changes)))


def test_fields_in_another_order_are_reported():
    first, second = (f"- **{name}**: {ENTRY[name]}\n" for name in ("Severity", "What"))
    swapped = learning().replace(first + second, second + first)
    assert [line.split(" than")[0] for line in problems_of(swapped)] == ["m01: fields in another order"]


@pytest.mark.parametrize(
    "proof, problem",
    [
        (PROOF.replace("m01: it", "It"), "its docstring does not begin with 'm01: '"),
        (PROOF.replace("PROOFS", "EVIDENCE"), "no PROOFS with a Proof in it"),
        (
            PROOF.replace('[Proof(check, {plant: "it moved away"}, [innocent])]', '[]\nREASON = "it moved away"'),
            "no PROOFS with a Proof in it",
        ),
        (PROOF.replace("test_proof", "test_it"), "no test_proof that calls case()"),
        (PROOF.replace("    case()", "    pass"), "no test_proof that calls case()"),
        (PROOF + "import time\ntime.sleep(1)\n", "line 6 asks the clock"),
        (PROOF + "from time import sleep\n", "line 6 asks the clock"),
    ],
)
def test_a_proof_of_another_form_is_reported(proof, problem):
    assert problems_of(learning(), proof) == [f"m01: {FILE}: {problem}"]


def test_a_proof_that_is_no_python_is_reported():
    assert problems_of(learning(), "def") == [f"m01: {FILE}: is no Python"]


def test_an_entry_among_the_principles_is_reported():
    moved = learning() + "\n### m02 It hung {#m02}\n\n- **Severity**: low\n"
    assert "m02: stands outside of 'Mistakes'" in problems_of(moved)


def test_two_entries_of_one_title_are_reported():
    again = learning().replace("## Principles", "### m02 It broke {#m02}\n\n## Principles")
    assert "two entries have the title 'It broke'" in problems_of(again)


def test_a_test_without_an_entry_is_reported():
    other = "tests/mistakes/test_m02_x.py"
    assert problems_of(learning(), **{other: PROOF}) == [f"{other}: no entry in LEARNING.md"]


def test_a_rule_without_an_entry_is_reported():
    assert problems_of(learning(), skill=SKILL_OF_ONE_RULE + "\n## 2. Care\n") == [
        "SKILL.md#2-care: a rule that no entry leads to"
    ]


# --- what is made from the entries ---------------------------------------------------------------------------------


def test_the_index_is_in_the_order_of_the_rules():
    second = "### m02 It hung {#m02}\n\n- **Severity**: low, mostly\n- **Rule**: [Read](SKILL.md#0-read)\n\n"
    text = learning().replace("## Principles", second + "## Principles")
    assert catalogue.index(text).splitlines()[2:] == [
        "| [Read](SKILL.md#0-read) | [m02](#m02) It hung | low |",
        "| [Test](SKILL.md#1-test) | [m01](#m01) It broke | critical |",
    ]


def test_a_principle_gets_the_mistakes_that_name_it():
    made = catalogue.learning_page("<!-- index -->\n<!-- /index -->\n" + learning())
    assert "Test.\n\nMistakes: [m01](#m01).\n" in made and catalogue.learning_page(made) == made


def test_a_page_gets_the_mistakes_that_lead_to_it_and_loses_others():
    page = "# Page\n\nText.\n"
    made = catalogue.reference_page("refs/page.md", page, learning())
    assert made.endswith("- [m01](../LEARNING.md#m01) It broke\n\n<!-- /mistakes -->\n")
    assert catalogue.reference_page("refs/page.md", made, learning()) == made
    assert catalogue.reference_page("refs/other.md", made, learning()).rstrip() == page.rstrip()


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
