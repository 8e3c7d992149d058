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
def sample(request) -> tuple[str, int]:
    """An experiment and a batch size."""
    return request.param


@pytest.fixture(scope="module")
def asked(sample) -> dict:
    """The answer of the command. It takes seconds, so the browser is held against the committed one, which is the same."""
    name, size = sample
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.main(["memory", name, "--json", "--set", f"phases.*.batch_size={size}"])
    return json.loads(out.getvalue())


def committed(name: str, size: int) -> dict:
    return calculator.read(calculator.DATA)["experiments"][name]["settings"][f"{size} {calculator.AS_CONFIGURED}"]


def usable_bytes() -> dict[str, int]:
    """Of each device, as committed."""
    return {name: one["usable_bytes"] for name, one in calculator.read(calculator.DATA)["devices"].items()}


def test_the_committed_answers_are_those_of_now(sample, asked):
    name, _ = sample
    assert committed(*sample) == calculator.shortened(name, asked), "run make calculator"


def test_what_is_committed_of_a_phase_is_its_step_or_what_is_largest_and_decides_where_it_fits(sample, asked):
    phases, usable = asked["experiments"][sample[0]]["phases"], usable_bytes()
    for phase, rows, parts in committed(*sample)["phases"]:
        one = phases[phase]
        part = one["parts"][0] if one["rows"] else max(one["parts"], key=lambda part: part["peak_bytes_in_blocks"])
        assert (rows, parts[0]) == (one["rows"], [part["name"], part["peak_bytes"], part["needed_bytes"]])
        assert part["fits"] == {device: part["needed_bytes"] <= most for device, most in usable.items()}
        peaks = [part["peak_bytes"] for part in one["parts"]]
        assert max(peak for _, peak, _ in parts) == max(peaks)


@pytest.mark.parametrize("device", ["T4", "A100-PCIe-40GB"])
def test_the_page_shows_the_committed_answer(page, address, sample, device):
    name, size = sample
    page.goto(f"{address}refs/calculator.html")
    for choice, value in (("experiment", name), ("device", device), ("batch-size", str(size))):
        page.get_by_label(choice.replace("-", " "), exact=False).first.select_option(value)
    rows = page.locator("#calculator-answer tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    said, usable = committed(name, size), usable_bytes()[device]
    shown, hours = {row[0]: row for row in rows}, said["hours"][device]
    unit = page.locator("#calculator-answer th").last.text_content()
    assert unit == ("hours" if max(one[2] for one in hours["phases"].values()) >= 1 else "min")
    per_hour = 1 if unit == "hours" else 60
    scale = 2**20 if max(peak for _, _, parts in said["phases"] for _, peak, _ in parts) < 2**30 else 2**30
    for phase, of_minibatch, parts in said["phases"]:
        part, peak_bytes, needed_bytes = parts[0]
        _, batch, peak, needed, fits, time = shown[phase if of_minibatch else f"{phase}: {part}"]
        assert batch == (str(of_minibatch) if of_minibatch else "")
        assert (peak, needed) == (size_text(peak_bytes, scale), size_text(needed_bytes, scale))
        assert fits == ("yes" if needed_bytes <= usable else "NO")
        assert close(time, [one * per_hour for one in hours["phases"][phase]])
    assert close(shown["in all, one seed"][-1], [one * per_hour for one in hours["seed"]])


def test_rounding_is_told_from_another_number():
    assert close("0.45 (0.30 to 0.77)", [0.301, 0.449, 0.774]) and close("<0.01", [0.001, 0.002, 0.009])
    assert not close("0.45 (0.30 to 0.77)", [0.301, 0.46, 0.774]) and not close("<0.01", [0.001, 0.002, 0.2])


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
