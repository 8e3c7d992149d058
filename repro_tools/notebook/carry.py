"""Runs carried from one session to the next: one archive with a manifest, held against its checksums byte by byte.

Imports nothing but Python's library and a small module of the engine: a notebook's own process uses it, and must not wait for PyTorch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any

from repro.errors import BadInput, RunFailed

MANIFEST, FORMAT = "manifest.json", "repro-runs-1"
LEFT_BEHIND = ("scratch", "*.partial", ".tmp*", "running.damaged.*")
"""What is made again, and what was not finished or is not sound."""
BLOCK = 2**20
ATTEMPTS = 5
LARGEST_MANIFEST = 2**26
DEPTH = 5
"""How many folders deep an archive may lie: Kaggle puts outputs at /kaggle/input/notebooks/<user>/<name>/."""


class Unsound(Exception):
    """An archive that is not what its manifest says, or has none."""


def pack(runs: Path, archive: Path) -> dict[str, Any]:
    """Writes the runs, as they are at this moment, into one archive and returns its manifest.

    It may be called while they run: each file is whole, because a run renames what it has finished. The archive of before stays until
    the new one is complete. Raises BadInput when there is nothing to pack, RunFailed when the disk refuses.
    """
    partial = archive.with_name(archive.name + ".partial")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            try:
                manifest = _write(runs, partial)
                break
            except FileNotFoundError:  # a state was renamed between being listed and being opened
                if attempt + 1 == ATTEMPTS:
                    raise
        _flush(partial)
        os.replace(partial, archive)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunFailed(
            f"{archive}: cannot be written ({error.strerror}): found {shutil.disk_usage(archive.parent).free:,} bytes free, "
            f"expected room for {_size(runs):,}; the runs in {runs} and the archive of before are kept"
        ) from None
    return manifest


def verify(archive: Path) -> dict[str, Any]:
    """Reads the whole archive against its manifest, which it returns. Raises BadInput when a byte is not what it was."""
    try:
        with _opened(archive) as (manifest, contents):
            for name, entry in manifest["files"].items():
                with contents(name) as source:
                    _copy(source, None, name, entry)
    except Unsound as error:
        raise BadInput(f"{archive}: no sound archive of runs: {error}") from None
    return manifest


def restore(name: str, places: Sequence[Path], runs: Path) -> str:
    """Brings back the newest sound archive `name` that lies in `places`, and says what it did.

    Runs that are there already are kept and nothing is brought back. An archive that is not sound is passed over with a line on standard
    error. Raises BadInput when there are archives and none is sound.
    """
    if runs.is_dir() and any(runs.iterdir()):
        return f"{runs} has runs already: nothing restored"
    problems, found = [], []
    for archive in _archives(name, places):
        try:
            with _opened(archive) as (manifest, _):
                found.append((manifest["packed"], archive))
        except Unsound as error:
            problems.append(f"{archive}: no sound archive of runs: {error}")
    for _, archive in sorted(found, reverse=True):
        try:
            manifest = _extract(archive, runs)
        except Unsound as error:
            problems.append(f"{archive}: no sound archive of runs: {error}")
            continue
        for problem in problems:
            print(f"repro: warning: {problem}; passed over", file=sys.stderr)
        return f"restored {len(manifest['files'])} files from {archive}, packed {manifest['packed']}"
    if problems:
        raise BadInput(*problems)
    return f"found no {name} in {', '.join(map(str, places))}: this is the first session"


def _write(runs: Path, partial: Path) -> dict[str, Any]:
    files: dict[str, dict[str, Any]] = {}
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in _files(runs):
            name = path.relative_to(runs).as_posix()
            with path.open("rb") as source:
                # A log may grow meanwhile: what counts is its length now.
                entry = tarfile.TarInfo(name)
                entry.size = os.fstat(source.fileno()).st_size
                files[name] = {"bytes": entry.size, "sha256": _digest(source, entry.size)}
                source.seek(0)
                tar.addfile(entry, source)
        if not files:
            partial.unlink()
            raise BadInput(f"{runs}: found no runs, expected what `repro run` wrote")
        manifest = {"format": FORMAT, "packed": datetime.now(UTC).isoformat(timespec="seconds"), "files": files}
        text = json.dumps(manifest, indent=1).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    return manifest


def _files(runs: Path) -> list[Path]:
    kept = []
    for folder, folders, names in os.walk(runs):
        folders[:] = sorted(name for name in folders if not _left_behind(name))
        kept += [Path(folder) / name for name in sorted(names) if not _left_behind(name)]
    return [path for path in kept if path.is_file() and not path.is_symlink()]


def _left_behind(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in LEFT_BEHIND)


def _size(runs: Path) -> int:
    return sum(path.stat().st_size for path in _files(runs) if path.exists())


def _archives(name: str, places: Sequence[Path]) -> list[Path]:
    """Every file of that name, and every folder into which a platform has unpacked one, a few folders deep."""
    found: dict[Path, None] = {}
    for place in places:
        for depth in range(DEPTH):
            found |= dict.fromkeys(path for path in place.glob("*/" * depth + name) if path.is_file())
            found |= dict.fromkeys(path.parent for path in place.glob("*/" * depth + MANIFEST) if _is_ours(path))
    return list(found)


def _is_ours(manifest: Path) -> bool:
    try:
        return json.loads(manifest.read_bytes()[:LARGEST_MANIFEST]).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[dict[str, Any], Callable[[str], IO[bytes]]]]:
    """The manifest of an archive, or of a folder it was unpacked into, and how to open one of its files. Raises Unsound."""
    try:
        if archive.is_dir():
            yield _manifest((archive / MANIFEST).read_bytes()), lambda name: (archive / name).open("rb")
            return
        with tarfile.open(archive, "r:") as tar:
            members = {member.name: member for member in tar}

            def contents(name: str) -> IO[bytes]:
                if not members[name].isreg():  # a link would be followed, out of the archive
                    raise Unsound(f"{name}: found no regular file")
                file = tar.extractfile(members[name])
                assert file is not None  # a regular file has contents
                return file

            with contents(MANIFEST) as file:
                yield _manifest(file.read(LARGEST_MANIFEST)), contents
    except (tarfile.TarError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise Unsound(" ".join(f"{type(error).__name__}: {error}".split())) from None


def _manifest(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("packed"), str):
        raise Unsound(f"found no manifest of format {FORMAT}")
    for name, entry in found["files"].items():
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or {"..", ""} & set(path.parts) or "\\" in name or "\0" in name:
            raise Unsound(f"found the file name {name!r}, expected one below the folder of runs")
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise Unsound(f"{name}: found no size and checksum")
    return found


def _extract(archive: Path, runs: Path) -> dict[str, Any]:
    """All files, checked, and only then in their place."""
    aside = runs.with_name(runs.name + ".restoring")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _opened(archive) as (manifest, contents):
            for name, entry in manifest["files"].items():
                with contents(name) as source:
                    _copy(source, aside / name, name, entry)
            if runs.is_dir():
                runs.rmdir()  # it is empty
            runs.parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside, runs)
            return manifest
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(source: IO[bytes], target: Path | None, name: str, entry: dict[str, Any]) -> None:
    total, size = hashlib.sha256(), 0
    with _writing(target) as write:
        while block := source.read(BLOCK):
            total.update(block)
            size += len(block)
            write(block)
    if (size, total.hexdigest()) != (entry["bytes"], entry["sha256"]):
        raise Unsound(f"{name}: found other contents than its checksum says")


@contextmanager
def _writing(target: Path | None) -> Iterator[Callable[[bytes], object]]:
    """How to write to a new file; to none, nothing happens. What the disk refuses is no fault of the archive: RunFailed."""
    if target is None:
        yield lambda block: None
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("xb")
    except OSError as error:
        raise RunFailed(f"{target}: cannot be written ({error.strerror})") from None

    def write(block: bytes) -> None:
        try:
            file.write(block)
        except OSError as error:
            raise RunFailed(f"{target}: cannot be written ({error.strerror}); nothing was restored") from None

    with file:
        yield write


def _digest(source: IO[bytes], size: int) -> str:
    total = hashlib.sha256()
    while size > 0:
        block = source.read(min(BLOCK, size))
        if not block:
            raise FileNotFoundError  # cut meanwhile: once more
        total.update(block)
        size -= len(block)
    return total.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
