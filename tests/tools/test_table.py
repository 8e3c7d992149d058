"""Tables and lists of names for a terminal."""

import pytest

from repro_tools.table import WIDTH, in_patterns, listed, table, wrapped

KNOWN = ["2d-moons", "2d-scurve", "cifar10", "mnist", "mnist-reduced"]


def test_columns_are_as_wide_as_they_need():
    assert table(["a", "b"], [["one", "2"], ["3", "four"]]).splitlines() == ["a    b", "one  2", "3    four"]


def test_what_is_too_wide_is_wrapped_in_its_column_and_no_word_is_lost():
    words = " ".join(f"word-{number}" for number in range(60))
    lines = table(["name", "text"], [["x", words]]).splitlines()
    assert max(map(len, lines)) <= WIDTH and len(lines) > 2
    assert " ".join(" ".join(lines[1:]).split()).removeprefix("x ") == words


def test_wrapped_lines_are_indented_but_for_the_first():
    first, second = wrapped("FAIL " + "word " * 30, "      ")
    assert first.startswith("FAIL") and second.startswith("      word") and len(first) <= WIDTH


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (KNOWN, "all 5"),
        (["2d-moons", "2d-scurve"], "2d-*"),
        (["2d-moons"], "2d-moons"),
        (["2d-scurve", "cifar10", "2d-moons"], "2d-*, cifar10"),
        (["mnist-reduced"], "mnist-reduced"),
    ],
)
def test_experiments_in_few_words(names, words):
    assert in_patterns(names, KNOWN) == words


def test_many_names_are_cut_short():
    assert listed(list("abc")) == "a, b, c"
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
