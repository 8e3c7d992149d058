"""`repro check`: is the spec complete, sourced, and what the configurations say?"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

from repro.__main__ import add
from repro.config import Section, flatten, read_yaml, validate
from repro.errors import EXIT_OK, EXIT_RUN_FAILED, BadInput
from repro.method import Files, NoMethod, Project, find_project
from repro.run import RECORD, SPEC
from repro_tools.check.coverage import NO_SETTING_NEEDED, contradicted, missing, missing_parts, unsourced
from repro_tools.check.findings import CHANGED, CONTRADICTED, KINDS, MISSING, PLACEHOLDER, Finding
from repro_tools.check.paper import Paper, read_paper
from repro_tools.check.sources import not_found, quotes_alone, searched
from repro_tools.placeholders import label, open_places
from repro_tools.report.kept_spec import completed
from repro_tools.report.results import read_record, read_records
from repro_tools.spec import ITEMS, Claim, Draft, Spec, claim_hash, settings_of
from repro_tools.table import WIDTH

NOT_GIVEN = ": found nothing, expected a value"
"""How repro.config.validate tells of a field that is not there."""

AnySection = TypeVar("AnySection", bound=Section)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Checks spec.yaml before any run: what is still to be filled in, is missing, has no source, contradicts a\n"
        "configuration, does not stand in the paper, or was changed after a run. Exit code 1 when there is a finding."
    )
    parser.epilog = "example: repro check --paper paper.txt   (the text comes from: pdftotext paper.pdf paper.txt)"
    parser.add_argument(
        "--paper",
        type=Path,
        metavar="FILE",
        help="the paper's text, to search its pages: pages end with form feeds (pdftotext) or begin with '## Page N'",
    )
    add(parser, "--runs", "--json")


def command(options: argparse.Namespace) -> int:
    project: Files
    no_method: list[Finding] = []
    try:
        project = find_project(Path.cwd())
    except NoMethod as error:
        expected = "a method; until then the configurations are not held against its types"
        project, no_method = error.files, [Finding(MISSING, "method", error.found, expected)]
    paper = None if options.paper is None else read_paper(options.paper)
    checked = check_project(project, paper, options.runs, no_method)
    if options.json:
        print(json.dumps(asdict(checked), indent=1))
    else:
        print(table(checked))
    return EXIT_RUN_FAILED if checked.findings else EXIT_OK


@dataclass(frozen=True)
class Checked:
    """The findings, and what was looked at, in words, by subject; `claims` says of each claim how it stands to the records."""

    findings: list[Finding]
    verified: dict[str, str]
    claims: dict[str, str]


def check_project(project: Files, paper: Paper | None, runs: Path, known: Sequence[Finding] = ()) -> Checked:
    """Every finding of a project, those that are `known` before among them. Raises BadInput for a file that cannot be read as
    what it is.

    `paper` is searched for quotes and numbers; `runs` and the project's reports for records that were made with other claims.
    Where the project has no method yet, a configuration is any mapping; what a method's types refuse in one are findings, and the
    rest of the checks take it as that.
    """
    experiments = project.experiments()
    spec, findings = _read(Draft, project.spec, project.spec.name)
    findings = [*known, *_stand_ins(project), *findings]
    configs: dict[str, Section | dict] = {}
    refused: list[str] = []
    for name, path in experiments.items():
        model = None
        try:
            model = project.config_class(name) if isinstance(project, Project) else None
        except BadInput as error:
            findings.append(replace(_refusal(str(error)), place=f"configs/{path.name}"))
        try:
            config, found = _read(model, path, f"configs/{path.name}")
        except BadInput as error:
            refused += error.problems
            continue
        findings += found
        if config is not None:
            configs[name] = config
    if refused:
        raise BadInput(*refused)
    if spec is None:
        return Checked(findings, {"spec": "not read on: what is missing in its entries comes first"}, {})
    leaves = {name: flatten(config) for name, config in configs.items()}
    records = _records(project.reports / "records", runs)
    findings += [
        *missing_parts(spec),
        *missing(spec, list(experiments), leaves),
        *unsourced(spec, leaves, project.root),
        *quotes_alone(spec),
        *contradicted(spec, list(experiments), leaves),
        *(not_found(spec, paper) if paper else ()),
        *_changed(spec, records),
    ]
    claims = {claim.id: _stand(spec, claim, records) for claim in spec.claims}
    return Checked(_ordered(findings), _verified(spec, leaves, paper, claims), claims)


def table(checked: Checked) -> str:
    """The findings by kind, what was verified, and the tally, in lines of at most 120 characters."""
    lines = []
    for kind in KINDS:
        own = [finding for finding in checked.findings if finding.kind == kind]
        if own:
            lines.append(f"{kind} ({len(own)})")
            for finding in own:
                text = f"{finding.place}: found {finding.found}, expected {finding.expected}"
                lines += _wrapped(text, "  ", "      ")
            lines.append("")
    lines.append("verified")
    width = max(map(len, checked.verified)) + 2
    for subject, told in checked.verified.items():
        lines += _wrapped(told, f"  {subject:<{width}}", " " * (width + 2))
    counts = [(sum(finding.kind == kind for finding in checked.findings), kind) for kind in KINDS]
    tally = ", ".join(f"{count} {kind}" for count, kind in counts if count)
    return "\n".join([*lines, "", f"findings: {tally or 'none'}"])


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def _stand_ins(project: Files) -> Iterator[Finding]:
    """What the method itself says is not the paper's yet."""
    if isinstance(project, Project) and project.method.placeholder:
        yield Finding(PLACEHOLDER, "method", project.method.placeholder, "the paper's, and Method.placeholder left out")


