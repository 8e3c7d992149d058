"""`repro diagnose` on the phases of NSGF++: bugs that only they can have, sound phases, and the curves of the committed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.diagnose import BUGS, CLASSIFIER, FLOW, IMAGE_PREDICTOR, PREDICTOR, kinds
from repro_tools.diagnose.curves import (
    ENDS_ABOVE_LEAST,
    FALLS_MUCH,
    PEAK_OVER_MEDIAN,
    curve_findings,
    shape,
)
from repro_tools.diagnose.explanation import Place

RECORDS = sorted((Path(__file__).parents[2] / "reference_impl/reports/records").glob("*.json"))
HERE = [
    ("activations missing", FLOW),
    ("time not passed on", FLOW),
    ("time ignored inside", FLOW),
    ("sigmoid saturated", PREDICTOR),
    ("ReLUs dead", CLASSIFIER),
    ("NaN above t = 0.95", IMAGE_PREDICTOR),
    ("columns of two lengths", FLOW),
    ("learning rate x 100", FLOW),
]


@pytest.mark.parametrize(("bug", "place"), HERE)
def test_a_planted_bug_is_named_first(bug, place):
    assert kinds(*place, bug, seed=0, steps=50)[:1] == [BUGS[bug][0]]


@pytest.mark.parametrize("place", [FLOW, CLASSIFIER])
def test_a_sound_phase_is_silent(place):
    assert kinds(*place, None, seed=0, steps=100) == []


def test_the_curves_of_the_committed_runs_are_silent_and_well_within_the_limits():
    shapes = []
    for path in RECORDS:
        for name, curve in json.loads(path.read_text())["curves"].items():
            place = Place(path.stem, name, 0, 100)
            assert list(curve_findings([tuple(point) for point in curve], path.name, None, None, place)) == []
            shapes.append(shape([tuple(point) for point in curve]))
    assert len(shapes) > 90
    # The limits keep a third of distance at least, so that another seed does not cross them.
    assert max(one["end_over_least"] for one in shapes) < 0.7 * ENDS_ABOVE_LEAST
    assert max(one["peak_over_median"] for one in shapes) < 0.7 * PEAK_OVER_MEDIAN
    assert max(one["third_over_last"] for one in shapes) < 0.85 * FALLS_MUCH
