"""`repro report`: judges every claim and writes the results page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from repro.arguments import add_json
from repro.errors import EXIT_OK, BadInput
from repro.method import find_project
from repro.report import VERDICTS, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Judges every claim of spec.yaml and writes results.json, README.md and figures."
    parser.epilog = "example: repro report --runs runs"
    parser.add_argument("--runs", type=Path, metavar="DIR", help="where the runs are (default: runs, if it is there)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: the project's reports folder)"
    )
    parser.add_argument("--title", default="Results", help="title of the page")
    add_json(parser)


def command(options: argparse.Namespace) -> int:
    project = find_project(Path.cwd())
    out = options.out or project.reports
    if options.runs is not None and not options.runs.is_dir():
        raise BadInput(f"--runs: found no folder {options.runs}, expected one that `repro run` wrote")
    judgements = write_report(project, options.runs or Path("runs"), out, options.title)
    if options.json:
        print(json.dumps({judgement.id: judgement.verdict for judgement in judgements}, indent=1))
    else:
        for verdict in VERDICTS:
            print(f"{sum(judgement.verdict == verdict for judgement in judgements):4d} {verdict}")
        print(out / "README.md")
    return EXIT_OK
