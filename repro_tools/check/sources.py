"""What the paper says: whether a quote says the value it is quoted for, and whether it stands on the page it is quoted from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from repro_tools.check.findings import (
    CONTRADICTED,
    NOT_FOUND,
    UNSOURCED,
    Finding,
    on_pages,
    readings_in_words,
    short,
    some,
)
from repro_tools.check.paper import (
    Paper,
    Readings,
    beside_marks,
    cut_by_mark,
    exact,
    labels_named,
    meant,
    numbers,
    pages_named,
    plain,
    too_short,
)
from repro_tools.placeholders import holds_placeholder
from repro_tools.spec import Claim, Setting, Spec, passages

DIGITS_FOUND_ALONE = 3
"""A number of fewer digits needs a quote. Measured on the 17 pages of arXiv 2401.14069v1 (tests/nsgf/test_spec_checked.py): a whole
number below 10 stands on 48% of the pages, one below 100 on 5%, one from 100 to 999 on 0.2%."""
YEARS = range(1900, 2100)
"""Whole numbers that stand in any bibliography: those from 2000 to 2029 on 15% of the same pages."""
LEAST_DECIMALS = 2
"""A quotient is held to at least so many, also where the spec writes 1 or 0.6."""


@dataclass(frozen=True)
class Source:
    """An entry of the spec that names pages of the paper. `value` is what it says the paper gives; None where it only quotes."""

    place: str
    kind: str
    where: str
    quotes: Sequence[str]
    value: Any


def quotes_alone(spec: Spec) -> Iterator[Finding]:
    """What is wrong with quotes before any page is opened: a value without one, or one that says another value."""
    for setting in filter(_is_filled_in, spec.settings):
        place, quotes = f"spec.yaml: setting '{setting.name}'", passages(setting.quote)
        yield from _form(place, quotes)
        if setting.origin == "paper":
            yield from _says(place, "value", quotes, setting.value)
        elif quotes and setting.origin in ("assumed", "measured here") and not pages_named(setting.where):
            yield Finding(UNSOURCED, f"{place}: where", repr(setting.where), "the page of the quote")
    for claim in filter(_is_filled_in, spec.claims):
        place, quotes = f"spec.yaml: claim {claim.id}", passages(claim.quote)
        yield from _form(place, quotes)
        if claim.reported is None:
            if not quotes:
                yield Finding(UNSOURCED, f"{place}: quote", "none", "the words of the page")
        elif len(claim.operands) == 1 or not quotes or len(meant(quotes)) == 1:
            yield from _says(place, "reported", quotes, claim.reported)
        elif claim.minus:
            yield from _says_difference(place, meant(quotes), claim.reported)
        else:
            yield from _says_quotient(place, meant(quotes), claim.reported)


def not_found(spec: Spec, paper: Paper) -> Iterator[Finding]:
    """What does not stand on the page that it is said to stand on."""
    first = min(paper.pages)
    titled = spec.paper and not holds_placeholder(spec.paper.title)
    if titled and first not in paper.holding(spec.paper.title):
        yield Finding(
            NOT_FOUND, "spec.yaml: paper.title", f"{short(spec.paper.title)} is not on page {first} of {paper.path.name}", "the text of this paper"
        )  # fmt: skip
    for source in _sources(spec):
        yield from _unknown_pages(source.place, source.where, paper)
        pages = _known(source, paper)
        if not pages:
            continue
        for label in labels_named(source.where) if source.value is not None else ():
            if not set(paper.holding(label)) & pages:
                yield _misplaced(f"{source.place}: where", label, pages, paper.holding(label))
        for quote in map(plain, source.quotes):
            on = paper.holding(quote)
            if not set(on) & pages:
                hint = "" if on else _breaks_off(quote, paper, pages)
                yield _misplaced(f"{source.place}: quote", short(quote), pages, on, hint)
        if not source.quotes and found_alone(source.value):
            on = paper.with_number(source.value)
            if not set(on) & pages:
                yield _misplaced(source.place, repr(source.value), pages, on)
    for one in spec.not_attempted:
        yield from _unknown_pages(f"spec.yaml: not_attempted {short(one.what)}", one.where, paper)


def searched(spec: Spec, paper: Paper) -> str:
    """How many settings, claims and other quotes were found whole on the pages they name."""
    found: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for source in _sources(spec):
        if source.quotes:
            held = all(_known(source, paper) & set(paper.holding(quote)) for quote in source.quotes)
        elif source.value is not None:
            held = found_alone(source.value) and bool(_known(source, paper) & set(paper.with_number(source.value)))
        else:
            continue
        asked[source.kind] += 1
        found[source.kind] += held
    counts = ", ".join(f"{found[kind]} of {asked[kind]} {kind}" for kind in asked)
    if not counts:
        return f"nothing to search for yet ({paper.path.name}, {len(paper.pages)} pages)"
    return f"{counts} found on their pages ({paper.path.name}, {len(paper.pages)} pages)"


def found_alone(value: Any) -> bool:
    """Whether a value is a number with so many digits that finding it on a page is no accident."""
    if not _numeric(value):
        return False
    whole, _, decimals = f"{abs(exact(value)):f}".partition(".")
    return len(whole.lstrip("0") + decimals) >= DIGITS_FOUND_ALONE and value not in YEARS


def _sources(spec: Spec) -> Iterator[Source]:
    for setting in filter(_is_filled_in, spec.settings):
        place, quotes = f"spec.yaml: setting '{setting.name}'", passages(setting.quote)
        if setting.origin == "paper":
            value = "null" if setting.value is None else setting.value
            yield Source(place, "settings of the paper", setting.where, quotes, value)
        elif setting.origin in ("assumed", "measured here"):  # other origins quote other texts
            yield Source(place, "other quotes", setting.where, quotes, None)
    for claim in filter(_is_filled_in, spec.claims):
        if claim.origin == "paper":  # a cited one quotes another text
            value = "null" if claim.reported is None else claim.reported
            yield Source(f"spec.yaml: claim {claim.id}", "claims", claim.where, passages(claim.quote), value)


def _is_filled_in(entry: Setting | Claim) -> bool:
    """Whether there is something to search for: a placeholder is a finding of its own, and no words of the paper."""
    value = entry.value if isinstance(entry, Setting) else entry.reported
    return not holds_placeholder([entry.where, entry.quote, value])


def _form(place: str, quotes: Sequence[str]) -> Iterator[Finding]:
    for quote in quotes:
        if cut_by_mark(quote):
            found = f"a mark inside a number: {short(quote)}"
            yield Finding(UNSOURCED, f"{place}: quote", found, "the whole number between ** and **")
        if too_short(quote):
            yield Finding(UNSOURCED, f"{place}: quote", f"only {short(quote)}", "words that could not stand anywhere")


def _says(place: str, field: str, quotes: Sequence[str], value: Any) -> Iterator[Finding]:
    """A number must be the one that its quotes hold or mark. A text needs a quote, and in it the numbers that it names."""
    numeric = _numeric(value) or (isinstance(value, list) and all(map(_numeric, value)))
    if not quotes:
        if not found_alone(value):
            why = ": a number of so few digits stands on any page" if _numeric(value) else ""
            yield Finding(UNSOURCED, f"{place}: quote", f"none for {value!r}", f"the words of the page{why}")
    elif not numeric:
        quoted = {reading for quote in quotes for token in numbers(plain(quote)) for reading in token}
        lacking = [token for token in numbers(str(value)) if max(token) >= 10 and not token & quoted]
        if lacking:
            found = f"{short(str(value))}, but its quote has no {readings_in_words(lacking[0])}"
            yield Finding(CONTRADICTED, f"{place}: {field}", found, "what the quote says")
    else:
        wanted = [exact(one) for one in (value if isinstance(value, list) else [value])]
        said = meant(quotes) if isinstance(value, list) else _distinct(meant(quotes))
        repeated = len(wanted) > 1 and len(set(wanted)) == 1
        if repeated and len(said) == 1 and any(len(wanted) in readings for readings in beside_marks(quotes)):
            said *= len(wanted)  # "two hidden layers of **256** units"
        hint = f", or a quote like '{len(wanted)} layers of **{wanted[0]:f}**'" if repeated else ""
        if not said:
            found, expected = f"no number in {short(quotes[0])}", f"words that say {value!r}"
            yield Finding(UNSOURCED, f"{place}: quote", found, expected)
        elif len(said) != len(wanted):
            found, expected = _count(said), f"what says {value!r} between ** and **{hint}"
            yield Finding(UNSOURCED, f"{place}: quote", found, expected)
        elif not all(one in readings for one, readings in zip(wanted, said, strict=True)):
            found = f"{value!r}, but its quote says {some([*map(readings_in_words, said)])}"
            yield Finding(
                CONTRADICTED, f"{place}: {field}", found, f"what the quote says{hint if len(set(said)) > 1 else ''}"
            )


def _says_quotient(place: str, said: Sequence[Readings], reported: float) -> Iterator[Finding]:
    if len(said) != 2:
        expected = f"what divides to {reported:g}: each of the two between ** and **"
        yield Finding(UNSOURCED, f"{place}: quote", _count(said), expected)
        return
    exponent = exact(reported).as_tuple().exponent
    assert isinstance(exponent, int)  # that of a finite number is
    decimals = max(-exponent, LEAST_DECIMALS)
    half = Decimal(5).scaleb(-decimals - 1)
    if not any(below and abs(above / below - exact(reported)) <= half for above in said[0] for below in said[1]):
        found = f"{reported:g}, but its quote says {readings_in_words(said[0])} / {readings_in_words(said[1])}"
        yield Finding(CONTRADICTED, f"{place}: reported", found, f"the quotient, rounded to {decimals} decimals")


def _says_difference(place: str, said: Sequence[Readings], reported: float) -> Iterator[Finding]:
    """A difference is exact: it has the digits of the two, and none is lost to rounding."""
    if len(said) != 2:
        expected = f"the two whose difference is {reported:g}, each between ** and **"
        yield Finding(UNSOURCED, f"{place}: quote", _count(said), expected)
        return
    if not any(above - below == exact(reported) for above in said[0] for below in said[1]):
        found = f"{reported:g}, but its quote says {readings_in_words(said[0])} - {readings_in_words(said[1])}"
        yield Finding(CONTRADICTED, f"{place}: reported", found, "their difference")


def _unknown_pages(place: str, where: str, paper: Paper) -> Iterator[Finding]:
    unknown = [page for page in pages_named(where) if page not in paper.pages]
    if unknown:
        expected = f"a page of {paper.path.name}, {min(paper.pages)} to {max(paper.pages)}"
        yield Finding(NOT_FOUND, f"{place}: where", on_pages(unknown), expected)


def _known(source: Source, paper: Paper) -> set[int]:
    return {page for page in pages_named(source.where) if page in paper.pages}


def _misplaced(place: str, what: str, pages: set[int], on: Sequence[int], hint: str = "") -> Finding:
    expected = f"its page: found on {on_pages(on)}" if on else "what stands there: it is on no page"
    return Finding(NOT_FOUND, place, f"{what}, which is not on {on_pages(sorted(pages))}{hint}", expected)


def _breaks_off(quote: str, paper: Paper, pages: set[int]) -> str:
    """How far a quote that stands nowhere agrees with a page, if by two words or more."""
    words = quote.split()
    for count in range(len(words) - 1, 1, -1):
        if set(paper.holding(" ".join(words[:count]))) & pages:
            return f" beyond '{' '.join(words[max(0, count - 4) : count])}'"
    return ""


def _count(said: Sequence[Readings]) -> str:
    return f"{len(said)} number{'s' * (len(said) > 1)}: {some([*map(readings_in_words, said)])}"


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _distinct(said: Sequence[Readings]) -> list[Readings]:
    return list(dict.fromkeys(said))
