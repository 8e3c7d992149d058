"""A placeholder earns no verdict: each is planted into a project whose claim would be reproduced, run, and filled in too late."""

import copy
import json
import re
from dataclasses import replace

import pytest
import toy_method
from toy_project import CONFIG, SPEC, write_yaml

from repro_tools.cli import main
from repro_tools.placeholders import OpenPlace, holds_placeholder, open_places


class Config(toy_method.Config):
    data: str


class Toy:
    """A project with a text in its configuration and a claim that every run reproduces. The placeholders are planted into it."""

    def __init__(self, root, monkeypatch, capsys):
        self.root, self.monkeypatch, self.capsys = root, monkeypatch, capsys
        self.original = toy_method.METHOD
        self.fill_in()

    def fill_in(self):
        """Writes everything without a placeholder."""
        self.spec, self.config = copy.deepcopy(SPEC), copy.deepcopy(CONFIG) | {"data": "given"}
        self.spec["tolerances"]["wide"].update(reproduced=100.0, close=200.0)
        self.claim, self.setting = self.spec["claims"][0], self.spec["settings"][0]
        self.claim["kind"] = "at_most"
        self.write()

    def write(self, placeholder=""):
        write_yaml(self.root / "spec.yaml", self.spec)
        write_yaml(self.root / "configs" / "toy.yaml", self.config)
        method = replace(self.original, config=Config, placeholder=placeholder)
        self.monkeypatch.setattr(toy_method, "METHOD", method)

    def run(self, *arguments):
        """The exit code, standard output and standard error of each planned seed's run, the last one's."""
        for seed in self.spec["seeds"]:
            code = main(["run", "toy", "--seeds", str(seed), *arguments])
        output = self.capsys.readouterr()
        return code, output.out, output.err

    def judged(self):
        """The verdict on the claim, and why."""
        assert main(["report"]) == 0
        self.capsys.readouterr()
        (claim,) = json.loads((self.root / "reports" / "results.json").read_text())["claims"]
        return claim["verdict"], claim["reason"]

    def recorded(self):
        return json.loads((self.root / "runs/toy/seed-0/record.json").read_text())["placeholders"]


@pytest.fixture
def toy(project, monkeypatch, capsys):
    return Toy(project, monkeypatch, capsys)


def of_the_method(toy):
    toy.write(placeholder="the toy phases")


def of_the_configuration(toy):
    toy.config["data"] = "FILL IN: which data"
    toy.write()


def of_a_setting(toy):
    toy.setting["where"] = "FILL IN: the page"
    toy.write()


def of_a_setting_of_no_experiment_yet(toy):
    toy.spec["settings"].append({**toy.setting, "name": "loss", "key": None, "experiments": "FILL IN: which"})
    toy.write()


def of_the_claim(toy):
    toy.claim["statement"] = "TODO: what the paper says"
    toy.write()


def of_the_reason_of_a_tolerance(toy):
    toy.spec["tolerances"]["wide"]["why"] = "FILL IN: why this much"
    toy.write()


OF_A_RUN = [
    (of_the_method, "method: the toy phases"),
    (of_the_configuration, "configs/toy.yaml: data"),
    (of_a_setting, "spec.yaml: setting 'pool'.where"),
    (of_a_setting_of_no_experiment_yet, "spec.yaml: setting 'loss'.experiments"),
]
OF_A_CLAIM = [
    (of_the_claim, "spec.yaml: claim constant.statement"),
    (of_the_reason_of_a_tolerance, "spec.yaml: tolerance wide.why"),
]


def test_filled_in_before_the_run_it_gets_its_verdict(toy):
    code, _, err = toy.run()
    assert code == 0 and "warning" not in err and toy.recorded() == []
    assert toy.judged() == ("reproduced", "at most 100 allowed")


@pytest.mark.parametrize(("plant", "place"), OF_A_RUN)
def test_a_run_with_a_placeholder_gets_no_verdict_however_late_it_is_filled_in(toy, plant, place):
    plant(toy)
    assert toy.run()[0] == 0 and toy.recorded() == [place]
    told = ("inconclusive", f"made while these were still to be filled in: {place}")
    assert toy.judged() == told
    toy.fill_in()
    assert toy.judged() == told


@pytest.mark.parametrize(("plant", "place"), OF_A_CLAIM)
def test_a_claim_with_a_placeholder_gets_no_verdict(toy, plant, place):
    plant(toy)
    assert toy.run()[0] == 0 and toy.recorded() == []
    assert toy.judged() == ("inconclusive", f"to be filled in: {place}")
    toy.fill_in()
    assert toy.judged() == ("inconclusive", "the claim or its tolerance was changed after the run")


def test_a_placeholder_in_a_quote_waits_for_the_words_and_for_no_new_run(toy):
    toy.claim["quote"] = "FILL IN: the words"
    toy.write()
    toy.run()
    assert toy.judged() == ("inconclusive", "to be filled in: spec.yaml: claim constant.quote")
    toy.fill_in()
    assert toy.judged()[0] == "reproduced"


