"""What the commands see of DeepCrime's operators, and that the page of coverage says what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks import deepcrime, mutants

ROOT = Path(__file__).parents[2]
IMPLEMENTED = 24  # names in utils/constants.py of dlfaults/deepcrime


@pytest.mark.parametrize("mutant", [one for operator in deepcrime.OPERATORS for one in operator.configuration])
def test_check_sees_a_mutant_of_the_configuration(mutant):
    assert deepcrime.seen_by_check(*mutant)


def test_every_operator_has_a_mutant_or_a_reason():
    assert len({operator.name for operator in deepcrime.OPERATORS}) == IMPLEMENTED
    for operator in deepcrime.OPERATORS:
        assert bool(operator.without) != bool(operator.configuration or operator.code), operator.name


def test_the_page_shows_what_was_measured():
    results = json.loads(deepcrime.RESULTS.read_text())
    assert [row["what"] for row in results["rows"]] == [operator.what for operator in deepcrime.OPERATORS]
    page = (ROOT / "refs/coverage.md").read_text()
    assert deepcrime.page_table(results) in page and deepcrime.tally(results) in page


def test_the_page_shows_the_score_of_mutants():
    results = json.loads(mutants.RESULTS.read_text())
    assert mutants.page_table(results) in (ROOT / "refs/coverage.md").read_text()
    assert sorted(f"{name.replace('.', '/')}.py" for name in results["modules"]) == sorted(mutants.MODULES)
    for one in results["modules"].values():
        assert set(one["counts"]) <= {"killed", "survived", "timeout", "segfault"}
        assert len(one["survivors"]) == one["counts"].get("survived", 0)
