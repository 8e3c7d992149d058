"""The specification of a reproduction: what the paper claims and, fixed before any run, when a claim holds.

A claim's tolerance is hashed into every run. A later change shows in the report (SKILL section 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from repro.config import Section, digest, flatten, read_yaml, validate
from repro.errors import BadInput

Identifier = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
Quote = str | list[str] | None
"""The words of a source, one passage or several; what stands between ** and ** in them is the value that is meant."""


class Paper(Section):
    title: str
    authors: list[str]
    arxiv: str | None = None
    version: str | None = None
    url: str | None = None


class Tolerance(Section):
    """When a claim counts as reproduced, and when as close. See `Claim.kind` for what is compared."""

    reproduced: float
    close: float
    why: str = Field(min_length=10)

    def expected(self, kind: str | None) -> str | None:
        """What the two should be for a claim of this kind, or where no claim says it (None); None when they are."""
        if kind not in ("at_most", "at_least") and min(self.reproduced, self.close) <= 0:
            return f"both greater than 0, found reproduced ({self.reproduced}) and close ({self.close})"
        if kind == "at_least":
            return (
                None
                if self.close <= self.reproduced
                else f"close ({self.close}) not above reproduced ({self.reproduced})"
            )
        return (
            None
            if self.close >= self.reproduced
            else f"close ({self.close}) no tighter than reproduced ({self.reproduced})"
        )


class Claim(Section):
    """One checkable statement of the paper.

    kind "equal": |ours - reported| / |reported| is held against the tolerance.
    kind "within": |ours - reported| itself is, in the unit of the metric.
    kind "at_most": our value itself is held against the tolerance, whatever the paper reports.
    kind "at_least": so it is from below: a value of `reproduced` or more is reproduced, one of `close` or more is close.
    `tolerance` is the name of one of the spec's tolerances; `floor` the metric that no generator can beat.
    Our value of a seed is `metric`, divided by `divided_by` or less `minus` when one of them is given; `quote` then marks
    both values, in this order. `reported` may be None where the paper says more or less and no number, which at_most and at_least do
    not need. `origin` cited: another text tells what the paper says, `where` names it, and the quote is of its words.
    """

    id: str = Identifier
    statement: str
    where: str
    experiment: str = Identifier
    kind: Literal["equal", "within", "at_most", "at_least"]
    metric: str
    divided_by: str | None = None
    minus: str | None = None
    reported: float | None = None
    floor: str | None = None
    tolerance: str
    quote: Quote = None
    origin: Literal["paper", "cited"] = "paper"

    @model_validator(mode="after")
    def _relative_to_something(self):
        if self.kind == "equal" and self.reported == 0:
            raise ValueError(
                "another reported value than 0 for kind equal, whose tolerance is relative; use at_most or within"
            )
        return self

    @model_validator(mode="after")
    def _one_operation(self):
        if self.divided_by is not None and self.minus is not None:
            raise ValueError("divided_by or minus, not both")
        return self

    @property
    def lacks_number(self) -> bool:
        """Whether there is no reported value to measure a distance from."""
        return self.reported is None and self.kind in ("equal", "within")

    @property
    def operands(self) -> list[str]:
        """The metrics that our value is made of."""
        return [name for name in (self.metric, self.divided_by, self.minus) if name]


Item = Literal[
    "loss", "architecture", "optimiser", "batch size", "iterations", "preprocessing", "evaluation protocol",
    "hyper-parameters", "pseudo-code", "hardware", "training time",
]  # fmt: skip
ITEMS: tuple[Item, ...] = get_args(Item)
"""The extraction checklist: what a reader must have looked for in the paper before any code."""


class Setting(Section):
    """A value that shapes a result: where it comes from and, if the paper leaves it open, what else it could be.

    `key` is its place in the configurations of `experiments` (both may hold `*`); None for what no field holds. `item` is the
    item of the extraction checklist that it answers, `quote` the words of the source that say it. What an origin needs of
    `where`, `alternatives` and `why` is asked for by `repro check`.
    """

    name: str
    experiments: str
    key: str | None
    value: int | float | str | bool | list[int] | list[float] | list[str] | None
    origin: Literal["paper", "authors' code", "cited", "assumed", "measured here"]
    where: str = Field("not stated", min_length=3)
    alternatives: list[str] = []
    why: str = ""
    item: Item | None = None
    quote: Quote = None


class Budget(Section):
    """What the reproduction may cost: the device it is planned for, its hours in all, and how long one session lasts."""

    device: str
    hours: PositiveFloat
    session_hours: PositiveFloat


class Simplification(Section):
    """Where less is done than the paper does, and which way that probably moves a result."""

    what: str
    why: str
    effect: str


class Gap(Section):
    """What probably keeps the claims that `claims` matches (it may hold `*`) from the paper's value, written after the runs.

    `evidence` is what speaks for it so far, `ablation` the run that would tell.
    """

    claims: str
    cause: str
    evidence: str
    ablation: str


class Withdrawal(Section):
    """The runs did not measure what the claims say that `claims` matches (it may hold `*`): a metric of other data, for one.

    Their verdict is inconclusive from then on, whatever it would have been, and says both. `instead` is the claim that new runs test.
    """

    claims: str
    why: str = Field(min_length=3)
    instead: str | None = None


class Deviation(Section):
    """Where this reproduction departs from the paper on purpose."""

    what: str
    why: str


class NotAttempted(Section):
    """A claim of the paper that no experiment here tests, and the reason."""

    what: str
    where: str
    why: str


class Spec(Section):
    paper: Paper
    level: Literal["conceptual", "code", "experimental", "extension"]
    seeds: list[NonNegativeInt] = Field(min_length=1)
    tolerances: dict[str, Tolerance]
    claims: list[Claim]
    settings: list[Setting]
    deviations: list[Deviation]
    not_attempted: list[NotAttempted]
    budget: Budget | None = None
    simplifications: list[Simplification] = []
    gaps: list[Gap] = []
    withdrawn: list[Withdrawal] = []

    @model_validator(mode="after")
    def _consistent(self):
        ids = [claim.id for claim in self.claims]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"each claim id once, found twice: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _tolerances_known(self):
        unknown = sorted({claim.tolerance for claim in self.claims} - set(self.tolerances))
        if unknown:
            raise ValueError(f"each claim's tolerance among {', '.join(self.tolerances)}, found {', '.join(unknown)}")
        return self

    @model_validator(mode="after")
    def _tolerances_ordered(self):
        used = {claim.tolerance for claim in self.claims}
        uses: list[tuple[str, str, str | None]]
        uses = [(f"claim {claim.id} ({claim.kind})", claim.tolerance, claim.kind) for claim in self.claims]
        uses += [("no claim", name, None) for name in self.tolerances if name not in used]
        for user, name, kind in uses:
            expected = self.tolerances[name].expected(kind) if name in self.tolerances else None
            if expected:
                raise ValueError(f"in tolerance '{name}', which {user} uses, {expected}")
        return self

    @model_validator(mode="after")
    def _numbers_given(self):
        for claim in self.claims:
            if claim.lacks_number:
                raise ValueError(
                    f"a reported value for kind {claim.kind} in claim {claim.id}; at_most and at_least need none"
                )
        return self

    def claims_of(self, experiment: str) -> list[Claim]:
        return [claim for claim in self.claims if claim.experiment == experiment]


class Draft(Spec):
    """A spec that is being written: whole parts may still be absent, and tolerances that claims name.

    `check_project` asks for the parts that are absent; what else it looks at reads neither `paper` nor `level`.
    """

    paper: Paper | None = None  # type: ignore[assignment]  # absent, see above
    level: Literal["conceptual", "code", "experimental", "extension"] | None = None  # type: ignore[assignment]  # absent
    seeds: list[NonNegativeInt] = []
    tolerances: dict[str, Tolerance] = {}
    claims: list[Claim] = []
    settings: list[Setting] = []
    deviations: list[Deviation] = []
    not_attempted: list[NotAttempted] = []

    # A method takes the place of the validator of its name, which pydantic's stub does not know.
    def _tolerances_known(self) -> Self:  # type: ignore[override]
        return self

    def _numbers_given(self) -> Self:  # type: ignore[override]
        return self


def load_spec(path: Path) -> Spec:
    """The specification in `path`. Raises BadInput with one line per problem."""
    return validate(Spec, read_yaml(path), str(path))


def check_experiment(spec: Spec, spec_path: Path, experiment: str, config: Section, config_path: Path) -> None:
    """Raises BadInput when a configuration contradicts the spec: an experiment without a claim, another value."""
    problems = []
    if not spec.claims_of(experiment):
        known = ", ".join(sorted({claim.experiment for claim in spec.claims}))
        problems.append(
            f"{config_path}: experiment: found '{experiment}', expected one that {spec_path} claims something of: {known}"
        )
    for setting, own in settings_of(spec, experiment, flatten(config)):
        if not own:
            problems.append(
                f"{spec_path}: setting '{setting.name}': key: found '{setting.key}', expected a field of {config_path}"
            )
        for key, value in own.items():
            if value != setting.value:
                problems.append(
                    f"{config_path}: {key}: found {value!r}, expected {setting.value!r} ({spec_path}: {setting.name}, {setting.where})"
                )
    if problems:
        raise BadInput(*problems)


def settings_of(spec: Spec, experiment: str, leaves: Mapping[str, Any]) -> list[tuple[Setting, dict[str, Any]]]:
    """Each setting of an experiment that has a key, with the leaves of the configuration that the key matches."""
    return [
        (setting, {key: value for key, value in leaves.items() if matches(key, setting.key)})
        for setting in spec.settings
        if setting.key is not None and fnmatchcase(experiment, setting.experiments)
    ]


def matches(key: str, pattern: str) -> bool:
    """Whether a dotted key fits a pattern, in which `*` stands for any one name."""
    names, patterns = key.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def passages(quote: Quote) -> list[str]:
    """The passages of a quote."""
    return [] if quote is None else [quote] if isinstance(quote, str) else quote


def claim_hashes(spec: Spec, experiment: str) -> dict[str, str]:
    """What a run stores of each of its claims, so that a later change of statement or tolerance shows."""
    return {claim.id: claim_hash(spec, claim) for claim in spec.claims_of(experiment)}


def claim_hash(spec: Spec, claim: Claim) -> str:
    """A hash of a claim with its tolerance. Quote and origin are left out: they are evidence, and change no verdict."""
    left_out = {"quote", "origin"} if claim.minus else {"quote", "origin", "minus"}  # older records know no `minus`
    return digest(
        [claim.model_dump(mode="json", exclude=left_out), spec.tolerances[claim.tolerance].model_dump(mode="json")]
    )