@overload
def _read(model: type[Draft], path: Path, name: str) -> tuple[Draft | None, list[Finding]]: ...
@overload
def _read(
    model: type[AnySection] | None, path: Path, name: str
) -> tuple[AnySection | dict[str, Any] | None, list[Finding]]: ...
def _read(model: type[AnySection] | None, path: Path, name: str) -> tuple[AnySection | dict | None, list[Finding]]:
    """A file as `model`, or as it is without one, and a finding per placeholder and empty text.

    It is None where placeholders, or in the spec values that are not there yet, keep it from being a `model`. A configuration that
    is none for another reason is given as it is, with a finding for each.
    """
    data = read_yaml(path, may_be_empty=model is Draft)
    if model is Draft:
        data = {key: value for key, value in data.items() if value is not None}  # a heading with nothing below it yet
    places = list(open_places(data))
    findings = [
        Finding(PLACEHOLDER, f"{name}: {place.shown}", repr(place.text), "what belongs here")
        if place.text
        else Finding(MISSING, f"{name}: {place.shown}", "an empty text", "what belongs here")
        for place in places
        if place.text or model is Draft  # a configuration may hold an empty text
    ]
    if model is None:
        return data, findings
    if model is Draft:
        findings += [
            Finding(MISSING, f"{name}: claims.{label(claim, str(index))}.reported", "nothing", "a value")
            for index, claim in enumerate(_claims(data))
            if claim.get("reported") is None and claim.get("kind") not in ("at_most", "at_least")
        ]
    try:
        return validate(model, data, str(path)), findings
    except BadInput as error:
        starts = tuple(f"{path}: {place.key}" for place in places)
        others = [problem for problem in error.problems if not problem.startswith(starts)]
        if model is not Draft:
            findings += [_refusal(problem.replace(str(path), name, 1)) for problem in others]
            return data if len(others) == len(error.problems) else None, findings
        absent = [problem for problem in others if problem.endswith(NOT_GIVEN)]
        if len(others) > len(absent):
            raise BadInput(*(problem for problem in others if problem not in absent)) from None
        keys = [problem.removeprefix(f"{path}: ").removesuffix(NOT_GIVEN) for problem in absent]
        findings += [Finding(MISSING, f"{name}: {_shown(data, key)}", "nothing", "a value") for key in keys]
        return None, findings


def _refusal(problem: str) -> Finding:
    """A line about a configuration, "place: found ..., expected ...", as a finding."""
    place, _, rest = problem.partition(": found ")
    found, _, expected = rest.partition(", expected ")
    return Finding(CONTRADICTED, place, found, expected)


