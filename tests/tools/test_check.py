"""`repro check`: every kind of fault planted into a complete project and named; what only looks like a fault passed over."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import toy_method
from toy_project import CONFIG, write_yaml

from repro.config import flatten, validate
from repro_tools.check.coverage import NO_SETTING_NEEDED
from repro_tools.check.paper import Paper, make_page, numbers, pages_named, split_pages
from repro_tools.cli import main
from repro_tools.spec import ITEMS, Spec, claim_hashes

PAGES = [
    """A Toy of Lines

Abstract. We fit a line and then a con-
stant in 2 phases. [Doe, 2019]""",
    """3 Method
Algorithm 1: Fitting. Draw x from a normal law, i.i.d.,
and step by stochastic gradient descent (Adam) on the mean squared
error. A network with one hidden layer of 8 units and drop-
out 0.5 is used. We train on a \ufb01xed pool of 64 points; the \ufb01rst phase takes 12
steps with a batch size of 8,the second takes 9 steps at learning rate 10\u22122.""",
    """Table 2: Results after 20,000 evaluations on one A100 GPU
method value time
ours 3.00 1.07 12 min
theirs 4.50 1.71 90 min
All runs use seeds 0 and 1. We report the constant over 10K samples.""",
]
HEADED = "\n".join(f"## Page {number}\n\n{page}\n" for number, page in enumerate(PAGES, start=1))
FED = "\f".join(PAGES) + "\f"


def setting(name, item, *, key=None, value="as said", origin="paper", where="page 2, Method", quote=None, **changes):
    return {
        "name": name, "experiments": "*", "key": key, "value": value, "origin": origin, "where": where,
        "alternatives": ["another"] if origin == "assumed" else [], "why": "given", "item": item, "quote": quote,
        **changes,
    }  # fmt: skip


SPEC = {
    "paper": {
        "title": "A Toy of Lines",
        "authors": ["Nobody"],
        "arxiv": "0000.00000",
        "version": "v1",
        "url": "https://arxiv.org/abs/0000.00000",
    },
    "level": "experimental",
    "seeds": [0, 1],
    "tolerances": {"wide": {"reproduced": 0.5, "close": 1.0, "why": "chosen for the test"}},
    "claims": [
        {
            "id": "constant", "statement": "The constant is three.", "where": "page 3, Table 2", "experiment": "toy",
            "kind": "equal", "metric": "constant.value", "divided_by": None, "reported": 3.0, "floor": None,
            "tolerance": "wide", "quote": "ours **3.00** 1.07",
        },
        {
            "id": "ahead", "statement": "Ours is at two thirds.", "where": "page 3, Table 2", "experiment": "toy",
            "kind": "at_most", "metric": "constant.value", "divided_by": "line.value", "reported": 0.667, "floor": None,
            "tolerance": "wide", "quote": ["ours **3.00** 1.07", "theirs **4.50** 1.71"],
        },
    ],
    "settings": [
        setting("pool", "preprocessing", key="pool_size", value=64, quote="We train on a fixed pool of **64** points"),
        setting("steps of the line", "iterations", key="phases.line.iterations", value=12, quote="the first phase takes **12** steps"),
        setting("steps of the constant", "iterations", key="phases.constant.iterations", value=9, quote="the second takes **9** steps"),
        setting("batch of the line", "batch size", key="phases.line.batch_size", value=8, quote="with a batch size of 8, the second"),
        setting("batch of the constant", "batch size", key="phases.constant.batch_size", value=4, origin="assumed"),
        setting("learning rate", "hyper-parameters", key="phases.*.learning_rate", value=0.01, quote="at learning rate 10^-2"),
        setting("loss", "loss", quote="the mean squared error"),
        setting("network", "architecture", value="8 units, dropout 0.5", quote="hidden layer of 8 units and dropout 0.5"),
        setting("optimiser", "optimiser", quote="stochastic gradient descent (Adam)"),
        setting("protocol", "evaluation protocol", value=10000, where="page 3", quote="the constant over 10K samples"),
        setting("loop", "pseudo-code", where="page 2, Algorithm 1", quote="Draw x from a normal law"),
        setting("hardware", "hardware", value="one A100", where="page 3", quote="on one A100 GPU"),
        setting("time", "training time", value=12, where="page 3", quote="ours 3.00 1.07 **12** min"),
    ],
    "deviations": [{"what": "None known.", "why": "Nothing was changed."}],
    "not_attempted": [{"what": "Theirs", "where": "page 3, Table 2", "why": "Another method."}],
    "budget": {"device": "T4", "hours": 1.0, "session_hours": 1.0},
}  # fmt: skip


class Toy:
    """A complete project and its paper. `check` runs the command with --json and returns its findings."""

    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys
        self.spec, self.config, self.paper = copy.deepcopy(SPEC), copy.deepcopy(CONFIG), HEADED
        self.settings = {one["name"]: one for one in self.spec["settings"]}
        self.claims = {one["id"]: one for one in self.spec["claims"]}

    def write(self):
        write_yaml(self.root / "spec.yaml", self.spec)
        write_yaml(self.root / "configs" / "toy.yaml", self.config)
        (self.root / "paper.txt").write_text(self.paper, encoding="utf-8")

    def record(self, name="toy-seed-0.json", claims=None, departures=(), **more):
        hashes = claim_hashes(validate(Spec, self.spec, "spec.yaml"), "toy") if claims is None else claims
        folder = self.root / "reports" / "records"
        folder.mkdir(parents=True, exist_ok=True)
        record = {"experiment": "toy", "seed": 0, "metrics": {}, "claims": hashes, "departures": list(departures)}
        (folder / name).write_text(json.dumps({**record, "commit": "0" * 40, "machine": {}, **more}))

    def output(self, *arguments):
        self.write()
        code = main(["check", *arguments])
        output = self.capsys.readouterr()
        return code, output.out, output.err

    def check(self, *arguments):
        code, out, err = self.output(*(arguments or ["--paper", "paper.txt"]), "--json")
        assert code in (0, 1), err
        found = json.loads(out)["findings"]
        assert (code == 1) == bool(found)
        return [" | ".join(one[field] for field in ("kind", "place", "found", "expected")) for one in found]

    def one(self, *arguments):
        found = self.check(*arguments)
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
def toy(project, capsys):
    return Toy(project, capsys)


def test_a_complete_spec_has_no_findings_and_says_what_was_looked_at(toy):
    code, out, _ = toy.output("--paper", "paper.txt")
    assert code == 0 and out.endswith("findings: none\n")
    assert "1 with 7 values, of which 7 have a setting" in out
    assert "12 of 12 settings of the paper, 2 of 2 claims found on their pages (paper.txt, 3 pages)" in " ".join(
        out.split()
    )
    assert max(map(len, out.splitlines())) <= 120


def test_without_the_paper_nothing_is_searched(toy):
    toy.settings["loss"]["quote"] = "words of another paper"
    assert toy.check("--runs", "runs") == []


def test_findings_are_grouped_and_counted(toy):
    del toy.spec["budget"]
    toy.config["pool_size"] = 65
    toy.settings["loss"]["quote"] = "words of another paper"
    code, out, _ = toy.output("--paper", "paper.txt")
    assert code == 1
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        "missing (1)", "", "contradicted (1)", "", "not found (1)", "", "verified", "",
        "findings: 1 missing, 1 contradicted, 1 not found",
    ]  # fmt: skip


# --- missing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item", ["loss", "architecture", "optimiser", "preprocessing", "evaluation protocol", "hyper-parameters",
             "pseudo-code", "hardware", "training time"]
)  # fmt: skip
def test_an_item_that_no_setting_answers(toy, item):
    next(one for one in toy.spec["settings"] if one["item"] == item)["item"] = None
    assert toy.one().startswith(f"missing | spec.yaml: settings: item '{item}' | no setting |")


@pytest.mark.parametrize("item, name", [("batch size", "batch"), ("iterations", "steps")])
@pytest.mark.parametrize("phase", ["line", "constant"])
def test_a_phase_whose_batch_size_or_iterations_no_item_answers(toy, item, name, phase):
    toy.settings[f"{name} of the {phase}"]["item"] = None
    assert f"missing | spec.yaml: settings: item '{item}' | no setting for phase {phase} (in toy) |" in toy.one()


@pytest.mark.parametrize("item, name", [("batch size", "batch"), ("iterations", "steps")])
def test_a_setting_with_the_key_of_a_phase_and_no_item_is_named(toy, item, name):
    toy.settings[f"{name} of the line"]["item"] = None
    assert toy.one().endswith(f"| item: {item} in setting '{name} of the line'")
    toy.settings[f"{name} of the line"]["item"] = "loss"  # an entry answers one item
    assert toy.one().endswith(f"| one with key phases.line.{item.replace(' ', '_')}")


def test_one_setting_may_answer_for_every_phase(toy):
    toy.config["phases"]["constant"]["batch_size"] = 8
    toy.settings["batch of the line"]["key"] = "phases.*.batch_size"
    toy.spec["settings"].remove(toy.settings["batch of the constant"])
    assert toy.check() == []


def test_an_item_is_asked_of_every_experiment(toy):
    write_yaml(toy.root / "configs" / "toy2.yaml", {**CONFIG, "experiment": "toy2"})
    toy.spec["claims"].append({**SPEC["claims"][0], "id": "other", "experiment": "toy2"})
    toy.settings["loss"]["experiments"] = "toy"
    assert "item 'loss' | no setting for toy2 |" in toy.one()


def test_an_experiment_without_a_claim(toy):
    write_yaml(toy.root / "configs" / "toy2.yaml", {**CONFIG, "experiment": "toy2"})
    assert "missing | spec.yaml: claims | none about experiment toy2 |" in toy.one()


def test_a_claim_without_a_configuration(toy):
    toy.spec["claims"].append({**SPEC["claims"][0], "id": "other", "experiment": "toy2"})
    assert "missing | configs/toy2.yaml | no such file, but claims of it: other |" in toy.one()


def test_no_budget(toy):
    del toy.spec["budget"]
    assert "missing | spec.yaml: budget | nothing |" in toy.one()


def test_a_paper_that_nobody_can_find(toy):
    for one in ("arxiv", "url"):
        toy.spec["paper"] = {key: value for key, value in SPEC["paper"].items() if key != one}
        assert toy.check() == []
    del toy.spec["paper"]["arxiv"]
    assert toy.one().startswith("missing | spec.yaml: paper | neither arxiv nor url |")


@pytest.mark.parametrize("level", ["code", "experimental", "extension"])
def test_a_level_that_compares_with_the_paper_states_its_deviations(toy, level):
    toy.spec.update(level=level, deviations=[])
    assert f"missing | spec.yaml: deviations | none at level {level} |" in toy.one()


def test_a_conceptual_reproduction_states_its_simplifications(toy):
    toy.spec.update(level="conceptual", deviations=[])
    assert "missing | spec.yaml: simplifications |" in toy.one()
    toy.spec["simplifications"] = [{"what": "A line.", "why": "Time.", "effect": "Easier."}]
    assert toy.check() == []


@pytest.mark.parametrize("text", ["FILL IN: which loss?", "TODO", "TBD", "FIXME", "???"])
def test_a_placeholder(toy, text):
    toy.settings["pool"]["why"] = text
    assert toy.one() == f"to fill in | spec.yaml: settings.'pool'.why | {text!r} | what belongs here"


@pytest.mark.parametrize("text", [" ", ""])
def test_an_empty_text(toy, text):
    toy.settings["pool"]["why"] = text
    assert toy.one() == "missing | spec.yaml: settings.'pool'.why | an empty text | what belongs here"


def test_a_placeholder_is_one_finding_wherever_it_stands(toy):
    """No page, quote or title is asked of a text that is still to be written."""
    toy.spec["paper"].update(title="FILL IN: the title", arxiv="FILL IN: the number")
    toy.claims["constant"].update(where="FILL IN: the page", quote="FILL IN: the words")
    toy.claims["ahead"].update(quote=["ours **3.00** 1.07", "FILL IN: the other words"])
    toy.settings["loss"].update(value="FILL IN: the loss", quote=None)
    toy.settings["pool"].update(where="FILL IN: the page", quote=None)
    toy.settings["batch of the constant"].update(alternatives=["FILL IN: another"], why="FILL IN: the reason")
    found = toy.check()
    assert [line.split(" | ")[:2] for line in found] == [
        ["to fill in", f"spec.yaml: {place}"]
        for place in (
            "paper.title", "paper.arxiv", "claims.'constant'.where", "claims.'constant'.quote", "claims.'ahead'.quote.1",
            "settings.'pool'.where", "settings.'batch of the constant'.alternatives.0", "settings.'batch of the constant'.why",
            "settings.'loss'.value",
        )
    ]  # fmt: skip


def test_a_method_that_stands_in_for_the_papers(toy, monkeypatch):
    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, placeholder="the toy phases"))
    assert toy.one().startswith("to fill in | method | the toy phases | ")


def test_what_is_to_be_filled_in_comes_first(toy):
    del toy.spec["budget"]
    toy.settings["pool"]["why"] = "FILL IN"
    assert [line.split(" | ")[0] for line in toy.check()] == ["to fill in", "missing"]


def test_a_placeholder_where_a_number_belongs_is_named_and_keeps_the_rest_from_being_checked(toy):
    toy.claims["constant"]["reported"] = "FILL IN the value of the table"
    del toy.spec["budget"]
    assert toy.one() == (
        "to fill in | spec.yaml: claims.'constant'.reported | 'FILL IN the value of the table' | what belongs here"
    )


def test_a_placeholder_in_a_configuration(toy):
    toy.config["pool_size"] = "FILL IN"
    assert "to fill in | configs/toy.yaml: pool_size | 'FILL IN' |" in toy.one()


def test_words_that_only_contain_a_placeholder_are_none(toy):
    toy.settings["pool"]["why"] = "We FILL IN nothing, and todo lists are fine."
    assert toy.check() == []


@pytest.mark.parametrize("text", ["", "# nothing yet", "claims:\nsettings:\n"])
def test_an_empty_spec_lists_what_to_read_for(toy, text):
    toy.write()
    (toy.root / "spec.yaml").write_text(text)
    toy.write = lambda: None
    found = toy.check()
    parts = ["paper", "level", "seeds", "tolerances", "claims", "settings", "deviations", "not_attempted", "budget"]
    asked = [f"spec.yaml: {part}" for part in parts] + [f"spec.yaml: settings: item '{item}'" for item in ITEMS]
    lines = [line for line in found if line.startswith("missing")]
    assert sorted(line.split(" | ")[1] for line in lines) == sorted(asked)
    assert {line.split(" | ")[1] for line in found if line not in lines} == {  # the values that no setting answers for
        f"configs/toy.yaml: {key}" for key in flatten(CONFIG) if key not in NO_SETTING_NEEDED
    }


@pytest.mark.parametrize("part", ["paper", "level", "seeds", "deviations", "not_attempted"])
def test_a_part_that_is_not_there_keeps_nothing_else_from_being_checked(toy, part):
    del toy.spec[part]
    assert toy.one().startswith(f"missing | spec.yaml: {part} | nothing |")
    toy.settings["loss"]["quote"] = "words of another paper"
    assert [line.split(" | ")[0] for line in toy.check()] == ["missing", "not found"]


def test_a_claim_before_its_tolerance_is_written(toy):
    toy.record()
    toy.spec["tolerances"] = {}
    missing, *changed = toy.check()
    assert missing.startswith("missing | spec.yaml: tolerances.wide | nothing, but claims name it |")
    assert len(changed) == 2 and all("no tolerance, but" in line for line in changed)


def test_an_entry_that_is_half_written_is_named(toy):
    del toy.claims["constant"]["reported"], toy.settings["pool"]["origin"]
    assert toy.check() == [
        "missing | spec.yaml: claims.'constant'.reported | nothing | a value",
        "missing | spec.yaml: settings.'pool'.origin | nothing | a value",
    ]


def test_the_items_are_asked_before_there_is_a_configuration(toy):
    toy.settings["loss"]["item"] = None
    toy.write()
    (toy.root / "configs" / "toy.yaml").unlink()
    toy.write = lambda: None
    assert [line.split(" | ")[1] for line in toy.check()] == [
        "configs", "configs/toy.yaml", "spec.yaml: settings: item 'loss'",
    ]  # fmt: skip


NO_METHODS = [
    "[tool.repro]\n",
    '[tool.repro]\nmethod = "not_there:METHOD"\n',
    '[tool.repro]\nmethod = "toy_method:GONE"\n',
]


@pytest.mark.parametrize("table", NO_METHODS)
def test_without_a_method_the_rest_is_checked(toy, table):
    (toy.root / "pyproject.toml").write_text(table)
    assert toy.one().startswith("missing | method | ")
    toy.config["pool_size"], toy.settings["loss"]["quote"] = 65, "words of another paper"
    assert [line.split(" | ")[0] for line in toy.check()] == ["missing", "contradicted", "not found"]


@pytest.mark.parametrize("table", NO_METHODS)
def test_other_commands_need_the_method(toy, table):
    (toy.root / "pyproject.toml").write_text(table)
    assert main(["list"]) == 2 and "pyproject.toml: tool.repro.method: " in toy.capsys.readouterr().err


def test_what_is_no_spec_is_bad_input(toy):
    toy.spec["seeds"] = "FILL IN"
    toy.spec["level"] = "astonishing"
    code, out, err = toy.output()
    assert code == 2 and out == ""
    assert "spec.yaml: level: found" in err and "seeds" not in err


def test_what_the_types_refuse_in_a_configuration_is_a_finding_and_quotes_are_still_searched(toy):
    """The spec and the configurations may be written before config.py fits them."""
    toy.config["phases"]["line"]["batch_size"] = "eight"
    toy.config["phases"]["constant"]["speed"] = 1
    del toy.config["pool_size"]
    toy.settings["loss"]["quote"] = "words of another paper"
    found = toy.check()
    known = "iterations, batch_size, learning_rate"
    assert "contradicted | configs/toy.yaml: pool_size | nothing | a value" in found
    assert 'contradicted | configs/toy.yaml: phases.line.batch_size | "eight" | a valid integer' in found
    assert f"contradicted | configs/toy.yaml: phases.constant.speed | an unknown key | {known}" in found
    as_data = "contradicted | configs/toy.yaml: phases.line.batch_size | 'eight' | 8 as in setting 'batch of the line'"
    assert any(line.startswith(as_data) for line in found)
    assert any(line.startswith("not found | spec.yaml: setting 'loss'") for line in found)


def test_a_configuration_that_no_class_is_for_is_a_finding(toy, monkeypatch):
    by_name = replace(toy_method.METHOD, config={"2d-*": toy_method.Config})
    monkeypatch.setattr(toy_method, "METHOD", by_name)
    expected = "a name like 2d-*, for which toy has a configuration"
    assert toy.one() == f"contradicted | configs/toy.yaml | experiment 'toy' | {expected}"


@pytest.mark.parametrize("text, told", [("a: [", "toy.yaml"), ("- a list", "expected a mapping")])
def test_what_is_no_configuration_at_all_is_bad_input(toy, text, told):
    toy.write()
    (toy.root / "configs" / "toy.yaml").write_text(text)
    toy.write = lambda: None
    code, out, err = toy.output()
    assert code == 2 and out == "" and told in err


# --- unsourced ---------------------------------------------------------------------------------------------------


def test_a_value_of_a_configuration_without_a_setting(toy):
    toy.settings["pool"]["key"] = None
    assert "unsourced | configs/toy.yaml: pool_size | 64 without a source |" in toy.one()


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"origin": "paper", "where": "section 3"}, "where | 'section 3' | the page of the paper"),
        ({"origin": "assumed", "alternatives": [], "quote": None}, "alternatives | none |"),
        ({"origin": "authors' code", "where": "the training script"}, "| a file of the authors' code"),
        ({"origin": "authors' code", "where": "train.py"}, "| the commit or version of the authors' code"),
        ({"origin": "cited", "where": "common practice"}, "| a source: author and year"),
        ({"origin": "measured here", "where": "a short run", "quote": None}, "| the script or test that measured it"),
        ({"origin": "measured here", "where": "benchmarks/gone.py", "quote": None}, "'benchmarks/gone.py' | the script or test"),
        ({"origin": "assumed", "where": "nothing is said", "alternatives": ["32"]}, "where | 'nothing is said' | the page of the quote"),
    ],
)  # fmt: skip
def test_an_origin_that_names_no_place(toy, changes, found):
    toy.settings["pool"].update(changes)
    assert toy.one("--runs", "runs").startswith("unsourced | spec.yaml: setting 'pool': ")
    assert found in toy.one("--runs", "runs")


@pytest.mark.parametrize(
    "changes",
    [
        {"origin": "assumed", "where": "nothing is said", "alternatives": ["32"]},
        {"origin": "authors' code", "where": "src/train.py at 1a2b3c4"},
        {"origin": "authors' code", "where": "train.py of v1.2"},
        {"origin": "cited", "where": "Tong et al. 2023"},
        {"origin": "cited", "where": "https://example.org/code"},
        {"origin": "cited", "where": "torchcfm/models/models.py"},
        {"origin": "measured here", "where": "spec.yaml, read twice"},
    ],
)
def test_an_origin_with_its_place(toy, changes):
    toy.settings["pool"].update(changes, quote=None)
    assert toy.check() == []


def test_an_assumption_without_a_reason(toy):
    del toy.settings["batch of the constant"]["why"], toy.settings["pool"]["why"]
    assert toy.one().startswith("unsourced | spec.yaml: setting 'batch of the constant': why | nothing | the reason")


def test_a_setting_of_the_paper_without_a_page(toy):
    del toy.settings["pool"]["where"]
    assert toy.one().startswith("unsourced | spec.yaml: setting 'pool': where | 'not stated' | the page of the paper")


def test_a_claim_without_a_page(toy):
    toy.claims["constant"]["where"] = "Table 2"
    assert "unsourced | spec.yaml: claim constant: where | 'Table 2' | the page of the paper" in toy.one()


# --- quotes, before a page is opened -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("loss", "'as said'"), ("steps of the line", "12")])
def test_words_and_short_numbers_need_a_quote(toy, name, value):
    toy.settings[name]["quote"] = None
    assert f"unsourced | spec.yaml: setting '{name}': quote | none for {value} | the words of the page" in toy.one()


def test_a_quote_of_several_numbers_marks_the_one_that_is_meant(toy):
    toy.settings["time"]["quote"] = "ours 3.00 1.07 12 min"
    assert "quote | 3 numbers: 3, 1.07, 12 | what says 12 between ** and **" in toy.one()


@pytest.mark.parametrize("quote", ["with a batch size of **8**", "with a batch size of 8", "hidden layer of 8 units"])
def test_a_value_that_its_quote_does_not_say(toy, quote):
    toy.settings["batch of the line"].update(value=16, quote=quote)
    toy.config["phases"]["line"]["batch_size"] = 16
    assert "contradicted | spec.yaml: setting 'batch of the line': value | 16, but its quote says 8 |" in toy.one()


def test_a_claim_that_its_quote_does_not_say(toy):
    toy.claims["constant"]["reported"] = 3.1
    assert "contradicted | spec.yaml: claim constant: reported | 3.1, but its quote says 3 |" in toy.one()


def test_a_quotient_that_its_quotes_do_not_give(toy):
    toy.claims["ahead"]["reported"] = 0.677
    assert "claim ahead: reported | 0.677, but its quote says 3 / 4.5 | the quotient, rounded to 3" in toy.one()


def test_a_quotient_needs_dividend_and_divisor(toy):
    toy.claims["ahead"]["quote"] = ["ours 3.00 1.07", "theirs 4.50 1.71"]
    assert "unsourced | spec.yaml: claim ahead: quote | 4 numbers: 3, 1.07, 4.5, 1.71 |" in toy.one()


def ahead_by(toy, reported, *quote):
    toy.claims["ahead"].update(kind="within", divided_by=None, minus="line.value", reported=reported, quote=list(quote))
    return toy.check()


@pytest.mark.parametrize(
    "reported, quote",
    [
        (1.5, ["theirs **4.50** 1.71", "ours **3.00** 1.07"]),
        (2.79, ["theirs **4.50** **1.71** 90 min"]),
        (1.71, ["theirs 4.50 **1.71** 90 min"]),  # the page says the difference itself
    ],
)
def test_a_difference_that_its_quotes_give(toy, reported, quote):
    assert ahead_by(toy, reported, *quote) == []


@pytest.mark.parametrize("reported", [1.49, -1.5, 0.67])
def test_a_difference_that_its_quotes_do_not_give(toy, reported):
    (found,) = ahead_by(toy, reported, "theirs **4.50** 1.71", "ours **3.00** 1.07")
    assert f"contradicted | spec.yaml: claim ahead: reported | {reported}, but its quote says 4.5 - 3 | their" in found


def test_a_difference_needs_both_values_or_itself(toy):
    (found,) = ahead_by(toy, 1.5, "theirs 4.50 1.71", "ours 3.00 1.07")
    assert (
        "unsourced | spec.yaml: claim ahead: quote | 4 numbers: 4.5, 1.71, 3, 1.07 | the two whose difference is 1.5"
        in found
    )
    (found,) = ahead_by(toy, 1.5, "theirs 4.50 **1.71** 90 min")
    assert "contradicted | spec.yaml: claim ahead: reported | 1.5, but its quote says 1.71" in found


def test_a_text_keeps_to_the_numbers_of_its_quote(toy):
    toy.settings["hardware"].update(value="one A100 with 80 GB")
    assert "contradicted | spec.yaml: setting 'hardware': value |" in toy.one() and "has no 80" in toy.one()


@pytest.mark.parametrize(
    "quote, found",
    [
        ("the first phase takes **1**2 steps", "a mark inside a number"),
        ("a **12**", "only 'a **12**'"),
    ],
)
def test_a_quote_of_another_form(toy, quote, found):
    toy.settings["steps of the line"]["quote"] = quote
    assert any(found in line for line in toy.check("--runs", "runs"))


@pytest.mark.parametrize(
    "value, quote",
    [
        (3, "a network of three layers"),
        (0, "we used no weight decay"),
        (6, "we hold out every sixth image"),
        (3, "the first phase uses three layers"),
        (25, "averaged over twenty-five runs"),
        (200000, "for two hundred thousand steps"),
        (20000, "for 20 thousand steps"),
        (0.5, "one half of the pool"),
        (2, "every pool is drawn **twice**, by one generator"),
        ([32, 64], "filters of **32 and 64** in 2 blocks"),
        (0.6, "only **60%** of the evaluations"),
        (60, "only **60%** of the evaluations"),
        (20000, "for 20k steps"),
        (1e-4, "learning rate 1 × 10−4"),
    ],
)
def test_what_a_quote_says(toy, value, quote):
    toy.settings["loss"].update(value=value, quote=quote)
    assert toy.check("--runs", "runs") == []


@pytest.mark.parametrize(
    "value, quote",
    [
        (3, "a network of four layers"),
        (0, "we used weight decay"),
        (6, "we hold out every seventh image"),
        (20, "averaged over twenty-five runs"),
        (100, "for several hundred steps"),
        (20, "for 20 thousand steps"),
        (1, "one half of the pool"),
        ([32, 64], "filters of **64 and 32** in 2 blocks"),
        (2000, "for 20k steps"),
        (1e-4, "learning rate 1 × 10−5"),
    ],
)
def test_what_a_quote_does_not_say(toy, value, quote):
    toy.settings["loss"].update(value=value, quote=quote)
    assert "spec.yaml: setting 'loss'" in toy.one("--runs", "runs")


def test_one_marked_number_says_a_list_of_as_many_as_the_quote_tells(toy):
    for quote in ("two hidden layers of **64** units", "2 layers of **64** units each"):
        toy.settings["loss"].update(value=[64, 64], quote=quote)
        assert toy.check("--runs", "runs") == []


@pytest.mark.parametrize(
    "quote, found, expected",
    [
        ("hidden layers of **64** units", "1 number: 64", "or a quote like '2 layers of **64**'"),
        ("three hidden layers of **64** units", "1 number: 64", "or a quote like '2 layers of **64**'"),
        ("2 hidden layers of 64 units", "but its quote says 2, 64", "or a quote like '2 layers of **64**'"),
        ("two hidden layers of **32** units", "but its quote says 32, 32", "what the quote says"),
    ],
)
def test_a_list_that_one_number_does_not_say(toy, quote, found, expected):
    toy.settings["loss"].update(value=[64, 64], quote=quote)
    line = toy.one("--runs", "runs")
    assert found in line and line.endswith(expected)


# --- contradicted ------------------------------------------------------------------------------------------------


def test_a_configuration_that_differs_from_its_setting(toy):
    toy.config["pool_size"] = 65
    assert toy.one() == "contradicted | configs/toy.yaml: pool_size | 65 | 64 as in setting 'pool' (page 2, Method)"


def test_two_settings_that_differ(toy):
    toy.spec["settings"].append(setting("pool again", None, key="pool_*", value=65, origin="assumed"))
    assert "setting 'pool again': value | 65 for pool_size, but 64 by setting 'pool' (in toy) |" in toy.one()


def test_two_settings_that_agree(toy):
    toy.spec["settings"].append(setting("pool again", None, key="pool_*", value=64, origin="assumed"))
    assert toy.check() == []


def test_a_key_that_matches_no_field(toy):
    toy.spec["settings"].append(setting("width", None, key="phases.*.width", value=8, origin="assumed"))
    assert (
        "contradicted | spec.yaml: setting 'width': key | 'phases.*.width' | a field of configs/toy.yaml" in toy.one()
    )


def test_experiments_that_match_none(toy):
    toy.spec["settings"].append(setting("width", None, experiments="cifar*", origin="assumed"))
    assert "contradicted | spec.yaml: setting 'width': experiments | 'cifar*' |" in toy.one()


# --- not found ---------------------------------------------------------------------------------------------------


def test_a_quote_that_stands_nowhere_and_how_far_it_agrees(toy):
    toy.settings["loss"]["quote"] = "gradient descent (Adam) on the median error"
    found = toy.one()
    assert found.startswith("not found | spec.yaml: setting 'loss': quote | 'gradient descent (Adam) on the median")
    assert "not on page 2 beyond 'descent (Adam) on the' | what stands there: it is on no page" in found


def test_a_quote_of_another_page(toy):
    toy.settings["loss"]["where"] = "page 1"
    assert "which is not on page 1 | its page: found on page 2" in toy.one()


def test_a_number_of_another_page(toy):
    toy.settings["protocol"].update(value=20000, quote=None, where="page 2")
    assert "not found | spec.yaml: setting 'protocol' | 20000, which is not on page 2 |" in toy.one()
    assert "found on page 3" in toy.one()


def test_a_page_that_the_paper_does_not_have(toy):
    toy.settings["loss"]["where"] = "page 4"
    assert "not found | spec.yaml: setting 'loss': where | page 4 | a page of paper.txt, 1 to 3" in toy.one()
    toy.settings["loss"]["where"] = "page 2"
    toy.spec["not_attempted"][0]["where"] = "page 7"
    assert "spec.yaml: not_attempted 'Theirs': where | page 7 |" in toy.one()


def test_a_table_of_another_page(toy):
    toy.claims["constant"]["where"] = "page 3, Table 1"
    assert "spec.yaml: claim constant: where | Table 1, which is not on page 3 |" in toy.one()
    toy.claims["constant"]["where"] = "page 3, Table 2"
    toy.settings["loop"]["where"] = "page 2, Algorithm 12"
    assert "where | Algorithm 12, which is not on page 2 |" in toy.one()


def test_the_text_of_another_paper(toy):
    toy.spec["paper"]["title"] = "A Toy of Planes"
    assert "not found | spec.yaml: paper.title | 'A Toy of Planes' is not on page 1 of paper.txt |" in toy.one()


def test_a_quote_beside_an_assumption_is_searched_too(toy):
    toy.settings["batch of the constant"]["quote"] = "the constant has a batch of its own"
    assert "not found | spec.yaml: setting 'batch of the constant': quote |" in toy.one()


@pytest.mark.parametrize("origin, where", [("cited", "Doe 2019, page 4"), ("authors' code", "a.py at 1a2b3c4, page 4")])
def test_quotes_of_other_texts_are_not_searched(toy, origin, where):
    toy.settings["loss"].update(origin=origin, where=where, quote="words of another text")
    assert toy.check() == []


def test_one_of_several_pages_is_enough(toy):
    toy.settings["loss"]["where"] = "page 1, Abstract and page 2, Method"
    toy.claims["constant"]["where"] = "page 1 and page 3, Table 2"
    assert toy.check() == []


@pytest.mark.parametrize("quote", ["pool of 6", "pool of 64 point", "ours 3.0", "batch size of 8,the sec"])
def test_a_quote_ends_where_words_and_numbers_end(toy, quote):
    toy.settings["loss"].update(quote=quote, where="pages 2 and 3")
    assert "which is not on pages 2, 3" in toy.one()


@pytest.mark.parametrize(
    "quote",
    [
        "We fit a line and then a constant in 2 phases",  # broken at the end of a line
        "We fit a line  and then\na con-stant in 2 phases",
        "a \ufb01xed pool of 64 points; the first phase",  # a ligature
        "a batch size of 8, the second takes",  # a lost space
        "learning rate 10^{-2}",
        "learning rate 10\u20132",
        "after 20000 evaluations",
        "AFTER 20,000 EVALUATIONS",
        "one hidden layer of 8 units and dropout 0.5",
    ],
)
def test_a_quote_as_a_reader_writes_it(toy, quote):
    toy.settings["loss"].update(quote=quote, where="pages 1-3")
    assert toy.check() == []


@pytest.mark.parametrize("text", [HEADED, FED, HEADED.replace("## Page", "# PAGE"), HEADED.replace("Method", "\f")])
def test_pages_by_headings_or_form_feeds(toy, text):
    toy.paper = text
    assert toy.check() == []


def test_a_page_has_its_own_number():
    assert split_pages("## Page 4\nfour\n## Page 6\nsix") == {4: "\nfour\n", 6: "\nsix"}
    assert split_pages("one\ftwo\f") == {1: "one", 2: "two"}


def test_what_stands_before_the_first_heading_belongs_to_its_page():
    assert split_pages("The title\n## Page 1\none\n## Page 2\ntwo") == {1: "The title\n\none\n", 2: "\ntwo"}


@pytest.mark.parametrize(
    "text, told", [("no pages", "no pages in paper.txt"), ("", "no UTF-8 text"), ("%PDF-1.5", "pdftotext")]
)
def test_a_text_without_pages_is_bad_input(toy, text, told):
    toy.paper = text
    code, out, err = toy.output("--paper", "paper.txt")
    assert code == 2 and out == "" and told in err
    assert "found no file" in toy.output("--paper", "gone.txt")[2]


@pytest.mark.parametrize(
    "text, value",
    [
        ("for 20,000 steps", 20000), ("for 20000steps", 20000), ("for 20k steps", 20000), ("for 20 000 steps", 20000),
        ("for 20\u2009000 steps", 20000), ("for 2 \u00d7 10\u2074 steps", 20000), ("for 2e4 steps", 20000),
        ("0.2M steps", 200000), ("rate 0.0001", 1e-4), ("rate 1e-4", 1e-4), ("rate 1E\u22124", 1e-4), ("rate 10\u22124", 1e-4),
        ("rate 10^-4", 1e-4), ("rate $10^{-4}$", 1e-4), ("rate 1 x 10^-4", 1e-4), ("rate 1\u00b710\u20134", 1e-4),
        ("rate 10\u207b\u2074.", 1e-4), ("rate .0001", 1e-4), ("1024x768 pixels", 768), ("FFHQ-256", 256), ("10/100 steps", 100),
        ("from 10-12 layers", 12), ("of \u22120.250 nats", -0.25), ("(0.285)", 0.285), ("0.285.", 0.285), ("128, 256", 256),
    ],
)  # fmt: skip
def test_a_number_is_found_in_every_usual_writing(text, value):
    assert Paper(Path("paper.txt"), {1: make_page(text)}).with_number(value) == [1]


@pytest.mark.parametrize(
    "text, value",
    [
        ("for 200000 steps", 20000), ("for 120,000 steps", 20000), ("for 20,0001", 20000), ("of 0.2850", 0.28), ("of 1.285", 0.285),
        ("section 4.256.1", 256), ("CIFAR100", 100), ("W256", 256), ("rate 10^-40", 1e-4), ("rate 10\u22124.5", 1e-4),
        ("rate 2 \u00d7 10\u22124", 1e-4), ("20 0001 steps", 20000), ("2,000", 20000), ("2.0k", 20000), ("128,256", 256), ("0.250 nats", -0.25),
    ],
)  # fmt: skip
def test_a_number_is_no_part_of_another(text, value):
    assert Paper(Path("paper.txt"), {1: make_page(text)}).with_number(value) == []


def test_a_writing_of_two_meanings_keeps_both():
    assert [sorted(map(float, one)) for one in numbers("60% of 10-12")] == [[0.6, 60], [1e-12], [10], [12]]


@pytest.mark.parametrize(
    "where, pages",
    [
        ("page 7, Table 2 and page 15, Table 3", [7, 15]), ("pages 13-15", [13, 14, 15]), ("page 13\u201314, E", [13, 14]),
        ("pp. 3, 5 and 7 to 9", [3, 5, 7, 8, 9]), ("p. 4", [4]), ("page 7, 5.2: with 10 steps", [7]), ("page 7, 5", [7]),
        ("pages 7, 5.2", [7]), ("Table 3", []), ("homepage 3", []), ("Page 14, E.2", [14]),
    ],
)  # fmt: skip
def test_the_pages_of_a_reference(where, pages):
    assert pages_named(where) == pages


# --- changed after a run -----------------------------------------------------------------------------------------


def test_a_claim_as_in_its_record(toy):
    toy.record()
    code, out, _ = toy.output("--json")
    assert code == 0 and json.loads(out)["claims"] == {"constant": "as in every run", "ahead": "as in every run"}


def test_a_tolerance_that_was_changed_after_a_run(toy):
    toy.record()
    toy.spec["tolerances"]["wide"]["reproduced"] = 0.9
    found = toy.check()
    assert [line.split(" | ")[:2] for line in found] == [
        ["changed", "spec.yaml: claim constant"],
        ["changed", "spec.yaml: claim ahead"],
    ]
    assert "in 1 run of toy (reports/records)" in found[0]


def test_a_changed_claim_is_found_in_the_runs_too(toy):
    toy.record()
    (toy.root / "runs" / "toy" / "seed-0").mkdir(parents=True)
    (toy.root / "reports" / "records" / "toy-seed-0.json").rename(toy.root / "runs/toy/seed-0/record.json")
    toy.claims["constant"]["statement"] = "The constant is about three."
    assert "spec.yaml: claim constant" in toy.one() and "runs/toy/seed-0" in toy.one()
    assert toy.check("--runs", "elsewhere") == []


def test_a_claim_that_was_dropped_after_a_run(toy):
    toy.record()
    toy.spec["claims"].remove(toy.claims["ahead"])
    assert "changed | spec.yaml: claims | no 'ahead', which 1 run of toy" in toy.one()


def test_a_claim_that_was_added_after_a_run_waits_for_a_new_one(toy):
    toy.record()
    toy.spec["claims"].append({**SPEC["claims"][0], "id": "second"})
    code, out, _ = toy.output("--json")
    assert code == 0 and json.loads(out)["claims"]["second"] == "newer than a run"


def test_a_quote_may_be_added_after_a_run(toy):
    toy.record()
    toy.claims["constant"]["quote"] = "ours **3.00** 1.07 12 min"
    assert toy.check() == []


def test_a_run_that_was_made_with_a_placeholder_fixes_no_tolerance(toy):
    toy.record(claims={"constant": "0", "gone": "0"}, placeholders=["method: the toy phases"])
    assert toy.check() == []
    toy.record(claims={"constant": "0"}, placeholders=[])
    assert "changed | spec.yaml: claim constant" in toy.one()


def test_a_shortened_run_fixes_no_tolerance(toy):
    toy.record(claims={"constant": "0", "gone": "0"}, departures=["phases.line.iterations: 12 -> 1"])
    assert toy.check() == []
