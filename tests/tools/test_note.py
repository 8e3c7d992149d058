"""The three-page note and the checklist: what is generated follows from spec and records, what a person wrote is never lost."""

import copy
import json

import pytest
from toy_project import SPEC, write_yaml

from repro.config import validate
from repro.errors import BadInput
from repro_tools.cli import main
from repro_tools.report.checklist import QUESTIONS, checklist
from repro_tools.report.judge import judge_all
from repro_tools.report.markup import words, written_by_hand
from repro_tools.report.note import HAND_WRITTEN, PAGE_WORDS, PAGES, write_note
from repro_tools.report.results import Results, group_runs
from repro_tools.spec import Spec, claim_hashes


def spec(claims=1, **changes):
    data = copy.deepcopy(SPEC) | changes
    one = data["claims"][0]
    data["claims"] += [one | {"id": f"constant-{number}"} for number in range(2, claims + 1)]
    return validate(Spec, data, "spec.yaml")


def results(one, *values, sections="", **more):
    records = [
        {
            "experiment": "toy", "seed": seed, "metrics": {"constant.value": value}, "departures": [], "claims": claim_hashes(one, "toy"),
            "commit": "abc", "config_hash": "def", "machine": {"processor": "p", "cores": 2, "device": "cpu"},
            "command": f"repro run toy --seeds {seed}", "wall_s": {"line": 1800.0}, "versions": {"python": "3.11", "torch": "2.13"},
            "parameters": {"line": 25}, **more,
        }
        for seed, value in enumerate(values)
    ]  # fmt: skip
    return Results("Results", one, records, group_runs(records, []), judge_all(one, records), sections)


@pytest.fixture
def note(tmp_path):
    """The note of a project, as it would be written into an empty folder."""

    def made(one=None, *values, patterns=(), figure=None, **more):
        return write_note(
            results(one or spec(), *(values or (3.0, 3.1)), **more), tmp_path / "note.md", patterns, figure
        )

    return made


def section(page, title):
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_note_has_its_parts_in_order(note):
    titles = [line[3:] for line in note().page.splitlines() if line.startswith("## ")]
    assert titles == ["Claim", "Setup", "Result", "Deviations", "Gap analysis", "Surprises", "What not to conclude"]


def test_the_result_stands_beside_the_reported_value_with_its_interval(note):
    assert "| `constant` The constant is three. | 3.0 | 3.050 | 2.41 to 3.69 | 2 | reproduced |" in note().page


def test_one_seed_gets_no_interval(note):
    assert "| 3.0 | 3.00 |  | 1 | inconclusive |" in note(spec(), 3.0).page


def test_the_setup_says_time_machine_seeds_and_budget(note):
    told = section(note(spec(budget={"device": "L4", "hours": 24, "session_hours": 12})).page, "Setup")
    for part in (
        "2 runs took 1.0 hours on p, 2 cores",
        "Planned seeds: 0, 1",
        "networks of the last step",
        "24 hours on L4",
        "SEED",
    ):
        assert part in told


def test_less_than_an_hour_is_told_in_minutes_and_one_hour_has_no_s(note):
    budget = {"device": "this", "hours": 1, "session_hours": 0.5}
    told = section(note(spec(budget=budget), 3.0, 3.1, wall_s={"line": 300.0}).page, "Setup")
    assert "2 runs took 10 min on p" in told
    assert "The plan allowed 1 hour on the machine at hand, in sessions of 30 min." in told
    told = section(note(spec(budget=budget), 3.0, wall_s={"line": 2.0}).page, "Setup")
    assert "1 run took 2 s on p" in told


def test_what_only_a_person_knows_is_asked_for_and_not_invented(note):
    made = note()
    assert made.unwritten == list(HAND_WRITTEN)
    assert made.page.count("*Not written yet.") == len(HAND_WRITTEN)


def test_what_a_person_wrote_is_kept_when_the_note_is_written_again(note, tmp_path):
    first = note().page.replace(
        f"*Not written yet. {HAND_WRITTEN['surprises']}*", "The loss fell at once.\n\n- It was a bug."
    )
    (tmp_path / "note.md").write_text(first)
    again = note(spec(), 7.0, 7.1)
    assert "The loss fell at once.\n\n- It was a bug." in again.page and "surprises" not in again.unwritten
    assert "not reproduced" in again.page


