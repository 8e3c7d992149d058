"""m49: a record counted twice.

The n of a report is the number of seeds that ran. A record that is read again, kept from an earlier evaluation, or copied under another name counts
once, or the report is refused in one line that names both files.
"""

import shutil

import pytest
from proof import Proof
from tiny_method import ORIGIN, runtime, train, write_project

from repro.errors import BadInput
from repro.run import RECORD
from repro_tools import evaluate
from repro_tools.evaluate import evaluate_anew, find_runs
from repro_tools.report import gather, results
from repro_tools.report.gather import write_report
from repro_tools.report.results import read_record


def check(tmp_path):
    """Three seeds stay three, however often and from wherever their records are read."""
    project = write_project(tmp_path / "project")
    for seed in (0, 1, 2):
        train(project, seed)
    runs, width = project.root / "runs", []

    def look(how, may_be_refused=False):
        try:
            (found,) = write_report(project, runs, project.reports, "Results")
        except BadInput as error:
            told = str(error)
            assert may_be_refused and "found a second record of count, seed" in told, f"{how}: refused: {told}"
            return
        n, reach = len(found.reproduced["values"]), found.interval.high - found.interval.low
        width.append(reach)
        assert n == found.interval.n == 3, (
            f"{how}: found n = {n}, expected 3; the interval is {width[0] / reach:.1f} times as narrow as the first"
        )

    look("reported")
    look("reported again")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "describe", lambda *_: ORIGIN)
        for run in find_runs(project, ["count"], None, [], runs):
            evaluate_anew(run, runtime())
    look("evaluated anew")

    store = project.reports / "records"
    copies = [shutil.copy(path, store / f"copy-of-{path.name}") for path in sorted(store.glob("*.json"))]
    look("records copied", may_be_refused=True)
    for copy in copies:
        copy.unlink()
    shutil.copytree(runs / "count" / "seed-0", runs / "count" / "seed-0-copy")
    look("run folder copied", may_be_refused=True)
    shutil.rmtree(runs / "count" / "seed-0-copy")
    look("copies deleted")


def every_file_of_the_folder(monkeypatch):
    """A file, a run: nothing asks whose seed it is."""
    monkeypatch.setattr(results, "_once", lambda record, path, found: None)


def everything_called_a_record(monkeypatch):
    """However deep it lies: what an evaluation has superseded is one too."""
    real = gather.collect

    def collect(runs, reports):
        real(runs, reports)
        return [read_record(path) for path in sorted(runs.rglob(RECORD))]

    monkeypatch.setattr(gather, "collect", collect)


def runs_and_their_copies(monkeypatch):
    """The runs, and what an earlier report has kept of them."""
    real = gather.collect

    def collect(runs, reports):
        kept = results.read_records(reports / "records") if (reports / "records").exists() else []
        return [*real(runs, reports), *kept]

    monkeypatch.setattr(gather, "collect", collect)


def copies_seen_after_they_are_kept(monkeypatch):
    """Each report refuses the copy of a copy: deleting the one that was made does not help."""
    real, read = results._once, results.read_records
    monkeypatch.setattr(results, "_once", lambda record, path, found: None)

    def read_records(store):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "_once", real)
            return read(store)

    monkeypatch.setattr(results, "read_records", read_records)


def equal_copies_left_out(monkeypatch):
    """A copy that is equal in every field adds nothing and is not refused."""
    real = results._once

    def once(record, path, found):
        other = found.get((record["experiment"], record["seed"]))
        if other is None or read_record(other) != record:
            real(record, path, found)

    def read_records(store):
        known = {(one["experiment"], one["seed"]): one for one in map(read_record, sorted(store.glob("*.json")))}
        return list(known.values())

    monkeypatch.setattr(results, "_once", once)
    monkeypatch.setattr(results, "read_records", read_records)


def newest_run_first(monkeypatch):
    real = gather.collect
    monkeypatch.setattr(gather, "collect", lambda runs, reports: real(runs, reports)[::-1])


PROOFS = [
    Proof(
        check,
        plant={
            every_file_of_the_folder: "records copied: found n = 6, expected 3; the interval is 2.6 times as narrow as the first",
            everything_called_a_record: "evaluated anew: found n = 6",
            runs_and_their_copies: "reported again: found n = 6",
            copies_seen_after_they_are_kept: "copies deleted: refused: ",
        },
        innocent=[equal_copies_left_out, newest_run_first],
    )
]


def test_proof(case):
    case()
