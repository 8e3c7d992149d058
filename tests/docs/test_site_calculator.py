"""The calculator of the site shows what `repro memory` says now."""

from __future__ import annotations

import contextlib
import io
import json
import re

import pytest

from benchmarks import calculator
from repro_tools import cli

SAMPLES = [("2d-moons", 64), ("cifar10", 512)]
"""Minutes and MiB, hours and GiB; the second fits on few devices."""


@pytest.fixture(scope="module", params=SAMPLES, ids=lambda sample: f"{sample[0]} {sample[1]}")
def asked(request) -> tuple[str, int, dict]:
    """An experiment, a batch size, and the answer of the command."""
    name, size = request.param
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.main(["memory", name, "--json", "--set", f"phases.*.batch_size={size}"])
    return name, size, json.loads(out.getvalue())


def test_the_committed_answers_are_those_of_now(asked):
    name, size, said = asked
    kept = calculator.read(calculator.DATA)["experiments"][name]["settings"][f"{size} {calculator.AS_CONFIGURED}"]
    assert kept == calculator.shortened(name, said), "run make calculator"


@pytest.mark.parametrize("device", ["T4", "A100-PCIe-40GB"])
def test_the_page_shows_the_answer_of_the_command(page, address, asked, device):
    name, size, said = asked
    page.goto(f"{address}refs/calculator.html")
    for choice, value in (("experiment", name), ("device", device), ("batch-size", str(size))):
        page.get_by_label(choice.replace("-", " "), exact=False).first.select_option(value)
    rows = page.locator("#calculator-answer tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    shown, times = {row[0]: row for row in rows}, said["time"]["devices"][device][name]
    unit = page.locator("#calculator-answer th").last.text_content()
    longest = max(one["hours"][2] for one in times["phases"].values())
    assert unit == ("hours" if longest >= 1 else "min")
    per_hour = 1 if unit == "hours" else 60
    peaks = [part["peak_bytes"] for one in said["experiments"][name]["phases"].values() for part in one["parts"]]
    scale = 2**20 if max(peaks) < 2**30 else 2**30
    for phase, one in said["experiments"][name]["phases"].items():
        part = one["parts"][0]
        _, batch, peak, needed, fits, time = shown[phase if one["rows"] else f"{phase}: {largest(one)['name']}"]
        part = part if one["rows"] else largest(one)
        assert batch == (str(one["rows"]) if one["rows"] else "")
        assert (peak, needed) == (size_text(part["peak_bytes"], scale), size_text(part["needed_bytes"], scale))
        assert fits == ("yes" if part["fits"][device] else "NO")
        assert close(time, [one * per_hour for one in times["phases"][phase]["hours"]])
    assert close(shown["in all, one seed"][-1], [one * per_hour for one in times["hours_of_a_seed"]])


def test_rounding_is_told_from_another_number():
    assert close("0.45 (0.30 to 0.77)", [0.301, 0.449, 0.774]) and close("<0.01", [0.001, 0.002, 0.009])
    assert not close("0.45 (0.30 to 0.77)", [0.301, 0.46, 0.774]) and not close("<0.01", [0.001, 0.002, 0.2])


def largest(phase: dict) -> dict:
    return max(phase["parts"], key=lambda part: part["peak_bytes_in_blocks"])


def size_text(size: int, unit: int) -> str:
    number = size / unit
    return "<0.01" if 0 < number < 0.005 else f"{number:,.2f}"


def close(text: str, hours: list[float]) -> bool:
    """Whether the text is "likely (low to high)" of these hours to two digits that count; one number where all three are alike."""
    low, likely, high = hours
    numbers = re.findall(r"<?[\d.,]+", text)
    expected = [likely, low, high] if len(numbers) == 3 else [high]
    return all(_is(number, hour) for number, hour in zip(numbers, expected, strict=True))


def _is(text: str, hour: float) -> bool:
    if text.startswith("<"):
        return hour < float(text[1:])
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - hour) <= 0.5 * 10**-digits * 1.0001
