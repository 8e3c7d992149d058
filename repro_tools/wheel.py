"""These tools as one file, for a project to carry: a wheel that holds what is running here, and its SHA-256."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import tomllib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

NAME = "paper-reproduction"
PACKAGE = Path(__file__).parent
CACHES = ("__pycache__", ".ruff_cache", ".pytest_cache", ".DS_Store")
METADATA = ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE")
"""What a dist-info folder has beside the files that say how it came to this machine."""
DATE, UNIX, PLAIN_FILE = (1980, 1, 1, 0, 0, 0), 3, 0o100644


class NotInstalled(Exception):
    """The tools run from a folder that pip knows nothing of. One line."""


class Wheel(NamedTuple):
    """A wheel that is not written yet."""

    name: str
    contents: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.contents).hexdigest()


def packed() -> Wheel:
    """The wheel of the installed tools, the same from an editable install and from a wheel. Raises NotInstalled."""
    try:
        installed = distribution(NAME)
    except PackageNotFoundError:
        raise NotInstalled(f"{PACKAGE.parent}: {NAME} is not installed, expected pip install of that folder") from None
    stem = f"{NAME.replace('-', '_')}-{installed.version}"
    files = _code() | {f"{stem}.dist-info/{name}": text for name, text in _metadata(installed).items()}
    record = f"{stem}.dist-info/RECORD"
    rows = io.StringIO()
    listed = csv.writer(rows, lineterminator="\n")
    listed.writerows((name, f"sha256={_digest(files[name])}", len(files[name])) for name in sorted(files))
    listed.writerow((record, "", ""))
    files[record] = rows.getvalue().encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as written:
        for name in [*sorted(files.keys() - {record}), record]:
            entry = zipfile.ZipInfo(name, DATE)
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, UNIX
            entry.external_attr = PLAIN_FILE << 16
            written.writestr(entry, files[name])
    return Wheel(f"{stem}-py3-none-any.whl", archive.getvalue())


def _code() -> dict[str, bytes]:
    """The package, and the template in it: where this is a clone, that lies where pyproject.toml says."""
    files = _below(PACKAGE, PACKAGE.name)
    if not (PACKAGE / "template").is_dir():
        build = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
        for source, target in build["targets"]["wheel"]["force-include"].items():
            files |= _below(PACKAGE.parent / source, target)
    return files


def _below(path: Path, name: str) -> dict[str, bytes]:
    """The contents of a file by `name`, or of every file of a folder by names that begin with it."""
    if path.is_file():
        return {name: path.read_bytes()}
    inside = {one.relative_to(path): one for one in path.rglob("*") if one.is_file() and one.suffix != ".pyc"}
    return {
        f"{name}/{below.as_posix()}": one.read_bytes()
        for below, one in inside.items()
        if not set(below.parts) & set(CACHES)
    }


def _metadata(installed: Distribution) -> dict[str, bytes]:
    texts = {name: installed.read_text(name) for name in METADATA}
    return {name: text.encode() for name, text in texts.items() if text is not None}


def _digest(contents: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(contents).digest()).rstrip(b"=").decode()
