"""The reproducibility note: three pages for a reader who will not open the results page.

All but a few parts follow from the spec and the records. What only a person can know stands between marks, is asked for in words
and never invented; writing the note again keeps it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from repro.errors import BadInput
from repro_tools.memory.devices import called
from repro_tools.memory.words import hours_spent, in_hours
from repro_tools.report.judge import (
    BELOW_FLOOR,
    COULD_NOT_RUN,
    INCONCLUSIVE,
    NOT,
    REPRODUCED,
    Judgement,
    causes,
    unexplained,
    worded,
)
from repro_tools.report.markup import (
    as_reported,
    cell,
    code,
    edition_of,
    is_written,
    kept,
    mean_and_spread,
    plural,
    table,
    text,
    title_of,
    words,
    written_by_hand,
    yours,
)
from repro_tools.report.results import Results, tally, tally_in_words
from repro_tools.report.results_page import deviation_lines, interval_text
from repro_tools.report.statistics import LEVEL, reach, seeds_for_signs
from repro_tools.spec import Spec

PAGES, PAGE_WORDS, FIGURE_WORDS = 3, 500, 170
"""A page of text has about 500 words, and a figure takes the place of 170 (measured: refs/reporting.md of the kit's repository)."""
RESERVE = 250
"""Words that are left to the person, as long as the parts are not written."""
MOST_CLAIMS = 15
"""Up to so many claims each gets a row without being asked for."""
LEVELS = {
    "conceptual": "the idea, in a simpler setting",
    "code": "some numbers, with the authors' code as a guide",
    "experimental": "the paper's results under its own settings",
    "extension": "a change to a result that was reproduced before",
}
HAND_WRITTEN = {
    "question": "What is the claim worth, and why test this one? Two or three sentences.",
    "blind-phase": (
        "From when to when was the method written from the paper alone, when was the authors' code first opened, and what changed after "
        "that? If it was never opened, say so. Commits or a log are the evidence."
    ),
    "surprises": "What was unexpected, what cost the most time, and what would have saved it? One line each.",
}
"""What only a person can write, and how the note asks for it."""


@dataclass(frozen=True)
class Note:
    """The page, the words of it, how many pages of print that is about, and which parts a person still has to write."""

    page: str
    words: int
    pages: float
    unwritten: list[str]

    @property
    def too_long(self) -> bool:
        return self.pages > PAGES


def write_note(results: Results, path: Path, patterns: Sequence[str], figure: str | None) -> Note:
    """The note on the claims that `patterns` match, with `figure`, a picture's path from the note's folder.

    `path` is where the note will lie: what a person wrote there is kept. The generated part gets shorter until it fits. Raises
    BadInput when it cannot, for a pattern that matches no claim, for a figure that is not there, and for damaged marks.
    """
    earlier = written_by_hand(path)
    chosen = choose(results.judgements, patterns)
    figure = _figure(results, path.parent, figure)
    by_hand = sum(words(body) for body in earlier.values())
    for brevity in range(3):
        page = _page(results, chosen, patterns, figure, earlier, brevity)
        size = words(page)
        generated = size - by_hand
        if _pages(generated + max(by_hand, RESERVE), figure) <= PAGES:
            break
    else:
        if _pages(generated + RESERVE, figure) > PAGES:
            raise BadInput(
                f"--claims: found {plural(len(chosen), 'claim')}, expected fewer: the note would have {generated:,} words, and {PAGES} pages hold "
                f"{PAGES * PAGE_WORDS - (FIGURE_WORDS if figure else 0) - RESERVE:,} beside what you write"
            )
    unwritten = [name for name in HAND_WRITTEN if not is_written(name, earlier)]
    note = Note(page, size, _pages(size, figure), unwritten)
    return Note(page + _length(note, figure), note.words, note.pages, unwritten)


def choose(judgements: Sequence[Judgement], patterns: Sequence[str]) -> list[Judgement]:
    """The claims that the patterns match, in the order of the spec; all when there are none. Raises BadInput for one that matches none."""
    lost = [pattern for pattern in patterns if not any(fnmatchcase(j.id, pattern) for j in judgements)]
    if lost:
        known = ", ".join(j.id for j in judgements[:6]) + (", ..." if len(judgements) > 6 else "")
        raise BadInput(*(f"--claims: found '{pattern}', expected a claim of the spec: {known}" for pattern in lost))
    return [j for j in judgements if not patterns or any(fnmatchcase(j.id, pattern) for pattern in patterns)]


def _page(
    results: Results,
    chosen: Sequence[Judgement],
    patterns: Sequence[str],
    figure: str | None,
    earlier: Mapping[str, str],
    brevity: int,
) -> str:
    """The note; `brevity` 1 leaves out reasons, 2 statements as well."""
    parts = [
        f"# Reproducibility note: {text(results.spec.paper.title)}\n",
        _claim(results, chosen, patterns, earlier),
        _setup(results, earlier),
        _result(results, chosen, patterns, brevity),
        _picture(results, figure),
        "## Deviations\n\n" + "\n".join(deviation_lines(results.spec, reasons=brevity == 0)) + "\n",
        _gap_analysis(results, chosen, brevity),
        "## Surprises\n\n" + yours("surprises", HAND_WRITTEN["surprises"], earlier),
        _not_to_conclude(results, chosen),
        kept(earlier, list(HAND_WRITTEN)),
    ]
    return "\n".join(part for part in parts if part)


def _claim(results: Results, chosen: Sequence[Judgement], patterns: Sequence[str], earlier: Mapping[str, str]) -> str:
    spec = results.spec
    paper = f"{text(', '.join(spec.paper.authors))}: {title_of(spec.paper)}, {edition_of(spec.paper)}"
    scope = (
        f"This note is about {len(chosen)} of the {plural(len(results.judgements), 'claim')} that were tested, chosen by name ({', '.join(map(code, patterns))})."
        if len(chosen) < len(results.judgements)
        else f"{plural(len(chosen), 'claim').capitalize()} of the paper {'was' if len(chosen) == 1 else 'were'} tested."
    )
    return f"## Claim\n\n{paper}. {scope} The reproduction is {spec.level}: {LEVELS[spec.level]}.\n\n" + yours(
        "question", HAND_WRITTEN["question"], earlier
    )


def _setup(results: Results, earlier: Mapping[str, str]) -> str:
    spec, runs = results.spec, results.runs
    origins = Counter(setting.origin for setting in spec.settings)
    lines = [
        f"Of {plural(len(spec.settings), 'setting')} that shape a result, "
        + ", ".join(f"{count} {_from(origin)}" for origin, count in origins.most_common())
        + "."
    ]
    if runs:
        hours = sum(minutes for one in runs for minutes in one.minutes) / 60
        machines = sorted({one.machine for one in runs})
        lines.append(
            f"{plural(sum(len(one.seeds) for one in runs), 'run')} took {hours_spent(hours)} on {'; '.join(map(text, machines))}. "
            f"Planned seeds: {', '.join(map(str, spec.seeds))}. Judged were the networks of the last step."
        )
        commands = list(dict.fromkeys(one.command for one in runs if one.command))
        if len(commands) <= 2:
            lines.append(f"Made by {' and '.join(map(code, commands))}.")
    else:
        lines.append("Nothing has run yet.")
    if spec.budget:
        b = spec.budget
        lines.append(
            f"The plan allowed {in_hours(b.hours)} on {text(called(b.device))}, in sessions of {in_hours(b.session_hours)}."
        )
    return "## Setup\n\n" + " ".join(lines) + "\n\n" + yours("blind-phase", HAND_WRITTEN["blind-phase"], earlier)


def _from(origin: str) -> str:
    return {
        "paper": "come from the paper",
        "authors' code": "from the authors' code",
        "cited": "from works that it cites",
        "assumed": "are assumed",
        "measured here": "were chosen by a measurement here",
    }[origin]


def _result(results: Results, chosen: Sequence[Judgement], patterns: Sequence[str], brevity: int) -> str:
    page = "## Result\n\n"
    if len(chosen) < len(results.judgements):
        page += f"Of these {len(chosen)}: {tally_in_words(chosen)}. "
    page += f"All {plural(len(results.judgements), 'claim')}: {tally_in_words(results.judgements)}.\n\n"
    if not patterns and len(chosen) > MOST_CLAIMS:
        groups = results.by_experiment()
        rows = [[cell(name), *(str(count or "") for count in tally(own).values())] for name, own in groups.items()]
        return page + table(["experiment", *tally([])], rows)
    rows = [
        [
            f"{code(j.id)} {cell(j.statement)}" if brevity < 2 else code(j.id), as_reported(j.reported),
            mean_and_spread(j.reproduced, j.reported)[0], interval_text(j.interval), str(len(j.seeds) or ""), worded(j),
        ]
        for j in chosen
    ]  # fmt: skip
    page += table(["claim", "reported", "ours", f"{LEVEL:.0%} interval", "n", "verdict"], rows)
    return page + (
        f"\nOurs is the mean over n seeds, the interval Student's t ({'on the log scale for ratios' if any(j.pairs for j in chosen) else 'of the mean'}). "
        "The verdict comes from a tolerance that was fixed before the runs; *open*: a part of the interval would get another one.\n"
    )


def _picture(results: Results, figure: str | None) -> str:
    if figure is None:
        return ""
    alt = dict((path, alt) for alt, path in _pictures(results.sections)).get(figure, "Figure")
    return f"![{alt}]({figure})\n\n*Figure: {alt.rstrip('.')}.*\n"


def _gap_analysis(results: Results, chosen: Sequence[Judgement], brevity: int) -> str:
    lines = []
    for index, gap in enumerate(results.spec.gaps, start=1):
        own = [j for j in chosen if index in causes(results.spec, j)]
        if own:
            evidence = f" *Evidence*: {text(gap.evidence)}" if brevity == 0 else ""
            lines.append(
                f"- **{text(gap.cause)}** ({plural(len(own), 'claim')}){evidence} *What would tell*: {text(gap.ablation)}"
            )
    without = unexplained(results.spec, chosen)
    if without:
        lines.append(f"- Not reproduced, and no cause is suspected: {', '.join(map(code, without))}.")
    if not lines:
        missed = [j for j in chosen if j.verdict != REPRODUCED]
        lines.append("None stated." if missed else "Every claim in this note was reproduced.")
    return "## Gap analysis\n\n" + "\n".join(lines) + "\n"


def _not_to_conclude(results: Results, chosen: Sequence[Judgement]) -> str:
    """What a reader might take from the table and must not, as far as spec and records can tell."""
    spec: Spec = results.spec
    lines: list[str] = []
    counts = tally(chosen)
    if counts[NOT]:
        lines.append(
            f"Not reproduced ({counts[NOT]} here) does not mean false: it did not come out with the deviations above"
            + (", and no suspected cause has been tested." if spec.gaps else ".")
        )
    left = sum(j.settled is False for j in chosen if j.verdict == REPRODUCED)
    if left:
        lines.append(
            f"Reproduced ({counts[REPRODUCED]} here) does not mean certain: for {left} the interval reaches beyond the tolerance."
        )
    if counts[INCONCLUSIVE]:
        lines.append(f"Inconclusive ({counts[INCONCLUSIVE]} here) speaks neither for the paper nor against it.")
    below = sum(BELOW_FLOOR in j.reason for j in chosen)
    if below:
        lines.append(
            f"A reported value below the floor of the metric ({below} here) is no better result: it probably measures something else."
        )
    sizes = [len(j.seeds) for j in chosen if j.seeds]
    if sizes and min(sizes) < seeds_for_signs():
        n = min(sizes)
        span = f", where the interval of a mean reaches {reach(n):.2g} standard deviations" if n > 1 else ""
        lines.append(f"A small difference between two methods is not shown by {plural(n, 'seed')}{span}.")
    missing = [name for name, own in results.by_experiment().items() if all(j.verdict == COULD_NOT_RUN for j in own)]
    if missing:
        lines.append(f"Nothing is known about {', '.join(map(text, missing))}, which did not run.")
    if spec.not_attempted:
        lines.append(
            f"Nothing is known about what was not attempted: {'; '.join(text(one.what).rstrip('.') for one in spec.not_attempted)}."
        )
    assumed = sum(setting.origin == "assumed" for setting in spec.settings)
    if assumed:
        lines.append(
            f"Not all settings are the paper's: {assumed} had to be assumed, and another choice may change a verdict."
        )
    if not lines:
        return ""
    return "## What not to conclude\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _pictures(sections: str) -> list[tuple[str, str]]:
    """(alternative text, path) of each picture that the method's part of the report shows."""
    return re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", sections)


def _figure(results: Results, folder: Path, asked: str | None) -> str | None:
    """The figure asked for, or the first of the report; None when it has none."""
    if asked is not None:
        if not (folder / asked).is_file():
            raise BadInput(f"--figure: found no file {folder / asked}, expected a picture by its path from {folder}")
        return asked
    return next((path for _, path in _pictures(results.sections) if (folder / path).is_file()), None)


def _pages(count: int, figure: str | None) -> float:
    return (count + (FIGURE_WORDS if figure else 0)) / PAGE_WORDS


def _length(note: Note, figure: str | None) -> str:
    return (
        f"\n---\n\n{note.words:,} words{' and a figure' if figure else ''}, about {note.pages:.1f} pages of print; at most {PAGES}. "
        "Written by `repro report --note` from the spec and the run records; the marked parts are a person's.\n"
    )
