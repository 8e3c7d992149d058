"""Where a result comes from: versions, commit, machine, time, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(root: Path, device: torch.device) -> dict[str, Any]:
    """Plain data about this process: command, commit, versions, machine, start time."""
    return {
        "command": " ".join(["repro", *sys.argv[1:]]),
        "commit": git_commit(root),
        "versions": {"python": platform.python_version(), **imported_versions()},
        "machine": machine(device),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def imported_versions() -> dict[str, str]:
    """The version of every installed distribution of which this process has imported something."""
    distributions = metadata.packages_distributions()
    names = {name for module in list(sys.modules) for name in distributions.get(module, ())}
    return {name: metadata.version(name) for name in sorted(names)}


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


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
