"""Records of runs that the engine made alone: their claims, from the text of the specification that the run kept.

`repro run` passes a gate: it holds the configuration against the specification and fixes the hashes of the claims in the record. The
engine by itself (`python -m repro run`) reads no specification. It keeps the text, and the text says afterwards what the gate would have.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from repro.config import parse_yaml, validate
from repro.errors import BadInput
from repro_tools.placeholders import of_run
from repro_tools.spec import Spec, claim_hashes


def kept_beside(record: dict, store: Path) -> Path | None:
    """Where the reports keep the text of a record without claims; runs of one text share it. None for another record."""
    if "claims" in record or "spec_sha256" not in record:
        return None
    return store / f"spec-{record['spec_sha256'][:12]}.yaml"


def completed(record: dict, kept: Path | None) -> dict:
    """The record with its claims, planned seeds and placeholders, from the text at `kept`. One that has claims is as it is.

    `no_gate` says then that none was passed; `no_spec`, if it is there, why there are no claims. Raises BadInput when the text is
    not the one that the run kept.
    """
    if "claims" in record:
        return record
    try:
        spec = _spec(record, kept)
    except _NoSpec as reason:
        return record | {"claims": {}, "no_gate": True, "no_spec": str(reason)}
    return record | {
        "claims": claim_hashes(spec, record["experiment"]),
        "planned_seeds": spec.seeds,
        "placeholders": of_run(
            record.get("method_placeholder", ""), spec, record["experiment"], record.get("config", {})
        ),
        "no_gate": True,
    }


class _NoSpec(Exception):
    """There is no specification to read the claims from, and why."""


def _spec(record: dict, kept: Path | None) -> Spec:
    if "spec_sha256" not in record or kept is None:
        raise _NoSpec("the project had no spec.yaml")
    try:
        text = kept.read_bytes()
    except OSError:
        raise _NoSpec(f"{kept.name} is gone, the text that the run kept") from None
    found = hashlib.sha256(text).hexdigest()
    if found != record["spec_sha256"]:
        raise BadInput(
            f"{kept}: found the SHA-256 {found[:12]}, expected {record['spec_sha256'][:12]}, that of the text which the run kept"
        )
    try:
        return validate(Spec, parse_yaml(text.decode(), str(kept)), str(kept))
    except (BadInput, UnicodeDecodeError):
        raise _NoSpec("the spec.yaml of that time was none") from None
