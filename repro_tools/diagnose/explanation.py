"""A finding of `repro diagnose`: what was measured, three explanations of it, and the test between them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Evidence = Literal["exact", "measured", "cited", "folklore"]
"""exact: the test decides it on this machine. measured: `benchmarks/diagnose.py` planted it and it looked like this. cited: by
authors who measured or documented it. folklore: what practitioners say."""


@dataclass(frozen=True)
class Hypothesis:
    """An explanation, what the finding's test shows if it is the right one, and where it comes from."""

    says: str
    then: str
    evidence: Evidence


@dataclass(frozen=True)
class Finding:
    kind: str
    title: str
    measured: str
    likely: Hypothesis
    subtle: Hypothesis
    null: Hypothesis
    test: str


@dataclass(frozen=True)
class Place:
    """Where the measurements were made, for the commands of the tests."""

    experiment: str
    phase: str
    seed: int
    steps: int
    overrides: tuple[str, ...] = ()
    options: str = ""
    """Further options of the command, as they are typed."""

    def again(self, **changed: int | str) -> str:
        seed, steps = changed.get("seed", self.seed), changed.get("steps", self.steps)
        extra = f" {changed['extra']}" if "extra" in changed else ""
        sets = "".join(f" --set {shlex.quote(override)}" for override in self.overrides)
        where = f"{self.experiment} --phase {self.phase} --seed {seed} --steps {steps}"
        return f"repro diagnose {where}{sets}{self.options}{extra}"

    def code(self, line: str) -> str:
        changes = f", {list(self.overrides)}" if self.overrides else ""
        return f'phase, model, batch = open_phase("{self.experiment}", "{self.phase}", {self.seed}{changes})\n{line}'


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
