"""The spec of the reference implementation, checked by `repro check` against the paper's text, and what the check would miss.

The text is not part of this repository. It is read from the file that NSGF_PAPER names, or from papers/ in the root.
"""

import os
import random
import re
from pathlib import Path

import pytest

from repro.method import find_project
from repro_tools.check.command import check_project
from repro_tools.check.paper import numbers, plain, read_paper
from repro_tools.check.sources import found_alone, not_found, quotes_alone
from repro_tools.report.judge import INCONCLUSIVE, judge_all
from repro_tools.report.results import read_records
from repro_tools.spec import Claim, Setting, load_spec, passages

ROOT = Path(__file__).parents[2]
PROJECT = find_project(Path(__file__).parent)
MUTANTS = 30


def paper_file() -> Path | None:
    named = os.environ.get("NSGF_PAPER")
    found = [Path(named)] if named else sorted((ROOT / "papers").glob("*2401.14069v1*"))
    return found[0] if found else None


@pytest.fixture(scope="module")
def paper():
    path = paper_file()
    if path is None:
        pytest.skip("no text of arXiv 2401.14069v1: name its file in NSGF_PAPER, or put it into papers/")
    return read_paper(path)


@pytest.fixture(scope="module")
def spec():
    return load_spec(PROJECT.spec)


def test_the_reference_spec_has_no_findings(tmp_path):
    assert check_project(PROJECT, None, tmp_path).findings == []


def test_the_reference_spec_stands_in_the_paper(paper, tmp_path):
    checked = check_project(PROJECT, paper, tmp_path)
    assert checked.findings == []
    assert checked.verified["paper"].startswith(
        "59 of 59 settings of the paper, 15 of 15 other quotes, 54 of 54 claims"
    )


def test_every_record_was_made_with_the_claims_of_today(tmp_path):
    stands = check_project(PROJECT, None, tmp_path).claims
    waiting = {name for name, stand in stands.items() if stand != "as in every run"}
    assert waiting == {name for name in stands if name.startswith(("table2-", "table3-"))}
    assert {stands[name] for name in waiting} == {"not run yet"}


def test_the_report_shows_a_tolerance_that_was_changed_after_the_runs(spec, tmp_path):
    wider = spec.tolerances["ahead"].model_copy(update={"reproduced": 0.95})
    changed = spec.model_copy(update={"tolerances": {**spec.tolerances, "ahead": wider}})
    records = read_records(PROJECT.reports / "records")
    reasons = {one.id: (one.verdict, one.reason) for one in judge_all(changed, records)}
    for claim in spec.claims:
        told = reasons[claim.id] == (INCONCLUSIVE, "the claim or its tolerance was changed after the run")
        assert told == (claim.tolerance == "ahead")


# --- what a mistake in copying would do: refs/spec.md tells these counts ------------------------------------------------


def numbers_of_the_paper(spec) -> list[Setting | Claim]:
    """Every entry whose number is said to be the paper's."""
    settings = [one for one in spec.settings if one.origin == "paper" and type(one.value) in (int, float)]
    return [*settings, *spec.claims]


def field(entry) -> str:
    return "value" if isinstance(entry, Setting) else "reported"


def with_number(entry, number, **changes):
    return entry.model_copy(update={field(entry): number, **changes})


def caught(spec, entry, paper) -> bool:
    """Whether the check finds fault with `entry`. A configuration that has the same wrong number finds none."""
    settings, claims = ([entry], []) if isinstance(entry, Setting) else ([], [entry])
    own = spec.model_copy(update={"settings": settings, "claims": claims, "not_attempted": []})
    return any([*quotes_alone(own), *not_found(own, paper)])


def miscopied(number, stream):
    """The number with a slip of the pen: doubled, halved, two digits swapped, or one digit another."""
    while True:
        digits = list(f"{number:.6f}".rstrip("0").rstrip(".") if isinstance(number, float) else str(number))
        first, second = (stream.choice([i for i, one in enumerate(digits) if one.isdigit()]) for _ in range(2))
        slip = stream.choice(["double", "half", "swap", "digit"])
        if slip == "swap":
            digits[first], digits[second] = digits[second], digits[first]
        elif slip == "digit":
            digits[first] = stream.choice("0123456789")
        wrong = {"double": number * 2, "half": number / 2}.get(slip, float("".join(digits)))
        if wrong != number:
            return int(wrong) if wrong == int(wrong) else wrong


