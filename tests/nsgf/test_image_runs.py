"""The table of predicted hand-over times on the page is that of the committed records."""

import pytest

from benchmarks import image_runs
from repro.method import find_project
from repro_tools.report.results import read_records

RECORDS = read_records(find_project(image_runs.ROOT).reports / "records")


def test_the_page_has_the_times_of_the_committed_records():
    page = image_runs.PAGE.read_text()
    assert image_runs.fill(page, RECORDS) == page


def test_every_run_on_images_has_its_row_and_no_other():
    rows = image_runs.table(RECORDS).splitlines()[2:]
    shown = [tuple(row.strip("| ").split(" | ")[:2]) for row in rows]
    assert shown == [(r["experiment"], str(r["seed"])) for r in RECORDS if not r["experiment"].startswith("2d-")] != []


@pytest.mark.parametrize("page", ["", image_runs.START, 2 * (image_runs.START + image_runs.END)])
def test_a_page_without_the_place_of_the_table_is_refused(page):
    with pytest.raises(ValueError, match="once$"):
        image_runs.fill(page, RECORDS)