def test_a_part_that_the_note_no_longer_asks_for_is_kept(note, tmp_path):
    (tmp_path / "note.md").write_text("<!-- yours: old -->\nMine.\n<!-- /yours: old -->\n")
    assert "Mine." in section(note().page, "Kept from an earlier version")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- yours: surprises -->\nMine.\n",
        "Mine.\n<!-- /yours: surprises -->\n",
        "<!-- yours: surprises -->\nMine.\n<!-- /yours: question -->\n",
        "<!-- yours: surprises -->\n<!-- yours: question -->\n<!-- /yours: question -->\n",
        2 * "<!-- yours: surprises -->\nMine.\n<!-- /yours: surprises -->\n",
    ],
)
def test_damaged_marks_are_refused_before_anything_is_lost(note, tmp_path, text):
    (tmp_path / "note.md").write_text(text)
    with pytest.raises(BadInput, match="note.md"):
        note()
    assert (tmp_path / "note.md").read_text() == text


def test_a_prompt_is_nobodys_text(note, tmp_path):
    (tmp_path / "note.md").write_text(note().page)
    assert written_by_hand(tmp_path / "note.md") == {}


def test_a_choice_of_claims_is_said_and_hides_no_verdict(note):
    made = note(spec(4), patterns=["constant-*"]).page
    assert "3 of the 4 claims that were tested, chosen by name (`constant-*`)" in made
    assert "All 4 claims: 4 reproduced." in made and "| `constant` " not in made


def test_a_pattern_that_matches_no_claim_is_refused(note):
    with pytest.raises(BadInput, match="--claims: found 'x-.', expected a claim of the spec: constant"):
        note(patterns=["x-*"])


def test_many_claims_are_counted_by_experiment_unless_they_are_chosen(note):
    made = note(spec(20)).page
    assert "| toy | 20 |" in made and "| `constant-2` " not in made


def long_spec(claims, length):
    deviations = [{"what": "We did it " + "otherwise " * length, "why": "Because " * length} for _ in range(10)]
    return spec(claims, deviations=deviations)


def test_the_note_gets_shorter_until_it_fits(note):
    short, long = note(long_spec(1, 10)), note(long_spec(1, 60))
    assert "Because" in short.page and "Because" not in long.page
    assert max(short.pages, long.pages) <= PAGES and not long.too_long


def test_a_note_that_cannot_fit_is_refused(note):
    with pytest.raises(BadInput, match="--claims: found 150 claims, expected fewer: the note would have"):
        note(spec(150), patterns=["*"])


def test_a_person_who_writes_too_much_is_told(note, tmp_path):
    (tmp_path / "note.md").write_text(
        f"<!-- yours: surprises -->\n{'word ' * PAGES * PAGE_WORDS}\n<!-- /yours: surprises -->\n"
    )
    made = note()
    assert made.too_long and made.page.count("word word") and "Because" not in made.page


@pytest.mark.parametrize(
    "text, count",
    [
        ("two words", 2),
        ("| a | 1 |\n| --- | --- |", 2),
        ("<!-- yours: x -->one<!-- /yours: x -->", 1),
        ("[two words](a/b.html) ![x](y z.png)", 3),
    ],
)
def test_words_are_counted_without_marks(text, count):
    assert words(text) == count


def test_the_figure_is_the_first_of_the_report(note, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "b.png").write_bytes(b"x")
    sections = "![Missing](figures/a.png)\n\n![Curves](figures/b.png)\n"
    assert "![Curves](figures/b.png)\n\n*Figure: Curves.*" in note(sections=sections).page
    ended = sections.replace("Curves", "The curves.")
    assert "*Figure: The curves.*" in note(sections=ended).page
    with pytest.raises(BadInput, match="--figure: found no file .*c.png"):
        note(sections=sections, figure="figures/c.png")


def test_the_gaps_of_the_claims_are_analysed(note):
    gap = {
        "claims": "constant",
        "cause": "Too few steps.",
        "evidence": "It still falls.",
        "ablation": "`repro run toy`",
    }
    told = section(note(spec(gaps=[gap]), 7.0, 7.1).page, "Gap analysis")
    assert "**Too few steps.** (1 claim) *Evidence*: It still falls. *What would tell*: `repro run toy`" in told
    assert "no cause is suspected: `constant`" in section(note(spec(), 7.0, 7.1).page, "Gap analysis")


@pytest.mark.parametrize(
    "values, expected",
    [
        ((7.0, 7.1), "Not reproduced (1 here) does not mean false"),
        ((4.0, 4.4), "Reproduced (1 here) does not mean certain: for 1 the interval reaches beyond the tolerance"),
        ((3.0, 7.0), "Inconclusive (1 here) speaks neither for the paper nor against it"),
        ((3.0, 3.1), "not shown by 2 seeds, where the interval of a mean reaches 9 standard deviations"),
    ],
)
def test_what_a_reader_must_not_conclude(note, values, expected):
    assert expected in section(note(spec(), *values).page, "What not to conclude")


