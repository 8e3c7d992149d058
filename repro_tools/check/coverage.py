"""What a spec lacks, and where it and the configurations disagree. No paper is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from repro_tools.check.findings import CONTRADICTED, MISSING, UNSOURCED, Finding, grouped, some
from repro_tools.check.paper import pages_named
from repro_tools.placeholders import holds_placeholder
from repro_tools.spec import ITEMS, Draft, Setting, Spec, settings_of

PARTS = {
    "paper": "title, authors, and arxiv with its version, or url",
    "level": "conceptual, code, experimental or extension",
    "seeds": "the seeds that count",
    "tolerances": "when a claim holds, and why this much",
    "claims": "what the paper reports: metric, value, page, tolerance",
    "settings": "every value with its origin",
    "deviations": "each departure from the paper, or an entry 'None known'",
    "not_attempted": "claims of the paper that no experiment tests, or []",
}
"""What a spec must have, and what belongs there."""
NO_SETTING_NEEDED = ("experiment", "pace.log_every", "pace.checkpoint_every")

_FILE = r"[\w./-]*\w\.[A-Za-z][A-Za-z0-9]{0,4}\b"
_COMMIT = r"\b(?=[a-f]*\d)[0-9a-f]{7,40}\b|\bv\d"
_CITATION = rf"\b(?:19|20)\d\d\b|://|\b\d{{4}}\.\d{{4,5}}\b|{_FILE}"

_SOURCE = "a source: author and year, a link, or a file of its code"


def missing_parts(spec: Draft) -> Iterator[Finding]:
    """The parts that are not there, or that claims ask for."""
    for part, expected in PARTS.items():
        if part not in spec.model_fields_set:
            yield Finding(MISSING, f"spec.yaml: {part}", "nothing", expected)
        elif part in ("seeds", "claims") and not getattr(spec, part):
            yield Finding(MISSING, f"spec.yaml: {part}", "an empty list", expected)
    for name in sorted({claim.tolerance for claim in spec.claims} - set(spec.tolerances)):
        yield Finding(MISSING, f"spec.yaml: tolerances.{name}", "nothing, but claims name it", PARTS["tolerances"])


def missing(spec: Spec, experiments: list[str], leaves: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """What a complete spec has and this one does not; `leaves` are the fields of each configuration by experiment."""
    if spec.paper and not spec.paper.arxiv and not spec.paper.url:
        yield Finding(MISSING, "spec.yaml: paper", "neither arxiv nor url", "where the paper can be had")
    if spec.budget is None:
        yield Finding(MISSING, "spec.yaml: budget", "nothing", "device, hours and session_hours: what it may cost")
    if spec.level == "conceptual" and not spec.simplifications:
        yield Finding(
            MISSING, "spec.yaml: simplifications", "none at level conceptual", "what is simpler than in the paper, and its effect"
        )  # fmt: skip
    if spec.level not in ("conceptual", None) and "deviations" in spec.model_fields_set and not spec.deviations:
        yield Finding(
            MISSING, "spec.yaml: deviations", f"none at level {spec.level}", "each departure from the paper, or an entry 'None known'"
        )  # fmt: skip
    if not experiments:
        yield Finding(MISSING, "configs", "no configuration", "one file per experiment")
    claimed = {claim.experiment for claim in spec.claims}
    for name in experiments if spec.claims else ():
        if name not in claimed:
            yield Finding(
                MISSING, "spec.yaml: claims", f"none about experiment {name}", "at least one with a tolerance"
            )
    for name in sorted(claimed - set(experiments)):
        ids = [claim.id for claim in spec.claims if claim.experiment == name]
        yield Finding(
            MISSING, f"configs/{name}.yaml", f"no such file, but claims of it: {some(ids)}", "a configuration"
        )
    for item in ITEMS:
        open_in = [
            name
            for name in experiments
            if not any(s.item == item and fnmatchcase(name, s.experiments) for s in spec.settings)
        ]
        unasked = not experiments and not any(setting.item == item for setting in spec.settings)
        if open_in or unasked:
            yield Finding(
                MISSING, f"spec.yaml: settings: item '{item}'", "no setting" if open_in == experiments else f"no setting for {some(open_in)}",
                "one from the paper, or assumed",
            )  # fmt: skip
        elif item in ("batch size", "iterations"):
            yield from grouped(_phases_without(item, spec, leaves))


def _phases_without(item: str, spec: Spec, leaves: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Finding]]:
    """Every phase of every experiment for which no setting with this item answers, with its experiment."""
    name = {"batch size": "batch", "iterations": "iterations"}[item]
    for experiment, values in leaves.items():
        found = settings_of(spec, experiment, values)
        answers = [key for setting, own in found if setting.item == item for key in own]
        for phase in (key.split(".")[1] for key in values if re.fullmatch(r"phases\.[^.]+\.iterations", key)):
            own = [key for key in values if key.startswith(f"phases.{phase}.") and name in key.rsplit(".", 1)[-1]]
            # A phase without a field of its own is answered by any setting of the experiment, for instance a shared field.
            if own and not set(own) & set(answers):
                place = f"spec.yaml: settings: item '{item}'"
                unnamed = [setting.name for setting, keys in found if setting.item is None and set(own) & set(keys)]
                expected = f"item: {item} in setting '{unnamed[0]}'" if unnamed else f"one with key {own[0]}"
                yield experiment, Finding(MISSING, place, f"no setting for phase {phase}", expected)


def unsourced(spec: Spec, leaves: Mapping[str, Mapping[str, Any]], root: Path) -> Iterator[Finding]:
    """Values that no setting answers for, and origins that name no place where one could look."""
    yield from grouped(_leaves_without(spec, leaves))
    for setting in spec.settings:
        place = f"spec.yaml: setting '{setting.name}'"
        where = f"{place}: where"
        if setting.origin == "assumed" and not setting.alternatives:
            yield Finding(UNSOURCED, f"{place}: alternatives", "none", "what else it could be")
        if setting.origin == "assumed" and "why" not in setting.model_fields_set:
            yield Finding(UNSOURCED, f"{place}: why", "nothing", "the reason for this value")
        if holds_placeholder(setting.where):
            continue  # said once, as a placeholder
        if setting.origin == "paper" and not pages_named(setting.where):
            yield Finding(UNSOURCED, where, repr(setting.where), "the page of the paper, such as 'page 13, E.1'")
        if setting.origin == "authors' code":
            if not re.search(_FILE, setting.where):
                yield Finding(UNSOURCED, where, repr(setting.where), "a file of the authors' code")
            elif not re.search(_COMMIT, setting.where):
                yield Finding(UNSOURCED, where, repr(setting.where), "the commit or version of the authors' code")
        if setting.origin == "cited" and not re.search(_CITATION, setting.where):
            yield Finding(UNSOURCED, where, repr(setting.where), _SOURCE)
        if setting.origin == "measured here" and not any(
            _exists(file, root) for file in re.findall(_FILE, setting.where)
        ):
            yield Finding(
                UNSOURCED, where, repr(setting.where), "the script or test that measured it, a file of this project"
            )
    for claim in spec.claims:
        if holds_placeholder(claim.where):
            continue
        where = f"spec.yaml: claim {claim.id}: where"
        if claim.origin == "cited" and not re.search(_CITATION, claim.where):
            yield Finding(UNSOURCED, where, repr(claim.where), _SOURCE)
        if claim.origin == "paper" and not pages_named(claim.where):
            yield Finding(UNSOURCED, where, repr(claim.where), "the page of the paper")


def _leaves_without(spec: Spec, leaves: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Finding]]:
    for experiment, values in leaves.items():
        covered = {key for _, own in settings_of(spec, experiment, values) for key in own}
        for key, value in values.items():
            if key not in covered and key not in NO_SETTING_NEEDED:
                yield experiment, Finding(
                    UNSOURCED, f"configs/{experiment}.yaml: {key}", f"{value!r} without a source", "a setting in spec.yaml"
                )  # fmt: skip


def _exists(name: str, root: Path) -> bool:
    """Whether a file is there, seen from the project's root or from a folder above it up to the one with pyproject.toml."""
    for folder in (root, *root.resolve().parents):
        if (folder / name).is_file():
            return True
        if (folder / "pyproject.toml").is_file():
            return False
    return False


