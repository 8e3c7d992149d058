"""Times and numbers of things in words."""

from __future__ import annotations


def count(number: int, what: str) -> str:
    """1 session, 2 sessions, 1,000 steps."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def in_hours(hours: float) -> str:
    """A number of hours as it was given: 1 hour, 1.5 hours; below one in minutes or seconds."""
    return _below_an_hour(hours) if hours < 1 else f"{hours:g} hour" + ("" if hours == 1 else "s")


def hours_spent(hours: float) -> str:
    """A number of hours as it was measured: 6.0 hours; below one in minutes or seconds."""
    return _below_an_hour(hours) if hours < 1 else f"{hours:.1f} hours"


def _below_an_hour(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours >= 0.1 else in_words(hours * 3600)


def in_words(seconds: float) -> str:
    """A time with two digits, in the unit that suits it: 0.94 ms, 12 s, 5 min, 1.5 h. A time below a tenth of an hour is never in hours."""
    if 0 < seconds < 1e-5:
        return "< 0.01 ms"
    units = (("h", 3600, 360), ("min", 60, 60), ("s", 1, 0.1), ("ms", 1e-3, 1e-5), ("s", 1, 0))
    value, unit = next((seconds / size, unit) for unit, size, least in units if seconds >= least)
    return f"{value:.2g} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