def _claims(data: dict) -> list[dict]:
    """The entries below `claims` that are mappings, whatever else stands there."""
    claims = data.get("claims")
    return [claim for claim in claims if isinstance(claim, dict)] if isinstance(claims, list) else []


def _shown(data: Any, key: str) -> str:
    """A key of pydantic's as a reader finds it: entries of lists by id or name."""
    names = []
    for part in key.split("."):
        data = (data[int(part)] if isinstance(data, list) else data.get(part)) if data else None
        names.append(label(data, part) if part.isdigit() else part)
    return ".".join(names)


@dataclass(frozen=True)
class _Record:
    """What a full run stored of its claims: their hashes by id."""

    path: str
    experiment: str
    seed: int
    claims: Mapping[str, str]


def _records(store: Path, runs: Path) -> list[_Record]:
    """The full runs in the reports and under `runs`, each once. Shortened and altered ones, and those that were made with a
    placeholder, judge no claim, so they are left out."""
    found = {}
    kept = [(f"{store.parent.name}/{store.name}", one) for one in (read_records(store) if store.is_dir() else [])]
    made = [
        (str(path.parent), completed(read_record(path), path.parent / SPEC))
        for path in sorted(runs.glob(f"*/seed-*/{RECORD}"))
    ]
    for path, one in [*kept, *made]:
        if not one["departures"] and not one.get("placeholders"):
            record = _Record(path, one["experiment"], one["seed"], one["claims"])
            found[one["experiment"], one["seed"], tuple(sorted(one["claims"].items()))] = record
    return list(found.values())


def _changed(spec: Spec, records: Sequence[_Record]) -> Iterator[Finding]:
    known = {claim.id: _hash(spec, claim) for claim in spec.claims}
    differing: dict[tuple[str, str], list[_Record]] = {}
    for record in records:
        for name, stored in record.claims.items():
            if known.get(name) != stored:
                differing.setdefault((name, stored), []).append(record)
    for (name, stored), made in differing.items():
        runs = f"{len(made)} run{'s' * (len(made) > 1)} of {made[0].experiment} ({made[0].path})"
        if name in known:
            yield Finding(
                CHANGED, f"spec.yaml: claim {name}", f"{known[name]}, but {stored} in {runs}",
                "the claim and tolerance it was run with; a better one is a second claim",
            )  # fmt: skip
        else:
            yield Finding(
                CHANGED, "spec.yaml: claims", f"no '{name}', which {runs} judged", "every claim of a run kept, with its verdict"
            )  # fmt: skip


def _hash(spec: Spec, claim: Claim) -> str:
    return claim_hash(spec, claim) if claim.tolerance in spec.tolerances else "no tolerance"


def _stand(spec: Spec, claim: Claim, records: Sequence[_Record]) -> str:
    own = [record for record in records if record.experiment == claim.experiment]
    if not own:
        return "not run yet"
    stored = [record.claims[claim.id] for record in own if claim.id in record.claims]
    if any(one != _hash(spec, claim) for one in stored):
        return "changed after a run"
    return "as in every run" if len(stored) == len(own) else "newer than a run"


def _verified(
    spec: Spec, leaves: Mapping[str, Mapping[str, Any]], paper: Paper | None, claims: Mapping[str, str]
) -> dict[str, str]:
    values = {(name, key) for name, own in leaves.items() for key in own if key not in NO_SETTING_NEEDED}
    sourced = {
        (name, key) for name, own in leaves.items() for _, found in settings_of(spec, name, own) for key in found
    }
    origins = Counter(setting.origin for setting in spec.settings)
    stands = Counter(claims.values())
    told = {
        "configurations": f"{len(leaves)} with {len(values)} values, of which {len(values & sourced)} have a setting",
        "checklist": f"{len({s.item for s in spec.settings if s.item})} of {len(ITEMS)} items answered",
        "settings": _tally(origins),
        "claims": _tally(stands),
        "paper": "not searched: give its text with --paper",
    }
    if paper:
        told["paper"] = searched(spec, paper)
    return told


def _tally(counts: Counter) -> str:
    parts = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{counts.total()}: {parts}" if parts else "none yet"


def _ordered(findings: list[Finding]) -> list[Finding]:
    return sorted(dict.fromkeys(findings), key=lambda finding: KINDS.index(finding.kind))
