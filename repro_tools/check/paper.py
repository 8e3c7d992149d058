"""A paper's text by page: where words and numbers stand in it.

The text was taken from a PDF. Words are broken at line ends, spaces are lost, and one sign comes in several shapes; so quotes
are compared without spaces and hyphens, and a number in every usual writing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from repro.errors import BadInput

Readings = frozenset[Decimal]
"""All that one writing of a number may mean."""

PAGE_HEADING = re.compile(r"^#{1,6}[ \t]+Page[ \t]+(\d+)[ \t]*$", re.MULTILINE | re.IGNORECASE)
MARKED = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)
"""In a quote, what stands between double asterisks is the value that is meant."""

_UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_BELOW_TWENTY = {word: value for value, word in enumerate([*_UNITS, *_TEENS], start=1)}
_COUNTS = {
    **_BELOW_TWENTY,
    **{ten: 10 * value for value, ten in enumerate(_TENS, start=2)},
    **{
        f"{ten} {unit}": 10 * value + _BELOW_TWENTY[unit] for value, ten in enumerate(_TENS, start=2) for unit in _UNITS
    },
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_ALONE = {**dict.fromkeys(["no", "not", "none", "zero", "without"], 0), "single": 1}
_ORDINALS = [
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth", "twentieth",
]  # fmt: skip
_MULTIPLES: dict[str, int | str] = {"half": "0.5", "once": 1, "twice": 2, "double": 2, "doubled": 2}
_RANKS: dict[str, int | str] = {**{word: value for value, word in enumerate(_ORDINALS, start=1)}, **_MULTIPLES}


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True)).replace(" ", r"[\s-]+")


# "several hundred" is no number.
_WORDS = re.compile(
    rf"(?<![^\W_])(?:(?:one[\s-]+(?=half))?(?P<rank>{_any(_RANKS)})|(?P<alone>{_any(_ALONE)})"
    rf"|(?P<count>{_any(_COUNTS)})(?P<scales>(?:[\s-]+(?:{_any(_SCALES)})s?)*)"
    rf"|(?<!few )(?<!several )(?<!many )(?P<scale>{_any(_SCALES)}))(?![^\W_])",
    re.IGNORECASE,
)
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\u0060", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff", None),  # soft hyphen and characters without width
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SKIPPED = re.compile(
    r"(?P<thousands>(?<=\d),\s*(?=\d{3}(?!\d)))"
    r"|(?P<hyphen>(?<=[^\W\d_])-\s*(?=[^\W\d_]))"
    r"|(?P<columns>(?<=\d)\s+(?=\d))"
    r"|\s+|[\^{}]"
)
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_BEGINS = r"(?:(?<![\w.])|(?<=\dx))"
_POWER = re.compile(
    rf"{_BEGINS}(?:({_PLAIN})\s*[×x*·⋅∙]\s*)?10(?:\s*\^\s*[({{]?\s*([+-]?\d{{1,2}})|\s?(-\d{{1,2}}))(?![\d.]*\d)"
)
_NUMBER = re.compile(
    rf"{_BEGINS}({_PLAIN})(?:[eE]([+-]?\d{{1,3}}))?(?![\d]|\.\d)(?:\s?(%)|([kKM])(?!\w)|\s({_any(_SCALES)})\b)?"
)
_SPACED = re.compile(rf"{_BEGINS}\d{{1,3}}(?: \d{{3}})+(?![\d.]*\d)")


@dataclass(frozen=True)
class Page:
    """`text` with its signs made uniform; `squeezed` without what an extraction changes, each character from `places` in `text`."""

    text: str
    squeezed: str
    places: list[int]
    numbers: frozenset[Decimal]


@dataclass(frozen=True)
class Paper:
    """The pages of a paper by number."""

    path: Path
    pages: dict[int, Page]

    def holding(self, quote: str) -> list[int]:
        """The pages on which `quote` stands."""
        return [number for number, page in self.pages.items() if _stands(quote, page)]

    def with_number(self, value: float) -> list[int]:
        """The pages on which `value` stands as a whole number, in any writing."""
        return [number for number, page in self.pages.items() if exact(value) in page.numbers]


def read_paper(path: Path) -> Paper:
    """The pages in a text file: separated by form feeds, as `pdftotext` writes them, or under headings "## Page N".

    Raises BadInput for a file that is missing, is no text, or has no pages.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise BadInput(f"--paper: found no file {path}") from None
    except OSError as error:
        raise BadInput(f"--paper: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    if raw.startswith(b"%PDF") or not text:
        raise BadInput(f"--paper: found no UTF-8 text in {path}, expected what `pdftotext paper.pdf paper.txt` writes")
    found = split_pages(text)
    if not found:
        raise BadInput(
            f"--paper: found no pages in {path}, expected form feeds between pages (pdftotext) or headings '## Page N'"
        )
    return Paper(path, {number: make_page(one) for number, one in found.items()})


def split_pages(text: str) -> dict[int, str]:
    """The text of each page by its number. Headings count before form feeds; without either there are no pages.

    What stands before the first heading, such as the title, belongs to the first page.
    """
    headings = list(PAGE_HEADING.finditer(text))
    if not headings and "\f" in text:
        pages = text.split("\f")
        if not pages[-1].strip():
            pages.pop()  # pdftotext ends every page with a form feed
        return dict(enumerate(pages, start=1))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    found = {int(heading[1]): text[heading.end() : end] for heading, end in zip(headings, ends, strict=False)}
    if headings:
        first = int(headings[0][1])
        found[first] = text[: headings[0].start()] + found[first]
    return found


def make_page(text: str) -> Page:
    text = _uniform(text)
    squeezed, places = _squeeze(text)
    spaced = [_without_spaces(match[0]) for match in _SPACED.finditer(text)]
    return Page(text, squeezed, places, frozenset(reading for token in [*numbers(text), *spaced] for reading in token))


def pages_named(where: str) -> list[int]:
    """The pages that a reference names: "page 7, Table 2 and page 15", "pages 13-15", "pp. 13, 14 and 16"."""
    number, to = r"\d+(?!\.?\d)", r"\s*(?:-|–|to)\s*"
    # After "page 7" a number is no page: it may be a section, as in "page 7, 5".
    named = rf"\b(?:(?:page|p\.)\s*({number}(?:{to}{number})?)|(?:pages|pp\.)\s*({number}(?:(?:{to}|\s*(?:,|and)\s*){number})*))"
    found: list[int] = []
    for match in re.finditer(named, where, re.IGNORECASE):
        for first, last in re.findall(rf"(\d+)(?:{to}(\d+))?", match[1] or match[2]):
            found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


def labels_named(where: str) -> list[str]:
    """The tables, figures and algorithms that a reference names by number."""
    return [f"{kind} {number}" for kind, number in re.findall(r"\b(Table|Figure|Algorithm) (\d+)", where)]


def exact(value: float) -> Decimal:
    """The number as it is written in decimals, so that 0.1 is a tenth."""
    return Decimal(repr(value)).normalize()


def numbers(text: str) -> list[Readings]:
    """Every number of a text in order, each with all that its writing may mean.

    "20,000", "20k" and "2 × 10^4" are 20000; "10-4" is 1e-4, since no range runs from 10 down to 4, but "10-12" may be
    either; "60%" is 60 or 0.6. A number is whole: no digits of "CIFAR100", of "4.3.1" or of a longer number.
    """
    text = _uniform(text)
    found: list[tuple[int, Readings]] = []
    powers: list[tuple[int, int]] = []
    for match in _POWER.finditer(text):
        mantissa, exponent = Decimal((match[1] or "1").replace(",", "")), int(match[2] or match[3])
        found.append((match.start(), frozenset([mantissa.scaleb(exponent).normalize()])))
        if match[1] or match[2] or exponent > -10:
            powers.append(match.span())
    for match in _NUMBER.finditer(text):
        if any(start <= match.start() < end for start, end in powers):
            continue
        value = Decimal(match[1].replace(",", "")).scaleb(int(match[2] or 0))
        readings = {value, value.scaleb(-2)} if match[3] else {value}
        if match[4]:
            readings = {value.scaleb(6 if match[4] == "M" else 3)}
        if match[5]:
            readings = {value * _SCALES[match[5]]}
        if re.search(r"(?<![\w)\]])-$", text[: match.start()]):
            readings |= {-reading for reading in readings}
        found.append((match.start(), frozenset(reading.normalize() for reading in readings)))
    return [readings for _, readings in sorted(found, key=lambda item: item[0])]


def meant(quotes: Sequence[str]) -> list[Readings]:
    """The numbers that quotes are quoted for: those between ** and **; without a mark all of them.

    Where there are no digits, words count: "three hidden layers", "no weight decay"; where there are none of these either,
    "every sixth image", "half", "twice".
    """
    marked = [part for quote in quotes for part in MARKED.findall(quote)]
    parts = marked or list(quotes)
    if len(marked) == 1 and _SPACED.fullmatch(marked[0]):
        return [_without_spaces(marked[0])]
    found = [number for part in parts for number in numbers(part)]
    if found:
        return found
    return [number for part in parts for number in counted(part)] or [rank for part in parts for rank in _ranked(part)]


def beside_marks(quotes: Sequence[str]) -> list[Readings]:
    """The numbers, in digits and in words, that stand outside of ** and **."""
    parts = [MARKED.sub(" ", quote) for quote in quotes if MARKED.search(quote)]
    return [number for part in parts for number in [*numbers(part), *counted(part)]]


def counted(text: str) -> list[Readings]:
    """The numbers that are written as words: "three", "twenty-five", "two hundred thousand", "no"."""
    found = []
    for match in _WORDS.finditer(text):
        if match["rank"]:
            continue
        value = {**_ALONE, **_COUNTS, **_SCALES}["".join(_word(match[one]) for one in ("alone", "count", "scale"))]
        for scale in (match["scales"] or "").replace("-", " ").split():
            value *= _SCALES[scale.lower().removesuffix("s")]
        found.append(frozenset([Decimal(value)]))
    return found


def _ranked(text: str) -> list[Readings]:
    return [frozenset([Decimal(_RANKS[_word(match["rank"])])]) for match in _WORDS.finditer(text) if match["rank"]]


def _word(text: str | None) -> str:
    return " ".join((text or "").lower().replace("-", " ").split())


def plain(quote: str) -> str:
    """A quote without its marks."""
    return quote.replace("**", "")


def cut_by_mark(quote: str) -> bool:
    """Whether a mark stands inside a number, as in "**25**6"."""
    return re.search(r"\d[.,]?\*\*[.,]?\d", quote) is not None


def too_short(quote: str) -> bool:
    """Whether a quote could stand anywhere: it needs a word beside its number."""
    squeezed, _ = _squeeze(_uniform(plain(quote)))
    return len(squeezed) < 6 or sum(character.isalpha() for character in squeezed) < 2


def _stands(quote: str, page: Page) -> bool:
    needle, _ = _squeeze(_uniform(plain(quote)))
    start = page.squeezed.find(needle)
    while needle and start >= 0:
        first, last = page.places[start], page.places[start + len(needle) - 1]
        if not _cuts(page.text, first) and not _cuts(page.text, last + 1):
            return True
        start = page.squeezed.find(needle, start + 1)
    return False


def _cuts(text: str, place: int) -> bool:
    """Whether a cut before `place` goes through a word or a number."""
    before, after = text[max(place - 2, 0) : place], text[place : place + 5]
    if not before or not after:
        return False
    if before[-1].isalpha() and after[0].isalpha():
        return True
    if after[0].isdigit():
        return before[-1].isdigit() or (len(before) > 1 and before[-1] == "." and before[-2].isdigit())
    return before[-1].isdigit() and re.match(r"\.\d|,\d{3}(?!\d)", after) is not None


def _without_spaces(number: str) -> Readings:
    """The number that "20 000" is, where it is not two columns of a table."""
    return frozenset([Decimal(number.replace(" ", "")).normalize()])


def _uniform(text: str) -> str:
    text = re.sub(r"(?<=\d)[\u2009\u202f](?=\d{3}(?!\d))", ",", text)  # a thin space between thousands
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS))  # ligatures, no-break spaces
    return text.translate(_SIGNS).replace("**", "")


def _squeeze(text: str) -> tuple[str, list[int]]:
    """`text` in lower case without spaces, except between digits, and hyphens in words; and where each character came from."""
    characters, places, end = [], [], 0
    for match in [*_SKIPPED.finditer(text), None]:
        start = len(text) if match is None else match.start()
        for place in range(end, start):
            lower = text[place].lower()
            characters.append(lower)
            places += [place] * len(lower)
        if match is None:
            break
        if match.lastgroup == "columns":
            characters.append(" ")
            places.append(start)
        end = match.end()
    return "".join(characters), places
