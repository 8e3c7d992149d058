"""Where a result comes from: versions, commit, machine, time, memory."""

from __future__ import annotations

import functools
import os
import platform
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from repro.runtime import Runtime

PROC = Path("/proc")
CGROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Limit, use and reclaimable file cache of a control group's memory, by the controller's name in versions 2 and 1."""


def describe(root: Path, runtime: Runtime) -> dict[str, Any]:
    """Plain data about this process: command, commit, versions, machine, start time."""
    return {
        "command": " ".join(["repro", *sys.argv[1:]]),
        "commit": _commit_of_this_process(root),
        "versions": _versions(),
        "machine": machine(runtime.device),
        "processes": runtime.world.size,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _commit_of_this_process(root: Path) -> str:
    """As it was at the first of several seeds: the code was read before, and somebody may commit while they run."""
    return git_commit(root)


def loaded() -> frozenset[str]:
    """The names of all packages of which this process has imported something."""
    return frozenset(name.partition(".")[0] for name in sys.modules)


def renewed(info: dict[str, Any], before: frozenset[str]) -> dict[str, Any]:
    """`info` with the versions of what was imported since `before` was all that was loaded: a data set's reader, a metric."""
    return info if loaded() <= before else info | {"versions": _versions()}


def imported_versions() -> dict[str, str]:
    """The version of every installed distribution of which this process has imported something."""
    distributions = metadata.packages_distributions()
    names = {name for module in list(sys.modules) for name in distributions.get(module, ())}
    found = {name: metadata.version(name) for name in sorted(names)}
    return found | {"torch": str(torch.__version__)}  # with its build, such as +cu130, which the metadata may leave out


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that a run used: processor, cores, threads, memory, and the GPU's name if it ran on one."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
    }


def available_host_bytes() -> int:
    """Memory that this process can still take: what the system calls available, or less within a container's or a batch
    job's limit."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _read(PROC / "meminfo") or "", re.MULTILINE):
        free.append(int(found[1]) * 1024)
    lines = (line.split(":", 2) for line in (_read(PROC / "self" / "cgroup") or "").splitlines())
    groups = {name: path for _, names, path in lines for name in names.split(",")}
    for name, (root, limit, used, cache) in CGROUPS.items():
        # A limit holds for all groups below. A container sees its own group as the root, whatever it is called outside.
        group = root / groups.get(name, "/").removeprefix("/")
        for folder in (group, *group.parents):
            allowed, taken, statistics = (_read(folder / file) for file in (limit, used, "memory.stat"))
            if allowed and taken and allowed.strip().isdecimal():
                reclaimable = re.search(rf"^{cache} (\d+)", statistics or "", re.MULTILINE)
                free.append(max(0, int(allowed) - int(taken) + int(reclaimable[1] if reclaimable else 0)))
    return min(free)


def peak_host_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git_commit(root: Path) -> str:
    """The commit of the code, with "+changes" when tracked files differ from it, "none" outside a repository."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return "none"
    return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **imported_versions()}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _processor() -> str:
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    if not lines:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