def contradicted(spec: Spec, experiments: list[str], leaves: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Settings that no experiment or field takes up, that differ from a configuration, or from each other."""
    for setting in spec.settings if experiments else ():
        if not any(fnmatchcase(name, setting.experiments) for name in experiments):
            yield Finding(
                CONTRADICTED, f"spec.yaml: setting '{setting.name}': experiments", repr(setting.experiments),
                f"a pattern that matches one of {some(experiments)}",
            )  # fmt: skip
    yield from grouped(_disagreements(spec, leaves))


def _disagreements(spec: Spec, leaves: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Finding]]:
    for experiment, values in leaves.items():
        path = f"configs/{experiment}.yaml"
        saying: dict[str, list[Setting]] = {}
        for setting, own in settings_of(spec, experiment, values):
            if not own:
                place = f"spec.yaml: setting '{setting.name}': key"
                yield experiment, Finding(CONTRADICTED, place, repr(setting.key), f"a field of {path}")
            for key in own:
                saying.setdefault(key, []).append(setting)
        for key, settings in saying.items():
            first = settings[0]
            for other in settings[1:]:
                if other.value != first.value:
                    yield experiment, Finding(
                        CONTRADICTED, f"spec.yaml: setting '{other.name}': value", f"{other.value!r} for {key}, but {first.value!r} by setting '{first.name}'",
                        "one value",
                    )  # fmt: skip
            if all(setting.value != values[key] for setting in settings):
                yield experiment, Finding(
                    CONTRADICTED, f"{path}: {key}", repr(values[key]), f"{first.value!r} as in setting '{first.name}' ({first.where})"
                )  # fmt: skip