def miscopies(spec, seed):
    """Thirty entries, drawn at random, each with a wrong number in the place of its own."""
    stream = random.Random(seed)
    for entry in stream.sample(numbers_of_the_paper(spec), MUTANTS):
        yield entry, miscopied(getattr(entry, field(entry)), stream)


def test_a_number_copied_wrongly_into_spec_and_configuration_is_caught(spec, paper):
    """The quote does not say it."""
    missed = [entry for entry, wrong in miscopies(spec, 0) if not caught(spec, with_number(entry, wrong), paper)]
    assert missed == []


def test_a_number_that_was_copied_wrongly_into_its_quote_too_is_caught(spec, paper):
    """The quote does not stand on the page. Quotients are left out: their quotes are two numbers."""
    missed, tried = [], 0
    for entry, wrong in miscopies(spec, 1):
        quotes = [bent(quote, wrong) for quote in passages(entry.quote)]
        if getattr(entry, "divided_by", None) or quotes == passages(entry.quote):
            continue
        tried += 1
        if not caught(spec, with_number(entry, wrong, quote=quotes), paper):
            missed.append(entry)
    assert tried == 24 and missed == []


def bent(quote, wrong) -> str:
    """The quote with its marked number, or its only one, made `wrong`."""
    if "**" in quote:
        return re.sub(r"\*\*.+?\*\*", f"**{wrong:g}**", quote)
    return re.sub(r"(?<![\w.])\d[\d.]*\b", f"{wrong:g}", quote) if len(numbers(quote)) == 1 else quote


def test_a_quote_of_the_next_page_is_caught(spec, paper):
    entries = [*numbers_of_the_paper(spec)]
    moved = [
        entry.model_copy(update={"where": re.sub(r"page (\d+)", lambda page: f"page {int(page[1]) + 1}", entry.where)})
        for entry in entries
    ]
    assert all(caught(spec, entry, paper) for entry in moved)


def test_without_quotes_some_wrong_numbers_stand_on_the_page_by_accident(spec, paper):
    """What quotes are for: of the wrong numbers long enough to be searched alone, so many are found on the page."""
    entries = [
        with_number(entry, wrong, quote=None, **({"divided_by": None} if isinstance(entry, Claim) else {}))
        for seed in range(10)
        for entry, wrong in miscopies(spec, seed)
        if found_alone(wrong)
    ]
    missed = [entry for entry in entries if not caught(spec, entry, paper)]
    print(f"without quotes: {len(missed)} of {len(entries)} missed")
    assert 0.05 < len(missed) / len(entries) < 0.15


def test_the_right_words_with_the_wrong_number_marked_are_missed(spec, paper):
    """The limit: a number that stands in the quote, taken for another, is the reader's to see."""
    tried, missed = 0, 0
    for entry in spec.claims:
        (quote, *others) = passages(entry.quote)
        if others or entry.divided_by or not entry.id.startswith("table1"):
            continue
        words = plain(quote).split()
        if len(words) > 3:
            first = words[-2]  # the value of the column before
            tried += 1
            missed += not caught(
                spec,
                with_number(entry, float(first), quote=quote.replace("**", "").replace(f" {first}", f" **{first}**")),
                paper,
            )
    print(f"wrong number marked: {missed} of {tried} missed")
    assert missed == tried > 20


def test_how_often_a_number_stands_on_a_page(paper):
    """The measurement behind sources.DIGITS_FOUND_ALONE, in percent of all pairs of a number and a page."""

    def percent(values):
        return 100 * sum(len(paper.with_number(value)) for value in values) / len(values) / len(paper.pages)

    assert round(percent(range(10))) == 48
    assert round(percent(range(10, 100))) == 5
    assert round(percent(range(100, 1000)), 1) == 0.2
    assert round(percent(range(2000, 2030))) == 15