def test_nothing_is_warned_of_that_is_not_there(note):
    told = section(note(spec(), 3.0, 3.0).page, "What not to conclude")
    assert "does not mean" not in told and "Inconclusive" not in told and "assumed" not in told


# --- the checklist ---------------------------------------------------------------------------------------------------


def answer(page, question):
    asks = next(one.asks for one in QUESTIONS if one.id == question)
    return page.split(f"**{asks}**\n\n")[1].split("\n**")[0].split("\n## ")[0].strip()


def test_the_checklist_answers_from_records(tmp_path):
    page = checklist(results(spec(), 3.0, 3.1), tmp_path / "checklist.md")
    assert "toy (R1): seeds 0, 1" in answer(page, "runs") and "2 runs" in answer(page, "runs")
    assert answer(page, "infrastructure") == "p, 2 cores."
    assert "30.0 minutes a seed" in answer(page, "runtime") and "Energy was not measured" in answer(page, "runtime")
    assert "python 3.11, torch 2.13" in answer(page, "dependencies")
    assert "standard deviation over the seeds (n = 2)" in answer(page, "error-bars")


def test_the_checklist_leaves_open_what_nothing_answers(tmp_path):
    page = checklist(results(spec()), tmp_path / "checklist.md")
    for question in ("runs", "infrastructure", "error-bars", "measure", "splits", "selection"):
        assert answer(page, question).startswith(f"<!-- yours: {question} -->\n*Not written yet.")
    assert ", splits, " in page.split("not at all: ")[1].splitlines()[0]


def test_settings_answer_the_item_that_they_name(tmp_path):
    setting = SPEC["settings"][0] | {"item": "evaluation protocol", "name": "test points"}
    page = checklist(results(spec(settings=[setting]), 3.0, 3.1), tmp_path / "checklist.md")
    assert answer(page, "measure") == "- test points (`toy`): 64. paper: page 1."


def test_answers_by_hand_are_kept_and_counted(tmp_path):
    path = tmp_path / "checklist.md"
    path.write_text(
        checklist(results(spec(), 3.0, 3.1), path).replace(
            "<!-- yours: splits -->\n*Not written yet. Neither the spec nor a record says it.*",
            "<!-- yours: splits -->\nEighty to twenty.",
        )
    )
    page = checklist(results(spec(), 3.0, 3.1), path)
    assert "Eighty to twenty." in answer(page, "splits") and "1 by hand" in page
    assert "splits" not in page.split("not at all: ")[1].splitlines()[0]


def test_no_two_questions_share_a_name():
    names = [question.id for question in QUESTIONS]
    assert len(set(names)) == len(names) == 23


def test_a_deviation_that_says_there_is_none_is_not_counted(note, tmp_path):
    none = [{"what": "None known.", "why": "It follows the paper."}]
    some = [*none, {"what": "Another network.", "why": "It fits."}]
    assert section(note(spec(deviations=none)).page, "Deviations").strip() == "None known."

    def described(deviations):
        return answer(checklist(results(spec(deviations=deviations)), tmp_path / "checklist.md"), "description")

    assert described(none) == "By the paper: the spec says that no deviation is known."
    assert "but for 1 deviation that" in described(some)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_what_is_asked_for_and_says_what_is_left_to_write(project, capsys):
    assert main(["report", "--note", "--checklist"]) == 0
    told = capsys.readouterr()
    assert {path.name for path in (project / "reports").iterdir()} == {
        "README.md",
        "results.json",
        "note.md",
        "checklist.md",
        "records",
    }
    assert "note.md: parts that only you can write: question, blind-phase, surprises" in told.err
    assert told.out.splitlines()[-3:] == [
        str(project / "reports" / name) for name in ("README.md", "note.md", "checklist.md")
    ]


@pytest.mark.parametrize("arguments", [["--claims", "x"], ["--figure", "x.png"]])
def test_options_of_the_note_need_the_note(project, capsys, arguments):
    assert main(["report", *arguments]) == 2
    assert "expected it: the option is the note's" in capsys.readouterr().err
    assert not (project / "reports").exists()


def test_a_note_that_is_refused_leaves_the_pages_as_they_were(project, capsys):
    assert main(["report", "--note"]) == 0
    spec_now = copy.deepcopy(SPEC)
    spec_now["deviations"] = [{"what": "Another network.", "why": "It fits."}]
    write_yaml(project / "spec.yaml", spec_now)
    before = {path: path.read_bytes() for path in (project / "reports").glob("*.*")}
    assert main(["report", "--note", "--claims", "no-such"]) == 2
    assert {path: path.read_bytes() for path in (project / "reports").glob("*.*")} == before


def test_the_verdicts_as_data(project, capsys):
    assert main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"constant": "could not run"}
