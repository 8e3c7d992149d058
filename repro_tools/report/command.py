"""`repro report`: judges every claim and writes the results page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from repro.__main__ import add
from repro.errors import EXIT_OK, BadInput
from repro.method import find_project
from repro_tools.report.checklist import checklist
from repro_tools.report.gather import gather, write_results
from repro_tools.report.html_page import html_page, require_converter
from repro_tools.report.judge import unexplained
from repro_tools.report.markup import plural, write
from repro_tools.report.note import PAGES, write_note
from repro_tools.report.results import tally

PAGE, NOTE, CHECKLIST = "README.md", "note.md", "checklist.md"
HTML = {PAGE: "results.html", NOTE: "note.html", CHECKLIST: "checklist.html"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Judges every claim of spec.yaml and writes results.json, README.md and the method's figures. What you wrote by hand into the note and "
        "the checklist is kept."
    )
    parser.epilog = "example: repro report --runs runs --note --claims 'table2-*' --checklist --html"
    parser.add_argument("--runs", type=Path, metavar="DIR", help="where the runs are (default: runs, if it is there)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: the project's reports folder)"
    )
    parser.add_argument("--title", default="Results", help="title of the page")
    parser.add_argument("--note", action="store_true", help="write note.md too, a note of three pages")
    parser.add_argument(
        "--claims", nargs="+", default=[], metavar="CLAIM", help="the note's claims, by id or pattern (default: all)"
    )
    parser.add_argument(
        "--figure", metavar="PATH", help="the note's figure, from the report's folder (default: the report's first)"
    )
    parser.add_argument(
        "--checklist", action="store_true", help="write checklist.md too: the ML reproducibility checklist, answered"
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help="write each page as one self-contained HTML file as well (needs Python-Markdown)",
    )
    add(parser, "--json")


def command(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    out = options.out or project.reports
    if options.runs is not None and not options.runs.is_dir():
        raise BadInput(f"--runs: found no folder {options.runs}, expected one that `repro run` wrote")
    if not options.note and (options.claims or options.figure):
        raise BadInput(
            f"--{'claims' if options.claims else 'figure'}: found no --note, expected it: the option is the note's"
        )
    if options.html:
        require_converter()
    results = gather(project, options.runs or Path("runs"), out, options.title)

    pages = {}  # all of them are made before the first is written
    if options.note:
        note = write_note(results, out / NOTE, options.claims, options.figure)
        pages[NOTE] = note.page
    if options.checklist:
        pages[CHECKLIST] = checklist(results, out / CHECKLIST)
    write_results(results, out)
    for name, page in pages.items():
        write(out / name, page)
    written = [out / name for name in (PAGE, *pages)]
    if options.html:
        together = {name: HTML[name] for name in (PAGE, *pages)}
        for name in together:
            path = out / HTML[name]
            write(path, html_page((out / name).read_text(encoding="utf-8"), out, together))
            written.append(path)

    if options.json:
        print(json.dumps({judgement.id: judgement.verdict for judgement in results.judgements}, indent=1))
        return EXIT_OK
    for verdict, count in tally(results.judgements).items():
        print(f"{count:4d} {verdict}")
    print(*written, sep="\n")
    without = unexplained(results.spec, results.judgements)
    if without:
        _say(
            f"{plural(len(without), 'claim')} not reproduced and without a suspected cause: add a gap to {project.spec}"
        )
    if options.note and note.unwritten:
        _say(f"{out / NOTE}: parts that only you can write: {', '.join(note.unwritten)}")
    if options.note and note.too_long:
        _say(
            f"warning: {out / NOTE}: found {note.words:,} words, about {note.pages:.1f} pages, expected at most {PAGES}; shorten your parts"
        )
    return EXIT_OK


def _say(line: str) -> None:
    print(f"repro: {line}", file=sys.stderr)