def test_without_a_run_a_claim_with_a_placeholder_could_not_run(toy):
    of_the_claim(toy)
    assert toy.judged() == ("could not run", "no run of this experiment measured it")


@pytest.mark.parametrize(
    "innocent",
    [
        lambda toy: toy.setting.update(why=""),
        lambda toy: toy.setting.update(why="We FILL IN nothing; a todo list is fine."),
        lambda toy: toy.spec["settings"].append(
            {**toy.setting, "key": None, "experiments": "cifar*", "why": "FILL IN"}
        ),
        lambda toy: toy.spec["paper"].update(version="FILL IN: v1 or v2"),
        lambda toy: toy.spec["tolerances"].update(
            other=toy.spec["tolerances"]["wide"] | {"why": "FILL IN: the reason"}
        ),
    ],
    ids=["an empty text", "words in a sentence", "another experiment", "the paper", "a tolerance of no claim"],
)
def test_what_does_not_bear_on_the_run_costs_no_verdict(toy, innocent):
    innocent(toy)
    toy.write()
    assert "warning" not in toy.run()[2]
    assert toy.judged()[0] == "reproduced"


def test_many_places_are_cut_short_in_a_verdict(toy):
    toy.spec["settings"] = [{**toy.setting, "name": f"pool {n}", "why": "FILL IN"} for n in range(5)]
    toy.write()
    toy.run()
    assert toy.judged()[1].endswith(
        "'pool 0'.why, spec.yaml: setting 'pool 1'.why, spec.yaml: setting 'pool 2'.why and 2 more"
    )


# --- the warning before a run


@pytest.mark.parametrize(("plant", "place"), OF_A_RUN + OF_A_CLAIM)
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_run_says_before_it_trains_that_no_verdict_can_come_of_it(toy, plant, place, arguments):
    plant(toy)
    toy.spec["seeds"] = [0]
    code, out, err = toy.run(*arguments)
    assert code == 0 and err.splitlines()[0] == (
        f"repro: warning: no verdict can come of this run: 1 place is still to be filled in: {place}; "
        "repro check lists them"
    )
    assert err.count("warning") == 1
    if arguments:
        assert json.loads(out)["toy"]["data"] == toy.config["data"]


def test_the_warning_names_three_places_and_counts_them_all(toy):
    toy.config["data"], toy.setting["why"], toy.claim["statement"] = "FILL IN", "FILL IN", "FILL IN"
    toy.write(placeholder="the toy phases")
    (line,) = toy.run("--dry-run")[2].splitlines()[:1]
    assert line == (
        "repro: warning: no verdict can come of this run: 4 places are still to be filled in: method: the toy phases, "
        "configs/toy.yaml: data, spec.yaml: setting 'pool'.why, ...; repro check lists them"
    )


def test_where_other_claims_can_be_decided_the_warning_names_those_that_cannot(toy):
    toy.spec["claims"].append({**toy.claim, "id": "second", "statement": "FILL IN"})
    toy.write()
    (line,) = toy.run("--dry-run")[2].splitlines()[:1]
    assert line.startswith("repro: warning: no verdict on second can come of this run: 1 place is still")


def test_a_placeholder_where_a_number_belongs_refuses_the_run(toy):
    toy.claim["reported"] = "FILL IN: the value of Table 1"
    toy.write()
    code, out, err = toy.run()
    assert (code, out) == (2, "") and 'claims.0.reported: found "FILL IN' in err
    toy.fill_in()
    toy.config["pool_size"] = "FILL IN"
    toy.write()
    code, out, err = toy.run()
    assert (code, out) == (2, "") and re.search(
        r"toy.yaml: pool_size: found \"FILL IN\", expected a valid integer", err
    )
    assert not (toy.root / "runs").exists()


# --- what a placeholder is


@pytest.mark.parametrize("text", ["FILL IN", "FILL IN: x", "  TODO later", "TBD.", "FIXME", "???"])
def test_a_placeholder_begins_its_text(text):
    assert holds_placeholder(text) and holds_placeholder({"a": [1, {"b": text}]})


@pytest.mark.parametrize("data", ["", " ", "to do", "fill in", "Nothing is TBD", None, 3, [], {"FILL IN": "given"}])
def test_all_else_is_none(data):
    assert not holds_placeholder(data)


def test_places_are_named_for_pydantic_and_for_a_reader():
    data = {"claims": [{"id": "one", "where": "TODO"}], "list": ["given", "", "???"]}
    assert list(open_places(data)) == [
        OpenPlace("claims.0.where", "claims.'one'.where", "TODO"),
        OpenPlace("list.1", "list.1", ""),
        OpenPlace("list.2", "list.2", "???"),
    ]
